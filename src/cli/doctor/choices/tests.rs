//! Goal: what keeps a controller of `[[nvme]]` from being opened is found before `fastice serve` finds it.
//! Method: hosts made of files, one fault each; sockets and images in a directory.

use std::os::unix::net::UnixListener;

use super::*;
use crate::cli::device::fake::FakeHost;
use crate::config::HostFacts;

const ONE: &str = "0000:00:10.0";
const MATE: &str = "0000:00:10.1";
const CLASS_NVME: u32 = 0x01_0802;

/// A configuration with one `[[nvme]]`, whose only namespace is reached by `device`.
fn config(nvme: &str, device: &str) -> Config {
    let text = format!(
        "[[listener]]\naddress = \"127.0.0.1:0\"\n[[nvme]]\n{nvme}\n\
         [[subsystem]]\nnqn = \"nqn.2026-11.test:one\"\nallow_any_host = true\n\
         [[subsystem.namespace]]\nfile = \"/srv/one\"\n{device}\n"
    );
    Config::parse_for(&text, "test", &HostFacts { allowed_cores: vec![0] }).expect("a good configuration")
}

fn checked(host: &FakeHost, nvme: &str) -> Vec<Check> {
    let mut checks = Vec::new();
    check(&mut checks, &host.host(), &config(nvme, "device = \"nvme\""));
    for check in &checks {
        let needs_remedy = matches!(check.status, Status::Fail | Status::Warn);
        assert_eq!(check.remedy.is_some(), needs_remedy, "{check:?}");
    }
    checks
}

#[track_caller]
fn assert_one(checks: &[Check], status: Status, detail: &str, remedy: &str) {
    let [check] = checks else { panic!("{checks:?}") };
    assert_eq!((check.id, check.status), (ID, status), "{check:?}");
    assert!(check.detail.contains(detail), "{check:?}");
    assert!(check.remedy.as_deref().unwrap_or_default().contains(remedy), "{check:?}");
}

fn pci_key() -> String {
    format!("pci = \"{ONE}\"")
}

fn pci_key_without_iommu() -> String {
    format!("{}\nunsafe_no_iommu = true", pci_key())
}

#[test]
fn a_controller_that_is_not_there_or_is_none_is_found() {
    let host = FakeHost::new();
    assert_one(&checked(&host, &pci_key()), Status::Fail, "is not there", "fastice device list");
    host.function(ONE, 0x02_0000, Some(5), Some("vfio-pci"));
    assert_one(&checked(&host, &pci_key()), Status::Fail, "its class is 0x020000", "fastice device list");
}

#[test]
fn a_controller_of_the_kernel_is_to_be_bound() {
    for driver in [Some("nvme"), None] {
        let host = FakeHost::new();
        host.function(ONE, CLASS_NVME, Some(5), driver);
        let told = format!("(its driver: {})", driver.unwrap_or("none"));
        assert_one(&checked(&host, &pci_key()), Status::Fail, &told, &format!("fastice device bind {ONE}"));
    }
}

#[test]
fn a_controller_with_vfio_is_good_and_its_group_is_looked_at_elsewhere() {
    let host = FakeHost::new();
    host.function(ONE, CLASS_NVME, Some(5), Some("vfio-pci"));
    assert_one(&checked(&host, &pci_key()), Status::Ok, "is with VFIO", "");
}

#[test]
fn a_group_that_would_not_be_viable_is_told_before_the_binding() {
    let host = FakeHost::new();
    host.function(ONE, CLASS_NVME, Some(5), Some("nvme"));
    host.function(MATE, CLASS_NVME, Some(5), Some("nvme"));
    let checks = checked(&host, &pci_key());
    assert_one(&checks[..1], Status::Fail, "not given to user space", "fastice device bind");
    assert_eq!((checks[1].id, checks[1].status), ("vfio-group", Status::Fail));
    let remedy = checks[1].remedy.as_deref().unwrap_or_default();
    assert!(remedy.starts_with(&format!("fastice device bind {MATE}")), "{checks:?}");
}

#[test]
fn an_iommu_must_be_as_the_configuration_says() {
    let host = FakeHost::new();
    host.function(ONE, CLASS_NVME, None, Some("vfio-pci"));
    assert_one(&checked(&host, &pci_key()), Status::Fail, "no IOMMU stands before", "`iommu`");
    let remedy = format!("fastice device bind --no-iommu {ONE}");
    assert_one(&checked(&host, &pci_key_without_iommu()), Status::Fail, "before its no-IOMMU mode", &remedy);

    let host = FakeHost::new();
    host.function(ONE, CLASS_NVME, Some(0), Some("vfio-pci"));
    assert_one(&checked(&host, &pci_key_without_iommu()), Status::Fail, "the safe way", "unsafe_no_iommu");
    host.file("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");
    assert_one(&checked(&host, &pci_key_without_iommu()), Status::Ok, "is with VFIO", "");
    assert_one(&checked(&host, &pci_key()), Status::Fail, "no IOMMU stands before", "`iommu`");

    let host = FakeHost::new();
    host.function(ONE, CLASS_NVME, None, Some("nvme"));
    assert_one(&checked(&host, &pci_key_without_iommu()), Status::Fail, "not given to user space", &remedy);
}

#[test]
fn a_socket_and_an_image_must_be_there_and_be_what_they_should() {
    let host = FakeHost::new();
    let (socket, image) = (host.path("socket"), host.path("image"));
    let (by_socket, by_image) = (format!("vfio_user = {socket:?}"), format!("model = {image:?}"));
    assert_one(&checked(&host, &by_socket), Status::Fail, "is not there", "start the server");
    assert_one(&checked(&host, &by_image), Status::Fail, "is not there", "correct model");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    host.file("image", "x");
    assert_one(&checked(&host, &by_socket), Status::Ok, "there is a socket", "");
    assert_one(&checked(&host, &by_image), Status::Ok, "a model can stand on it", "");
    assert_one(&checked(&host, &format!("vfio_user = {image:?}")), Status::Fail, "is no socket", "vfio_user");
    assert_one(&checked(&host, &format!("model = {socket:?}")), Status::Fail, "no block device", "model");
}

#[test]
fn an_identity_without_a_place_needs_a_controller_to_ask() {
    let host = FakeHost::new();
    let by_serial = "serial = \"SERIAL1\"";
    assert_one(&checked(&host, by_serial), Status::Fail, "could be asked", "fastice device bind PCI");
    host.controller(ONE, 5, "nvme0", 0);
    assert_one(&checked(&host, by_serial), Status::Fail, "could be asked", &format!("device bind {ONE}"));
    assert_one(&checked(&host, "serial = \"S2\""), Status::Fail, "could be asked", "device bind PCI");
    host.function(MATE, CLASS_NVME, Some(6), Some("vfio-pci"));
    assert_one(&checked(&host, by_serial), Status::Ok, "asks the 1 controller(s)", "");
}

#[test]
fn who_may_not_open_it_is_told_what_does() {
    let check = denied(Path::new("/run/nvme.sock"));
    assert_one(&[check], Status::Fail, "may not open /run/nvme.sock", "chown");
}

#[test]
fn what_no_namespace_uses_is_a_warning() {
    let host = FakeHost::new();
    let mut checks = Vec::new();
    check(&mut checks, &host.host(), &config(&pci_key(), ""));
    assert_one(&checks, Status::Warn, "is not there", "fastice device list");
}

#[test]
fn only_uring_and_models_write_to_disks_of_the_kernel() {
    for (device, expected) in [
        ("", true),
        ("device = \"uring\"", true),
        ("device = \"uring\"\nread_only = true", false),
        ("device = \"nvme\"", false),
        ("device = \"handed-over\"", false),
    ] {
        assert_eq!(writes_kernel_disks(&config(&pci_key(), device)), expected, "{device}");
    }
    assert!(!writes_kernel_disks(&config("model = \"/dev/null\"", "device = \"nvme\"")), "no block device");
}
