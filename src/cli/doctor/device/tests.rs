//! Goal: what keeps a controller from being driven is found, and the command that mends it is printed.
//! Method: hosts made of files, one fault each.

use super::*;
use crate::cli::device::fake::{FakeHost, at};
use crate::cli::doctor::Status;

const ONE: &str = "0000:00:10.0";
const MATE: &str = "0000:00:10.1";

fn checked(host: &FakeHost) -> Vec<Check> {
    let mut checks = Vec::new();
    check(&mut checks, &host.host(), &host.path("state"));
    for check in &checks {
        let needs_remedy = matches!(check.status, Status::Fail | Status::Warn);
        assert_eq!(check.remedy.is_some(), needs_remedy, "{check:?}");
    }
    checks
}

fn one<'a>(checks: &'a [Check], id: &str) -> &'a Check {
    let found: Vec<&Check> = checks.iter().filter(|check| check.id == id).collect();
    assert_eq!(found.len(), 1, "{id} in {checks:?}");
    found[0]
}

fn remedy(check: &Check) -> &str {
    check.remedy.as_deref().unwrap_or_default()
}

/// A controller that VFIO has, with its node.
fn taken_host() -> FakeHost {
    let host = FakeHost::new();
    host.function(ONE, 0x01_0802, Some(5), Some("vfio-pci"));
    host.file("dev/vfio/5", "");
    host
}

fn record(host: &FakeHost, boot_id: &str) {
    let text = serde_json::json!({"format": "fastice-device", "version": 1, "binding": {
        "address": ONE, "driver": "nvme", "driver_override": null, "vendor_id": 0x1B36, "device_id": 0x10,
        "name": "nvme0", "model": null, "serial": null, "firmware": null, "nsids": [1], "boot_id": boot_id,
        "taken_at_unix_s": 1,
    }});
    host.file(format!("state/devices/{ONE}.json"), &text.to_string());
    assert!(host.records().load(at(ONE)).expect("a record").is_some());
}

#[test]
fn an_iommu_that_is_off_is_explained_by_processor_firmware_and_command_line() {
    let cases: [(&str, &str, Option<&str>, &str, &str); 7] = [
        ("GenuineIntel", "quiet", Some("DMAR"), "offers VT-d", "add intel_iommu=on in /etc/default/grub"),
        ("GenuineIntel", "quiet", None, "no DMAR table", "turn VT-d on in the firmware setup"),
        ("GenuineIntel", "intel_iommu=off", Some("DMAR"), "says intel_iommu=off", "take intel_iommu=off out"),
        ("AuthenticAMD", "quiet", None, "no IVRS table", "turn the IOMMU (AMD-Vi, SVM) on"),
        ("AuthenticAMD", "quiet", Some("IVRS"), "offers AMD-Vi", "dmesg"),
        ("AuthenticAMD", "a iommu=off b", Some("IVRS"), "says iommu=off", "take iommu=off out"),
        ("ARM", "quiet", None, "or this host has none", "SMMU"),
    ];
    for (vendor, command_line, table, detail, mends) in cases {
        let host = FakeHost::new();
        host.function(ONE, 0x01_0802, None, None);
        host.remove("sys/class/iommu/dmar0");
        host.file("proc/cpuinfo", &format!("vendor_id : {vendor}\n"));
        host.file("proc/cmdline", command_line);
        if let Some(table) = table {
            host.file(format!("sys/firmware/acpi/tables/{table}"), "x");
        }
        let checks = checked(&host);
        let check = one(&checks, "iommu");
        assert_eq!(check.status, Status::Warn);
        assert!(check.detail.contains(detail) && remedy(check).contains(mends), "{check:?}");
        host.remove(format!("sys/bus/pci/devices/{ONE}"));
        assert_eq!(one(&checked(&host), "iommu").status, Status::Info, "nothing needs it");
    }
}

#[test]
fn an_iommu_that_is_on_is_named_and_the_mode_without_warned_of() {
    let host = FakeHost::new();
    let checks = checked(&host);
    assert_eq!(one(&checks, "iommu").detail, "on (dmar0)");
    assert!(!checks.iter().any(|check| check.id == "no-iommu"));
    host.file(NO_IOMMU_MODE, "Y\n");
    let checks = checked(&host);
    assert_eq!(one(&checks, "no-iommu").status, Status::Warn);
    assert!(remedy(one(&checks, "no-iommu")).contains("echo N > /sys/module/vfio/"));
}

#[test]
fn vfio_is_there_or_can_be_loaded_or_is_missing() {
    let host = FakeHost::new();
    let below = host.host();
    assert_eq!(vfio(&below, true, Some(false)).status, Status::Ok);
    host.remove("sys/bus/pci/drivers/vfio-pci");
    assert_eq!(vfio(&below, true, Some(true)).status, Status::Ok);
    assert_eq!(vfio(&below, true, Some(false)).status, Status::Warn);
    assert_eq!(vfio(&below, false, Some(false)).status, Status::Info);
    assert_eq!(vfio(&below, true, None).status, Status::Unknown);
}

#[test]
fn a_group_that_is_not_viable_names_its_members_and_the_commands() {
    let host = taken_host();
    assert_eq!(one(&checked(&host), "vfio-group").detail, format!("{ONE}: group 5 is viable"));
    host.function(MATE, 0x02_0000, Some(5), Some("e1000e"));
    let checks = checked(&host);
    let check = one(&checks, "vfio-group");
    assert_eq!(check.status, Status::Fail);
    assert!(check.detail.contains("0000:00:10.1 (driver e1000e)"), "{check:?}");
    assert!(remedy(check).starts_with(&format!("echo {MATE} > /sys/bus/pci/devices/{MATE}/driver/unbind")));
    host.remove(format!("sys/devices/pci0000:00/{MATE}/driver"));
    host.link(format!("sys/devices/pci0000:00/{MATE}/driver"), "../drivers/nvme");
    assert!(remedy(one(&checked(&host), "vfio-group")).starts_with(&format!("fastice device bind {MATE}")));
}

#[test]
fn permission_goes_by_the_mode_of_the_node() {
    let user = User { uid: 1000, groups: vec![100, 4] };
    assert!(user.may_use(1000, 0, 0o600) && user.may_use(0, 4, 0o660) && user.may_use(0, 0, 0o666));
    assert!(!user.may_use(0, 0, 0o660) && !user.may_use(1000, 100, 0o466) && !user.may_use(0, 100, 0o606));
    assert!(User { uid: 0, groups: Vec::new() }.may_use(1000, 1000, 0));

    let host = taken_host();
    let inventory = Inventory::read(&host.host(), &host.records()).expect("a host");
    let denied = User { uid: 12_345_678, groups: Vec::new() };
    let check = permission(&host.host(), &inventory.controllers[0].function, &denied).expect("a check");
    assert_eq!(check.status, Status::Fail);
    assert!(remedy(&check).starts_with("as root: chown 12345678 /dev/vfio/5 "), "{check:?}");
    host.remove("dev/vfio/5");
    let check = permission(&host.host(), &inventory.controllers[0].function, &denied).expect("a check");
    assert_eq!(check.detail, "/dev/vfio/5 is not there");
}

#[test]
fn a_device_file_with_an_iommufd_is_as_good_as_the_group() {
    let host = taken_host();
    host.remove("dev/vfio/5");
    host.file(format!("sys/devices/pci0000:00/{ONE}/vfio-dev/vfio3/dev"), "511:3\n");
    host.file("dev/vfio/devices/vfio3", "");
    let root = User { uid: 0, groups: Vec::new() };
    let access = || {
        let inventory = Inventory::read(&host.host(), &host.records()).expect("a host");
        permission(&host.host(), &inventory.controllers[0].function, &root).expect("a check")
    };
    assert_eq!(access().detail, "/dev/vfio/5 is not there", "a device file alone does not do");
    host.file("dev/iommu", "");
    let check = access();
    assert_eq!(
        (check.status, check.detail.contains("/dev/vfio/devices/vfio3")),
        (Status::Ok, true),
        "{check:?}"
    );
}

#[test]
fn a_taken_controller_is_driven_or_waits() {
    let host = taken_host();
    assert_eq!(one(&checked(&host), "taken").detail, "no controller is taken by fastice");
    record(&host, "boot-1");
    let checks = checked(&host);
    let check = one(&checks, "taken");
    assert_eq!(check.status, Status::Info);
    assert!(check.detail.ends_with(&format!("back: fastice device unbind {ONE}")), "{check:?}");
    host.process(31, "fastice", "/dev/vfio/5");
    let detail = format!("{ONE} is driven by process 31 (fastice) (driver before: nvme)");
    assert_eq!(one(&checked(&host), "taken").detail, detail);
}

#[test]
fn what_a_dead_run_left_is_found_with_the_command_that_mends_it() {
    let unbind = format!("fastice device unbind {ONE}");
    let left = |arrange: &dyn Fn(&FakeHost), detail: &str, mends: &str| {
        let host = FakeHost::new();
        arrange(&host);
        let checks = checked(&host);
        let check = one(&checks, "taken");
        assert_eq!((check.status, remedy(check)), (Status::Warn, mends), "{check:?}");
        assert!(check.detail.contains(detail), "{check:?}");
    };
    let function = |host: &FakeHost, driver: Option<&str>, only: &str| {
        host.function(ONE, 0x01_0802, Some(5), driver);
        host.file(format!("sys/devices/pci0000:00/{ONE}/driver_override"), only);
    };
    let half_way = |host: &FakeHost| {
        function(host, None, "vfio-pci");
        record(host, "boot-1");
    };
    left(&half_way, "was cut short (driver now: none, before: nvme)", &unbind);
    let earlier = |host: &FakeHost| {
        function(host, Some("nvme"), "(null)");
        record(host, "boot-0");
    };
    left(&earlier, "is of an earlier boot (driver now: nvme)", &unbind);
    left(&|host| record(host, "boot-1"), "is not there any more", &unbind);
    let by_name = format!("fastice device unbind --driver nvme {ONE}");
    left(&|host| function(host, None, "vfio-pci"), "nothing says why", &by_name);
    let damaged = |host: &FakeHost| {
        function(host, Some("vfio-pci"), "vfio-pci");
        host.file("dev/vfio/5", "");
        host.file(format!("state/devices/{ONE}.json"), "{");
    };
    left(&damaged, "is no record of a taken controller", &by_name);
}
