//! Goal: the verdict on each controller is right, for every way in which something can hang on it.
//! Method: trees of `/sys` and `/proc` with one arrangement each.

use super::*;
use crate::cli::device::fake::FakeHost;

const ONE: &str = "0000:00:10.0";
const TWO: &str = "0000:00:11.0";

fn listed(host: &FakeHost) -> Vec<Row> {
    rows(&host.host(), &host.records()).expect("a list")
}

fn messages(row: &Row) -> Vec<&str> {
    row.obstacles.iter().map(|obstacle| obstacle.message.as_str()).collect()
}

fn kinds(row: &Row) -> Vec<&str> {
    row.obstacles.iter().map(|obstacle| obstacle.kind).collect()
}

/// A controller with the namespace `nvme0n1` of its own, on a host without native multipath.
fn single() -> (FakeHost, String) {
    let host = FakeHost::new();
    host.controller(ONE, 5, "nvme0", 0);
    let disk = host.namespace(ONE, "nvme0", "nvme0n1", "259:0");
    (host, disk)
}

/// One subsystem, two controllers, one shared namespace `nvme0n1`.
fn dual() -> (FakeHost, String) {
    let host = FakeHost::new();
    host.controller(ONE, 5, "nvme0", 0);
    host.controller(TWO, 6, "nvme1", 0);
    let disk = host.shared(0, "259:0", &[(ONE, "nvme0"), (TWO, "nvme1")]);
    (host, disk)
}

#[test]
fn an_unused_controller_is_described_and_free() {
    let (host, _) = single();
    let rows = listed(&host);
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((row.address.as_str(), row.verdict), (ONE, Verdict::Free));
    assert_eq!((row.name.as_deref(), row.model.as_deref()), (Some("nvme0"), Some("Model One")));
    assert_eq!((row.serial.as_deref(), row.firmware.as_deref()), (Some("SERIAL1"), Some("1.0")));
    assert_eq!((row.iommu_group, row.numa_node, row.group_members.len()), (Some(5), Some(0), 0));
    let namespace = &row.namespaces[0];
    assert_eq!((namespace.name.as_str(), namespace.nsid), ("nvme0n1", Some(1)));
    assert_eq!((namespace.size_bytes, namespace.logical_block_bytes), (Some(1 << 30), Some(512)));
    assert_eq!(namespace.nguid.as_deref(), Some("0000000000000000fa57000000000001"));
    assert_eq!(namespace.eui64, None, "zeros are no identifier");
    let text = text(row).join("\n");
    assert!(text.contains("serial SERIAL1") && text.contains("1 GiB  512 B blocks"), "{text}");
    assert!(text.contains("can be taken"), "{text}");
}

#[test]
fn the_only_controller_under_the_root_filesystem_is_not_free() {
    let (host, disk) = single();
    host.partition(&disk, "nvme0n1p2", "259:2");
    host.mount("259:2", "/", "ext4", "/dev/nvme0n1p2");
    let rows = listed(&host);
    assert_eq!((rows[0].verdict, kinds(&rows[0])), (Verdict::InUse, vec!["last-path"]));
    let expected = "nvme0n1p2 is mounted on / (ext4), and no other live path leads to nvme0n1";
    assert_eq!(messages(&rows[0]), [expected]);
    assert!(rows[0].obstacles[0].remedy.starts_with("umount /;"), "{}", rows[0].obstacles[0].remedy);
}

#[test]
fn every_kind_of_use_is_found() {
    type Arrange = fn(&FakeHost, &str);
    let cases: [(&str, Arrange); 11] = [
        ("nvme0n1p1 is swap space", |host, _| {
            host.file("proc/swaps", "Filename Type Size\n/dev/nvme0n1p1 partition 1 0 -2\n");
        }),
        ("dm-0 (vg-root) stands on nvme0n1p1", |host, disk| {
            host.file(format!("{disk}/nvme0n1p1/holders/dm-0"), "");
            host.file("sys/block/dm-0/dm/name", "vg-root\n");
        }),
        ("dm-1 is mounted on /deep (xfs)", |host, disk| {
            host.file(format!("{disk}/nvme0n1p1/holders/dm-0"), "");
            host.file("sys/block/dm-0/holders/dm-1", "");
            host.file("sys/block/dm-1/dev", "253:1\n");
            host.mount("253:1", "/deep", "xfs", "/dev/mapper/deep");
        }),
        ("md0 stands on nvme0n1", |host, disk| host.file(format!("{disk}/holders/md0"), "")),
        ("the loop device loop3 stands on nvme0n1", |host, _| {
            host.file("sys/block/loop3/loop/backing_file", "/dev/nvme0n1\n");
        }),
        ("nvme0n1 is exported by the kernel as nqn.a", |host, _| {
            let place = "sys/kernel/config/nvmet/subsystems/nqn.a/namespaces/1";
            host.file(format!("{place}/device_path"), "/dev/disk/by-id/nvme-a\n");
            host.file(format!("{place}/enable"), "1\n");
            let node = host.path("dev/nvme0n1");
            host.link("dev/disk/by-id/nvme-a", node.to_str().expect("UTF-8"));
        }),
        ("nvme0n1 is open in process 77 (fio)", |host, _| host.process(77, "fio", "/dev/nvme0n1")),
        ("ng0n1 is open in process 78 (spdk)", |host, _| host.process(78, "spdk", "/dev/ng0n1")),
        ("nvme0n1p1 is a member of the mounted btrfs 12-34", |host, _| {
            host.file("sys/fs/btrfs/12-34/devices/nvme0n1p1", "");
        }),
        ("nvme0n1p1 is mounted on /pool (btrfs)", |host, _| {
            host.mount("0:45", "/pool", "btrfs", "/dev/nvme0n1p1");
        }),
        ("nvme0n1p1 is mounted on /c (xfs, in the mount namespace of process 99)", |host, _| {
            host.link("proc/99/ns/mnt", "mnt:[2]");
            host.file("proc/99/mountinfo", "1 0 259:1 / /c rw - xfs /dev/nvme0n1p1 rw\n");
        }),
    ];
    for (expected, arrange) in cases {
        let (host, disk) = single();
        host.partition(&disk, "nvme0n1p1", "259:1");
        arrange(&host, &disk);
        let rows = listed(&host);
        assert_eq!(rows[0].verdict, Verdict::InUse, "{expected}");
        assert!(messages(&rows[0]).iter().any(|text| text.starts_with(expected)), "{expected}: {rows:?}");
        assert!(rows[0].obstacles.iter().all(|obstacle| !obstacle.remedy.is_empty()));
    }
}

#[test]
fn what_looks_like_a_use_of_another_device_is_none() {
    let (host, _) = single();
    host.mount("259:7", "/other", "xfs", "/dev/nvme0n11");
    host.mount("0:50", "/nfs", "nfs4", "server:/dev/nvme0n1");
    host.process(5, "cat", "/srv/dev/nvme0n1");
    host.file("sys/block/loop0/loop/backing_file", "/srv/nvme0n1\n");
    assert_eq!(listed(&host)[0].verdict, Verdict::Free);
}

#[test]
fn with_two_controllers_a_mounted_namespace_frees_both_one_at_a_time() {
    let (host, disk) = dual();
    host.partition(&disk, "nvme0n1p1", "259:1");
    host.mount("259:1", "/srv", "xfs", "/dev/nvme0n1p1");
    for row in listed(&host) {
        assert_eq!(row.verdict, Verdict::Free, "{row:?}");
        let paths: Vec<&str> = row.namespaces[0].paths.iter().map(|path| path.controller.as_str()).collect();
        assert_eq!((row.namespaces[0].name.as_str(), paths), ("nvme0n1", vec!["nvme0", "nvme1"]));
        assert_eq!(row.namespaces[0].uses.len(), 1);
    }
}

#[test]
fn a_second_path_that_is_not_live_does_not_count() {
    let (host, _) = dual();
    host.mount("259:0", "/srv", "xfs", "/dev/nvme0n1");
    host.file(format!("sys/devices/pci0000:00/{TWO}/nvme/nvme1/state"), "connecting\n");
    let rows = listed(&host);
    assert_eq!((rows[0].verdict, rows[1].verdict), (Verdict::InUse, Verdict::Free));
    host.file(format!("sys/devices/pci0000:00/{TWO}/nvme/nvme1/state"), "live\n");
    host.file(format!("sys/devices/pci0000:00/{TWO}/nvme/nvme1/nvme0c1n1/ana_state"), "inaccessible\n");
    assert_eq!(listed(&host)[0].verdict, Verdict::InUse);
}

#[test]
fn without_native_multipath_only_the_controller_with_the_mount_is_held() {
    let host = FakeHost::new();
    host.controller(ONE, 5, "nvme0", 0);
    host.controller(TWO, 6, "nvme1", 0);
    host.namespace(ONE, "nvme0", "nvme0n1", "259:0");
    host.namespace(TWO, "nvme1", "nvme1n1", "259:1");
    host.mount("259:0", "/srv", "xfs", "/dev/nvme0n1");
    let rows = listed(&host);
    assert_eq!((rows[0].verdict, rows[1].verdict), (Verdict::InUse, Verdict::Free));
}

#[test]
fn an_open_controller_node_is_in_the_way_whatever_paths_there_are() {
    let (host, _) = dual();
    host.process(42, "nvme", "/dev/nvme1");
    let rows = listed(&host);
    assert_eq!((rows[0].verdict, kinds(&rows[1])), (Verdict::Free, vec!["controller-open"]));
}

#[test]
fn a_group_with_a_foreign_mate_is_not_viable_and_the_mate_is_named() {
    let (host, _) = single();
    host.function("0000:00:10.1", 0x02_0000, Some(5), Some("e1000e"));
    host.function("0000:00:01.0", 0x06_0400, Some(5), Some("pcieport"));
    host.function("0000:00:10.2", 0x0c_0330, Some(5), None);
    let rows = listed(&host);
    assert_eq!(kinds(&rows[0]), ["group-not-viable"]);
    let text = messages(&rows[0])[0];
    assert!(text.ends_with("the kernel's drivers have 0000:00:10.1 (driver e1000e)"), "{text}");
    assert_eq!(rows[0].group_members.len(), 3);
}

#[test]
fn without_an_iommu_nothing_is_free() {
    let host = FakeHost::new();
    host.function(ONE, 0x01_0802, None, None);
    assert_eq!(kinds(&listed(&host)[0]), ["no-iommu"]);
    host.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
    let rows = listed(&host);
    assert!(rows[0].obstacles[0].remedy.contains("--no-iommu"), "{rows:?}");
}

#[test]
fn a_virtual_function_is_told_from_its_physical_one_which_it_holds() {
    let (host, _) = single();
    host.controller(TWO, 6, "nvme1", 0);
    let link = host.path(format!("sys/devices/pci0000:00/{ONE}"));
    host.link(format!("sys/devices/pci0000:00/{TWO}/physfn"), link.to_str().expect("UTF-8"));
    let link = host.path(format!("sys/devices/pci0000:00/{TWO}"));
    host.link(format!("sys/devices/pci0000:00/{ONE}/virtfn0"), link.to_str().expect("UTF-8"));
    let rows = listed(&host);
    assert_eq!(kinds(&rows[0]), ["virtual-functions"]);
    assert_eq!(rows[0].virtual_functions[0].address, TWO);
    assert_eq!((rows[1].verdict, rows[1].physical_function.as_deref()), (Verdict::Free, Some(ONE)));
}

#[test]
fn a_controller_with_vfio_names_its_users_and_a_foreign_driver_is_refused() {
    let host = FakeHost::new();
    host.function(ONE, 0x01_0802, Some(9), Some("vfio-pci"));
    host.process(66, "fastice", "/dev/vfio/9");
    host.driver("uio_pci_generic");
    host.function(TWO, 0x01_0802, Some(10), Some("uio_pci_generic"));
    let rows = listed(&host);
    assert_eq!((rows[0].verdict, rows[0].users[0].pid), (Verdict::Taken, 66));
    assert!(rows[0].taken.is_none() && rows[0].obstacles.is_empty());
    assert!(text(&rows[0]).iter().any(|line| line.contains("not by fastice; used by process 66 (fastice)")));
    assert_eq!(kinds(&rows[1]), ["foreign-driver"]);
}

#[test]
fn the_document_has_a_stable_shape() {
    let (host, _) = single();
    let rows = serde_json::to_value(listed(&host)).expect("serializable");
    let keys: Vec<&String> = rows[0].as_object().expect("an object").keys().collect();
    let expected = [
        "address",
        "device_id",
        "driver",
        "driver_override",
        "firmware",
        "group_members",
        "iommu_group",
        "model",
        "name",
        "namespaces",
        "numa_node",
        "obstacles",
        "physical_function",
        "serial",
        "state",
        "subsystem_nqn",
        "taken",
        "users",
        "uses",
        "vendor_id",
        "verdict",
        "virtual_functions",
    ];
    assert_eq!(keys, expected);
    assert_eq!(rows[0]["verdict"], "free");
    assert_eq!(rows[0]["namespaces"][0]["paths"][0]["state"], "live");
}
