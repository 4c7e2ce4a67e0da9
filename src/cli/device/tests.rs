//! Goal: a controller changes hands only when nothing loses its last path, and always finds its way back.
//! Method: hosts made of files and a kernel that dies between steps; each crash is followed by what an operator does.

use proptest::prelude::*;

use super::error::{DeviceError, Obstacle};
use super::fake::{FakeHost, FakeKernel, at};
use super::give::Return;
use super::handover::Handover;
use super::inventory::Wish;
use super::take::Taken;

const ONE: &str = "0000:00:10.0";
const TWO: &str = "0000:00:11.0";

fn single() -> FakeHost {
    let host = FakeHost::new();
    host.controller(ONE, 5, "nvme0", 0);
    host.namespace(ONE, "nvme0", "nvme0n1", "259:0");
    host
}

fn dual() -> FakeHost {
    let host = FakeHost::new();
    host.controller(ONE, 5, "nvme0", 0);
    host.controller(TWO, 6, "nvme1", 0);
    host.shared(0, "259:0", &[(ONE, "nvme0"), (TWO, "nvme1")]);
    host
}

fn wish(addresses: &[&str]) -> Wish {
    Wish { addresses: addresses.iter().map(|text| at(text)).collect(), no_iommu: false }
}

/// As `device bind`: all or none, then one after the other.
fn take(host: &FakeHost, kernel: &FakeKernel<'_>, wish: &Wish) -> Result<Vec<Taken>, Vec<DeviceError>> {
    let (host, records) = (host.host(), host.records());
    let handover = Handover { host: &host, kernel, records: &records };
    let lock = records.lock().map_err(|error| vec![error])?;
    let cleared = handover.clear(wish)?;
    let mut taken = Vec::new();
    for &address in &wish.addresses {
        taken.push(handover.take(&lock, &cleared, address).map_err(|error| vec![error])?);
    }
    Ok(taken)
}

/// As `device unbind`.
fn give(
    host: &FakeHost,
    kernel: &FakeKernel<'_>,
    address: &str,
    driver: Option<&str>,
) -> Result<super::give::Given, DeviceError> {
    let (host, records) = (host.host(), host.records());
    let handover = Handover { host: &host, kernel, records: &records };
    let lock = records.lock()?;
    handover.give_back(&lock, at(address), driver)
}

fn obstacles(result: Result<Vec<Taken>, Vec<DeviceError>>) -> Vec<Obstacle> {
    let errors = result.expect_err("refused");
    let of = |error: DeviceError| match error {
        DeviceError::Refused { obstacles, .. } => obstacles,
        other => panic!("{other}"),
    };
    errors.into_iter().flat_map(of).collect()
}

fn standing(driver: Option<&str>, only: Option<&str>) -> (Option<String>, Option<String>) {
    (driver.map(str::to_owned), only.map(str::to_owned))
}

#[test]
fn a_controller_is_taken_and_given_back_with_its_namespaces() {
    let host = single();
    let kernel = FakeKernel::of(&host);
    let taken = take(&host, &kernel, &wish(&[ONE])).expect("taken");
    assert_eq!(host.standing(ONE), standing(Some("vfio-pci"), Some("vfio-pci")));
    assert_eq!(taken[0].previous_driver.as_deref(), Some("nvme"));
    assert_eq!(taken[0].node.as_deref(), Some("/dev/vfio/5"));
    assert_eq!(*kernel.asked.borrow(), ["nvme0n1"], "the kernel was asked whether it is in use");
    let binding = host.records().load(at(ONE)).expect("read").expect("a record");
    assert_eq!((binding.serial.as_deref(), &binding.nsids[..]), (Some("SERIAL1"), &[1][..]));

    let again = take(&host, &kernel, &wish(&[ONE])).expect("nothing to do");
    assert_eq!((again[0].already, again[0].previous_driver.as_deref()), (true, Some("nvme")));
    assert_eq!(host.records().load(at(ONE)).expect("read"), Some(binding), "the first record stays");

    let given = give(&host, &kernel, ONE, None).expect("given back");
    assert_eq!((given.result, given.driver.as_deref()), (Return::Given, Some("nvme")));
    assert_eq!((given.name.as_deref(), given.namespaces_missing), (Some("nvme0"), false));
    assert_eq!(given.namespaces, ["nvme0n1"]);
    assert_eq!(host.standing(ONE), standing(Some("nvme"), None));
    assert_eq!(host.records().load(at(ONE)).expect("read"), None);
    assert_eq!(give(&host, &kernel, ONE, None).expect("nothing to do").result, Return::Nothing);
}

#[test]
fn what_is_mounted_keeps_its_last_path() {
    let host = dual();
    host.mount("259:0", "/srv", "xfs", "/dev/nvme0n1");
    let kernel = FakeKernel::of(&host);
    // Both at once would leave no path at all, and then not even one of them is taken.
    let found = obstacles(take(&host, &kernel, &wish(&[ONE, TWO])));
    assert!(matches!(&found[..], [Obstacle::LastPath { .. }, Obstacle::LastPath { .. }]), "{found:?}");
    assert!(kernel.log.borrow().is_empty());
    take(&host, &kernel, &wish(&[TWO])).expect("the other one stays");
    assert!(kernel.asked.borrow().is_empty(), "a namespace that stays is not claimed from its user");
    let found = obstacles(take(&host, &kernel, &wish(&[ONE])));
    assert!(matches!(&found[..], [Obstacle::LastPath { .. }]), "{found:?}");
    host.unmount("/srv");
    take(&host, &kernel, &wish(&[ONE])).expect("nothing is used any more");
}

#[test]
fn what_only_the_kernel_knows_to_be_in_use_is_not_taken() {
    let host = single();
    let kernel = FakeKernel::of(&host);
    kernel.claimed.borrow_mut().insert("nvme0n1".to_owned());
    let found = obstacles(take(&host, &kernel, &wish(&[ONE])));
    assert_eq!(found, [Obstacle::Claimed { device: "nvme0n1".to_owned() }]);
    host.remove("dev/nvme0n1");
    let found = obstacles(take(&host, &kernel, &wish(&[ONE])));
    assert!(matches!(&found[..], [Obstacle::Unclaimed { .. }]), "{found:?}");
    assert!(kernel.log.borrow().is_empty());
    assert_eq!(host.records().load(at(ONE)).expect("read"), None);
}

#[test]
fn a_mount_that_comes_first_is_seen() {
    let host = single();
    let kernel = FakeKernel::of(&host);
    kernel.mounted_first.set(Some(["259:0", "/late", "xfs", "/dev/nvme0n1"]));
    let found = obstacles(take(&host, &kernel, &wish(&[ONE])));
    assert!(matches!(&found[..], [Obstacle::LastPath { .. }]), "{found:?}");
    assert_eq!(host.standing(ONE), standing(Some("nvme"), None));
}

#[test]
fn mates_in_the_group_are_taken_together_or_not_at_all() {
    let host = FakeHost::new();
    host.controller(ONE, 5, "nvme0", 0);
    host.controller(TWO, 5, "nvme1", 1);
    let kernel = FakeKernel::of(&host);
    let found = obstacles(take(&host, &kernel, &wish(&[ONE])));
    assert!(
        matches!(&found[..], [Obstacle::Group { mates, .. }] if mates[0].address == at(TWO)),
        "{found:?}"
    );
    assert_eq!(take(&host, &kernel, &wish(&[ONE, TWO])).expect("both").len(), 2);
    assert_eq!(host.standing(TWO), standing(Some("vfio-pci"), Some("vfio-pci")));
}

#[test]
fn no_iommu_needs_consent_and_the_mode() {
    let host = FakeHost::new();
    host.function(ONE, 0x01_0802, None, Some("nvme"));
    let kernel = FakeKernel::of(&host);
    let consent = Wish { no_iommu: true, ..wish(&[ONE]) };
    assert_eq!(obstacles(take(&host, &kernel, &consent)), [Obstacle::NoIommu { mode_enabled: false }]);
    host.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
    let refused = take(&host, &kernel, &wish(&[ONE]));
    assert_eq!(obstacles(refused), [Obstacle::NoIommu { mode_enabled: true }]);
    take(&host, &kernel, &consent).expect("taken");
}

#[test]
fn a_dry_run_changes_nothing_and_says_what_would_be_done() {
    let host = single();
    host.remove("sys/bus/pci/drivers/vfio-pci");
    let kernel = FakeKernel::of(&host);
    let (below, records) = (host.host(), host.records());
    let handover = Handover { host: &below, kernel: &kernel, records: &records };
    let cleared = handover.clear(&wish(&[ONE])).expect("free");
    let plan = handover.plan(&cleared, at(ONE)).expect("a plan");
    let device = format!("/sys/bus/pci/devices/{ONE}");
    assert_eq!(plan.steps[0], "modprobe vfio-pci");
    assert!(plan.steps[1].starts_with("# record what it is now"), "{:?}", plan.steps);
    let rest = [
        format!("echo vfio-pci > {device}/driver_override"),
        format!("echo {ONE} > {device}/driver/unbind"),
        format!("echo {ONE} > /sys/bus/pci/drivers_probe"),
    ];
    assert_eq!(plan.steps[2..], rest);
    assert!(kernel.log.borrow().is_empty() && !host.path("state").exists());
}

#[test]
fn a_missing_module_is_loaded_and_one_that_is_not_there_is_told() {
    let host = single();
    host.remove("sys/bus/pci/drivers/vfio-pci");
    let kernel = FakeKernel::of(&host);
    take(&host, &kernel, &wish(&[ONE])).expect("taken");
    assert_eq!(kernel.log.borrow()[0], "modprobe vfio-pci");
    let error = give(&host, &kernel, ONE, Some("absent")).expect_err("no such driver");
    assert!(matches!(&error, DeviceError::Module { module, .. } if module == "absent"), "{error}");
    // What was said last is what is recorded, and a better word mends it.
    give(&host, &kernel, ONE, Some("nvme")).expect("given back");
    assert_eq!(host.standing(ONE), standing(Some("nvme"), None));
}

#[test]
fn a_failed_step_is_undone_at_once() {
    let host = single();
    let kernel = FakeKernel::of(&host);
    *kernel.refusing.borrow_mut() = Some("vfio-pci".to_owned());
    let errors = take(&host, &kernel, &wish(&[ONE])).expect_err("VFIO refuses it");
    let text = errors[0].to_string();
    assert!(text.contains("drivers_probe; it is again as it was before"), "{text}");
    assert_eq!(host.standing(ONE), standing(Some("nvme"), None));
    assert_eq!(host.records().load(at(ONE)).expect("read"), None);
}

#[test]
fn a_controller_that_a_process_drives_is_not_given_back() {
    let host = single();
    let kernel = FakeKernel::of(&host);
    take(&host, &kernel, &wish(&[ONE])).expect("taken");
    host.process(31, "fastice", "/dev/vfio/5");
    let error = give(&host, &kernel, ONE, None).expect_err("in use");
    assert_eq!(error.to_string(), format!("{ONE} is in use by process 31 (fastice)"));
    assert_eq!(host.standing(ONE).0.as_deref(), Some("vfio-pci"));
}

#[test]
fn what_fastice_did_not_take_is_given_back_only_by_name() {
    let host = FakeHost::new();
    host.function(ONE, 0x01_0802, Some(5), Some("vfio-pci"));
    let kernel = FakeKernel::of(&host);
    let error = give(&host, &kernel, ONE, None).expect_err("not ours");
    assert!(matches!(error, DeviceError::NotOurs { .. }), "{error}");
    give(&host, &kernel, ONE, Some("nvme")).expect("given back");
    assert_eq!(host.standing(ONE), standing(Some("nvme"), None));
    assert_eq!(host.records().addresses().expect("read"), []);
}

#[test]
fn after_a_reboot_a_record_is_forgotten_and_a_new_taking_recorded_anew() {
    let host = single();
    let kernel = FakeKernel::of(&host);
    take(&host, &kernel, &wish(&[ONE])).expect("taken");
    let record = std::fs::read(host.records().path_of(at(ONE))).expect("a record");
    give(&host, &kernel, ONE, None).expect("what the reboot does");
    std::fs::write(host.records().path_of(at(ONE)), &record).expect("the record stayed");
    host.reboot();
    assert_eq!(give(&host, &kernel, ONE, None).expect("forgotten").result, Return::Forgotten);
    assert_eq!(host.records().addresses().expect("read"), []);

    std::fs::write(host.records().path_of(at(ONE)), &record).expect("the record stayed");
    take(&host, &kernel, &wish(&[ONE])).expect("taken in this boot");
    assert_eq!(host.records().load(at(ONE)).expect("read").expect("a record").boot_id, "boot-2");
    give(&host, &kernel, ONE, None).expect("given back");
    assert_eq!(host.standing(ONE), standing(Some("nvme"), None));
}

#[test]
fn a_controller_that_was_pulled_out_is_forgotten_and_another_in_its_place_not_touched() {
    let host = single();
    let kernel = FakeKernel::of(&host);
    take(&host, &kernel, &wish(&[ONE])).expect("taken");
    host.file(format!("sys/devices/pci0000:00/{ONE}/device"), "0x0011\n");
    let error = give(&host, &kernel, ONE, None).expect_err("another device");
    assert!(matches!(error, DeviceError::Replaced { .. }), "{error}");
    host.remove(format!("sys/bus/pci/devices/{ONE}"));
    assert_eq!(give(&host, &kernel, ONE, None).expect("forgotten").result, Return::Forgotten);
    let error = give(&host, &kernel, ONE, None).expect_err("nothing there");
    assert!(matches!(error, DeviceError::Sysfs(_)), "{error}");
}

#[test]
fn a_damaged_record_does_not_keep_a_controller_for_ever() {
    let host = single();
    let kernel = FakeKernel::of(&host);
    take(&host, &kernel, &wish(&[ONE])).expect("taken");
    std::fs::write(host.records().path_of(at(ONE)), b"{").expect("damaged");
    let error = give(&host, &kernel, ONE, None).expect_err("damaged");
    assert!(matches!(error, DeviceError::Record { .. }), "{error}");
    give(&host, &kernel, ONE, Some("nvme")).expect("given back");
    assert_eq!(host.standing(ONE), standing(Some("nvme"), None));
    assert_eq!(host.records().addresses().expect("read"), []);
}

#[test]
fn what_is_no_controller_is_said_to_be_none() {
    let host = FakeHost::new();
    host.function(ONE, 0x02_0000, Some(5), Some("e1000e"));
    let kernel = FakeKernel::of(&host);
    let errors = take(&host, &kernel, &wish(&[ONE, TWO])).expect_err("neither");
    assert!(matches!(errors[0], DeviceError::NotNvme { class: 0x02_0000, .. }), "{}", errors[0]);
    assert!(matches!(errors[1], DeviceError::Sysfs(_)), "{}", errors[1]);
}

/// A controller that was with `driver`, with `only` as its override, before anything was done.
fn host_with(driver: Option<&str>, only: Option<&str>) -> FakeHost {
    let host = FakeHost::new();
    host.driver("pci-stub");
    match driver {
        Some("nvme") => {
            host.controller(ONE, 5, "nvme0", 0);
            host.namespace(ONE, "nvme0", "nvme0n1", "259:0");
        }
        other => host.function(ONE, 0x01_0802, Some(5), other),
    }
    if let Some(only) = only {
        host.file(format!("sys/devices/pci0000:00/{ONE}/driver_override"), only);
    }
    host
}

/// Every kill is simulated by a kernel whose steps all fail from some point on, clean-up by the dying process
/// included. The number of steps of a whole walk is at most this.
const STEPS: usize = 6;

fn befores() -> impl Strategy<Value = (Option<&'static str>, Option<&'static str>)> {
    proptest::sample::select(vec![
        (Some("nvme"), None),
        (Some("nvme"), Some("nvme")),
        (Some("nvme"), Some("vfio-pci")),
        (Some("pci-stub"), Some("pci-stub")),
        (None, None),
        (None, Some("none")),
        (None, Some("vfio-pci")),
    ])
}

#[derive(Clone, Copy, Debug)]
enum Try {
    Bind(usize),
    Unbind(usize),
}

fn tries() -> impl Strategy<Value = Vec<Try>> {
    let one = (any::<bool>(), 0..STEPS).prop_map(
        |(bind, steps)| {
            if bind { Try::Bind(steps) } else { Try::Unbind(steps) }
        },
    );
    proptest::collection::vec(one, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// However often binding and unbinding are cut short, and wherever: one unbind that is not cut short leaves the
    /// controller as it was before all of it, and no record.
    #[test]
    fn a_crash_at_any_step_is_undone_by_unbind(before in befores(), tries in tries()) {
        let host = host_with(before.0, before.1);
        prop_assert_eq!(host.standing(ONE), standing(before.0, before.1));
        for one in tries {
            // Killed or not, the next one starts from what is on the disk and in sysfs.
            match one {
                Try::Bind(steps) => {
                    let _ = take(&host, &FakeKernel::dying_after(&host, steps), &wish(&[ONE]));
                }
                Try::Unbind(steps) => {
                    let _ = give(&host, &FakeKernel::dying_after(&host, steps), ONE, None);
                }
            }
        }
        give(&host, &FakeKernel::of(&host), ONE, None).expect("given back");
        prop_assert_eq!(host.standing(ONE), standing(before.0, before.1));
        prop_assert_eq!(host.records().addresses().expect("read"), []);
    }
}

#[test]
fn a_crash_at_each_step_of_bind_is_completed_by_bind_or_undone_by_unbind() {
    for steps in 0..STEPS {
        for complete in [true, false] {
            let host = single();
            let done = take(&host, &FakeKernel::dying_after(&host, steps), &wish(&[ONE])).is_ok();
            assert_eq!(done, steps >= 3, "three steps make a taking");
            if complete {
                take(&host, &FakeKernel::of(&host), &wish(&[ONE])).expect("completed");
                assert_eq!(host.standing(ONE), standing(Some("vfio-pci"), Some("vfio-pci")));
            }
            let given = give(&host, &FakeKernel::of(&host), ONE, None).expect("given back");
            assert_eq!(host.standing(ONE), standing(Some("nvme"), None), "after {steps} steps");
            assert_eq!(given.namespaces, ["nvme0n1"]);
        }
    }
}
