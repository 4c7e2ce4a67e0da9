//! How a function is opened: the calls in their order, and what can be wrong with a host.

use std::io;
use std::path::Path;

use super::*;
use crate::vfio::kernel::Kernel as _;

// ---- the order of the calls -------------------------------------------------------------------------------

/// After the address space is opened, all ways do the same.
const COMMON: [&str; 4] = ["DEVICE_GET_INFO", "GET_REGION_INFO", "GET_REGION_INFO", "GET_IRQ_INFO"];

#[test]
fn a_group_is_opened_in_the_kernels_order() {
    let (function, kernel) = opened(Way::Group);
    let calls = kernel.state().calls.clone();
    let expected = [
        "open container",
        "GET_API_VERSION",
        "CHECK_EXTENSION",
        "open group",
        "GROUP_GET_STATUS",
        "SET_CONTAINER",
        "SET_IOMMU",
        "GET_DEVICE_FD",
    ];
    assert_eq!(calls[..8], expected);
    assert_eq!(calls[8..11], COMMON[..3]);
    assert_eq!(calls[11..13], ["IOMMU_GET_INFO", "GET_IRQ_INFO"], "the ranges, once a group is in");
    assert!(kernel.state().device.command & MASTER != 0);
    drop(function);
    assert_eq!(kernel.state().closed, ["device", "group", "container"]);
}

#[test]
fn a_device_file_is_opened_in_the_kernels_order() {
    let (function, kernel) = opened(Way::DeviceFile);
    let calls = kernel.state().calls.clone();
    let expected = ["open iommufd", "open device", "BIND_IOMMUFD", "IOAS_ALLOC", "ATTACH_IOMMUFD_PT"];
    assert_eq!(calls[..5], expected);
    assert_eq!(calls[5..8], COMMON[..3]);
    assert_eq!(calls[8], "IOAS_IOVA_RANGES", "after the device has narrowed them");
    drop(function);
    assert_eq!(kernel.state().closed, ["device", "iommufd"]);
}

#[test]
fn without_an_iommu_the_group_is_opened_and_nothing_is_mapped() {
    let (function, kernel) = opened(Way::NoIommu);
    let calls = kernel.state().calls.clone();
    assert_eq!(
        calls[3..8],
        ["open group", "GROUP_GET_STATUS", "SET_CONTAINER", "SET_IOMMU", "GET_DEVICE_FD"]
    );
    assert!(!calls.contains(&"IOMMU_GET_INFO"), "that kind of IOMMU does not know the call");
    drop(function);
    assert_eq!(kernel.state().closed, ["device", "group", "container"]);
}

#[test]
fn whichever_call_fails_all_is_undone_and_the_error_says_what() {
    for way in WAYS {
        let (_function, whole) = opened(way);
        let calls = whole.state().calls.clone();
        for (at, call) in calls.iter().enumerate() {
            let (tree, kernel) = host(way);
            kernel.state().fail_at = Some((at, libc::EIO));
            let result = open_by(way, &tree, &kernel);
            match &result {
                // Interrupts can be done without.
                Ok(_) => {
                    assert!(matches!(*call, "GET_IRQ_INFO" | "SET_IRQS"), "{way:?}: {call} did not count")
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("0000:03:00.0") && text.ends_with("failed"), "{call}: {text}");
                    assert!(std::error::Error::source(error).is_some(), "{call}: the errno is kept");
                }
            }
            drop(result);
            assert_eq!(kernel.state().left(), [""; 0], "{way:?}, {call} failed");
        }
    }
}

#[test]
fn the_test_kernel_refuses_calls_that_come_too_early() {
    let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    let kernel = FakeKernel::new();
    let container = kernel.open(Path::new("/dev/vfio/vfio")).unwrap();
    assert_eq!(errno(kernel.set_iommu(&container, 3)), libc::EINVAL, "no group yet");
    assert_eq!(errno(kernel.map_dma(&container, &region(2), 1 << 21)), libc::EINVAL, "no IOMMU yet");
    let group = kernel.open(Path::new("/dev/vfio/12")).unwrap();
    assert_eq!(errno(kernel.open(Path::new("/dev/vfio/12")).map(drop)), libc::EBUSY, "open once");
    assert_eq!(errno(kernel.device(&group, "0000:03:00.0").map(drop)), libc::EINVAL, "no container yet");
    kernel.set_container(&group, &container).unwrap();
    assert_eq!(errno(kernel.set_container(&group, &container)), libc::EINVAL, "in one already");
    assert_eq!(errno(kernel.device(&group, "0000:03:00.0").map(drop)), libc::EINVAL, "no IOMMU yet");
    assert_eq!(errno(kernel.set_iommu(&container, 8)), libc::ENODEV, "another kind");
    kernel.set_iommu(&container, 3).unwrap();
    assert_eq!(errno(kernel.set_iommu(&container, 3)), libc::EINVAL, "has one already");
    let device = kernel.device(&group, "0000:03:00.0").unwrap();
    drop((container, group));
    assert!(kernel.device_info(&device).is_ok(), "a device keeps what it needs");

    let iommufd = kernel.open(Path::new("/dev/iommu")).unwrap();
    let file = kernel.open(Path::new("/dev/vfio/devices/vfio3")).unwrap();
    assert_eq!(errno(kernel.device_info(&file).map(drop)), libc::EINVAL, "not bound yet");
    assert_eq!(errno(kernel.bind_iommufd(&file, &iommufd)), libc::EBUSY, "open through the group");
    drop(device);
    assert_eq!(errno(kernel.bind_iommufd(&file, &file)), libc::EBADFD, "that is no iommufd");
    kernel.bind_iommufd(&file, &iommufd).unwrap();
    assert_eq!(errno(kernel.bind_iommufd(&file, &iommufd)), libc::EINVAL, "bound already");
    assert_eq!(errno(kernel.attach_ioas(&file, 2)), libc::ENOENT, "no such address space");
    let ioas = kernel.ioas_alloc(&iommufd).unwrap();
    assert_eq!(kernel.ioas_ranges(&iommufd, ioas).unwrap(), [IovaRange { start: 0, last: u64::MAX }]);
    kernel.attach_ioas(&file, ioas).unwrap();
    assert_eq!(kernel.ioas_ranges(&iommufd, ioas).unwrap().len(), 2, "narrowed by the device");
}

// ---- what can be wrong with a host ------------------------------------------------------------------------

fn refusal(way: Way, change: impl FnOnce(&Tree, &FakeKernel)) -> OpenError {
    let (tree, kernel) = host(way);
    change(&tree, &kernel);
    let error = open_by(way, &tree, &kernel).unwrap_err();
    assert_eq!(kernel.state().left(), [""; 0]);
    error
}

fn failing(call: &'static str, errno: i32) -> impl FnOnce(&Tree, &FakeKernel) {
    move |_, kernel| _ = kernel.state().failing.insert(call, errno)
}

#[test]
fn a_function_that_is_not_given_to_user_space_is_refused() {
    let other = |driver: Option<&str>, class| {
        let tree = Tree::new();
        let function = tree.function("0000:03:00.0", class).group(12);
        driver.map(|driver| function.driver(driver));
        open(FakeKernel::new(), address(), &VfioOptions { sysfs: tree.sysfs(), ..Default::default() })
    };
    let error = other(Some("nvme"), 0x01_0802).unwrap_err();
    assert!(
        matches!(&error, OpenError::NotBound { driver: Some(driver), .. } if driver == "nvme"),
        "{error}"
    );
    assert!(
        error.to_string().contains("its driver: nvme") && error.to_string().contains("bind it to vfio-pci")
    );
    assert!(matches!(other(None, 0x01_0802).unwrap_err(), OpenError::NotBound { driver: None, .. }));
    let error = other(Some("vfio-pci"), 0x02_0000).unwrap_err();
    assert!(matches!(error, OpenError::NotNvme { class: 0x02_0000, .. }), "{error}");
    let empty = VfioOptions { sysfs: Tree::new().sysfs(), ..Default::default() };
    assert!(matches!(open(FakeKernel::new(), address(), &empty), Err(OpenError::Sysfs { .. })));
}

#[test]
fn a_group_that_is_not_viable_names_who_is_in_the_way() {
    let neighbour = |tree: &Tree, kernel: &FakeKernel| {
        tree.function("0000:03:00.1", 0x02_0000).driver("e1000e").group(12);
        kernel.state().host.viable = false;
    };
    for way in [Way::Group, Way::DeviceFile] {
        let error = refusal(way, neighbour);
        assert!(matches!(&error, OpenError::GroupNotViable { group: 12, members } if members.len() == 1));
        assert!(error.to_string().contains("0000:03:00.1 (e1000e) must be bound to vfio-pci"), "{error}");
    }
    let error = refusal(Way::Group, failing("SET_CONTAINER", libc::EBUSY));
    assert!(matches!(error, OpenError::GroupNotViable { .. }), "taken between two calls: {error}");
}

#[test]
fn a_file_that_cannot_be_opened_says_which_and_why() {
    let calls = [
        (Way::Group, "open container", "/dev/vfio/vfio"),
        (Way::Group, "open group", "/dev/vfio/12"),
        (Way::DeviceFile, "open iommufd", "/dev/iommu"),
        (Way::DeviceFile, "open device", "/dev/vfio/devices/vfio3"),
        (Way::NoIommu, "open group", "/dev/vfio/noiommu-12"),
    ];
    for (way, call, file) in calls {
        let error = refusal(way, failing(call, libc::EACCES));
        assert!(matches!(&error, OpenError::Permission { path } if path.to_str() == Some(file)), "{error}");
        let rawio = error.to_string().contains("CAP_SYS_RAWIO");
        assert_eq!(rawio, matches!(way, Way::NoIommu), "{error}");
        let error = refusal(way, failing(call, libc::ENOENT));
        assert!(matches!(&error, OpenError::Absent { path, .. } if path.to_str() == Some(file)), "{error}");
        let error = refusal(way, failing(call, libc::EBUSY));
        assert!(matches!(&error, OpenError::Busy { what } if what == file), "{error}");
    }
}

#[test]
fn what_the_kernel_lacks_is_named() {
    let error = refusal(Way::Group, |_, kernel| kernel.state().host.api_version = 1);
    assert!(error.to_string().contains("version 1"), "{error}");
    let error = refusal(Way::Group, |_, kernel| kernel.state().host.extensions.clear());
    assert!(error.to_string().contains("no IOMMU of type 1"), "{error}");
    let error = refusal(Way::NoIommu, |_, kernel| kernel.state().host.extensions.clear());
    assert!(error.to_string().contains("no no-IOMMU mode"), "{error}");
    let error = refusal(Way::Group, failing("SET_IOMMU", libc::EPERM));
    assert!(matches!(error, OpenError::NoInterruptRemapping { group: 12 }), "{error}");
    for call in ["BIND_IOMMUFD", "ATTACH_IOMMUFD_PT"] {
        let error = refusal(Way::DeviceFile, failing(call, libc::EPERM));
        assert!(matches!(error, OpenError::NoInterruptRemapping { group: 12 }), "{error}");
    }
    let error = refusal(Way::DeviceFile, failing("BIND_IOMMUFD", libc::EBUSY));
    assert!(matches!(error, OpenError::Busy { .. }), "nobody else is in the group: {error}");
    let error = refusal(Way::Group, failing("GET_DEVICE_FD", libc::EACCES));
    assert!(error.to_string().contains("virtual function"), "{error}");
}

#[test]
fn an_iommu_and_its_absence_are_not_mixed_up() {
    let (tree, kernel) = host(Way::NoIommu);
    for way in [Way::Group, Way::DeviceFile] {
        assert!(matches!(open_by(way, &tree, &kernel), Err(OpenError::NoIommu { .. })));
    }
    let (tree, kernel) = host(Way::Group);
    assert!(matches!(open_by(Way::NoIommu, &tree, &kernel), Err(OpenError::IommuPresent { .. })));
    let tree = Tree::new();
    tree.function("0000:03:00.0", 0x01_0802).driver("vfio-pci");
    let error = open_by(Way::Group, &tree, &kernel).unwrap_err();
    assert!(error.to_string().contains("intel_iommu=on"), "{error}");
    let error = open_by(Way::NoIommu, &tree, &kernel).unwrap_err();
    assert!(error.to_string().contains("enable_unsafe_noiommu_mode"), "{error}");
    assert_eq!(kernel.state().calls, [""; 0], "nothing was opened for any of this");
}

#[test]
fn the_best_way_is_the_device_file_and_the_group_when_that_may_not_be_opened() {
    let best = |tree: &Tree, kernel: &FakeKernel| {
        open(kernel.clone(), address(), &VfioOptions { sysfs: tree.sysfs(), ..Default::default() })
    };
    let (tree, kernel) = host(Way::DeviceFile);
    drop(best(&tree, &kernel).unwrap());
    assert!(!kernel.state().calls.contains(&"open group"));
    for errno in [libc::ENOENT, libc::EACCES] {
        for call in ["open iommufd", "open device"] {
            let (tree, kernel) = host(Way::DeviceFile);
            kernel.state().failing.insert(call, errno);
            drop(best(&tree, &kernel).unwrap());
            assert!(kernel.state().calls.contains(&"SET_IOMMU"), "{call}");
            assert_eq!(kernel.state().left(), [""; 0]);
        }
    }
    let (tree, kernel) = host(Way::DeviceFile);
    kernel.state().failing.insert("BIND_IOMMUFD", libc::EPERM);
    assert!(best(&tree, &kernel).is_err(), "an error that the group would have too");
    let (tree, kernel) = host(Way::Group);
    drop(best(&tree, &kernel).unwrap());
    assert!(!kernel.state().calls.contains(&"open iommufd"));
}

#[test]
fn a_device_is_had_by_one_opening_only() {
    for (way, name) in [(Way::Group, "/dev/vfio/12"), (Way::DeviceFile, "vfio3")] {
        let (tree, kernel) = host(way);
        let first = open_by(way, &tree, &kernel).unwrap();
        let error = open_by(way, &tree, &kernel).unwrap_err();
        assert!(matches!(&error, OpenError::Busy { what } if what == name), "{error}");
        assert!(kernel.state().device.command & MASTER != 0, "the first goes on");
        drop(first);
        assert!(open_by(way, &tree, &kernel).is_ok());
    }
}

// ---- a controller that was left running -------------------------------------------------------------------

/// A controller that its last user left enabled, on a kernel that cannot reset it.
fn left_running(way: Way) -> (Tree, FakeKernel) {
    let (tree, kernel) = host(way);
    kernel.state().host.can_reset = false;
    kernel.state().device.registers.insert(CC, 0x0046_0001);
    kernel.state().device.registers.insert(CSTS, 1);
    (tree, kernel)
}

#[test]
fn a_controller_left_running_reaches_no_memory_before_it_is_disabled() {
    let (tree, kernel) = left_running(Way::Group);
    let function = open_by(Way::Group, &tree, &kernel).unwrap();
    let mapping = function.dma_map(&region(2)).unwrap();
    assert!(!reaches(&kernel, &mapping), "its old queues might have these very addresses");
    function.write32(CC, 0);
    kernel.state().device.registers.insert(CSTS, 0);
    function.dma_restore().unwrap();
    assert!(reaches(&kernel, &mapping));
}

#[test]
fn without_an_iommu_a_controller_left_running_is_refused() {
    let (tree, kernel) = left_running(Way::NoIommu);
    let error = open_by(Way::NoIommu, &tree, &kernel).unwrap_err();
    assert!(matches!(error, OpenError::StillEnabled { .. }), "{error}");
    assert_eq!(kernel.state().left(), [""; 0]);
    kernel.state().host.can_reset = true;
    assert!(open_by(Way::NoIommu, &tree, &kernel).is_ok(), "a reset stops it");
}

#[test]
fn a_device_that_is_gone_is_not_opened() {
    for way in WAYS {
        let error = refusal(way, |_, kernel| kernel.state().device.gone = true);
        let said = matches!(error, OpenError::Gone { .. } | OpenError::Kernel { .. });
        assert!(said, "{way:?}: {error}");
    }
}
