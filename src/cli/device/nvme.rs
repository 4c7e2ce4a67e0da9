//! What the kernel's own NVMe driver shows of controllers, their namespaces, and the paths to them.
//!
//! ```text
//!   without native multipath            with it (nvme_core.multipath=Y)
//!
//!   PCI/nvme/nvme0/nvme0n1              /sys/class/nvme-subsystem/nvme-subsys0/nvme0n1     the head: what is mounted
//!     every controller shows its own                                           nvme0 nvme1 ->  controllers
//!     block device; nothing is shared   PCI/nvme/nvme0/nvme0c0n1   a path, hidden from /dev
//!                                       PCI/nvme/nvme1/nvme0c1n1   the other one
//! ```
//!
//! Numbers in names prove nothing: the first is that of the subsystem or of the controller, as multipath is on or off.
//! Which controller a disk belongs to is told by the directory it is in.

use serde::Serialize;

use super::host::Host;

/// The unit of `size` in sysfs, whatever the disk's logical block is.
const SECTOR_LEN: u64 = 512;

/// A controller that the kernel drives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KernelController {
    /// Such as `nvme0`.
    pub(super) name: String,
    /// `live`, `resetting`, `connecting`, `dead`, ...
    pub(super) state: Option<String>,
    pub(super) model: Option<String>,
    pub(super) serial: Option<String>,
    pub(super) firmware: Option<String>,
    pub(super) subsystem_nqn: Option<String>,
}

/// A namespace that the kernel drives, by one controller or by several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace {
    /// The block device that is mounted: `nvme0n1`.
    pub(super) name: String,
    /// Its directory in sysfs, relative to the root; `None` while no path to it is usable.
    pub(super) directory: Option<String>,
    /// The directory that holds its generic node (`ng0n1`).
    parent: String,
    pub(super) nsid: Option<u32>,
    pub(super) size_bytes: Option<u64>,
    pub(super) logical_block_bytes: Option<u32>,
    /// Metadata bytes a block; `None` on a kernel that does not tell (before 6.8).
    pub(super) metadata_bytes: Option<u32>,
    pub(super) nguid: Option<String>,
    pub(super) eui64: Option<String>,
    pub(super) uuid: Option<String>,
    /// Every path to it.
    pub(super) paths: Vec<PathTo>,
}

/// A path to a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct PathTo {
    /// The controller.
    pub(super) controller: String,
    /// The controller's state.
    pub(super) state: Option<String>,
    /// Asymmetric namespace access, where the subsystem has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ana_state: Option<String>,
}

impl PathTo {
    /// Whether commands get through.
    pub(super) fn is_live(&self) -> bool {
        let usable = |state: &str| matches!(state, "optimized" | "non-optimized");
        self.state.as_deref() == Some("live") && self.ana_state.as_deref().is_none_or(usable)
    }
}

/// The parts of a disk's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DiskName {
    /// Of the subsystem, or of the controller.
    first: u32,
    /// Of the controller, when it is a path.
    path: Option<u32>,
    /// Of the namespace within the first.
    head: u32,
}

impl DiskName {
    /// `nvme0n1` or `nvme0c1n1`; not `nvme0`, `nvme0n1p1` or `ng0n1`.
    fn parse(name: &str) -> Option<Self> {
        let (left, head) = name.strip_prefix("nvme")?.rsplit_once('n')?;
        let (first, path) = match left.split_once('c') {
            Some((first, path)) => (first, Some(digits(path)?)),
            None => (left, None),
        };
        Some(Self { first: digits(first)?, path, head: digits(head)? })
    }

    /// The name of the head that a path leads to.
    fn head_name(self) -> String {
        format!("nvme{}n{}", self.first, self.head)
    }
}

fn digits(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The controller in directory `directory` of sysfs.
pub(super) fn controller(host: &Host, directory: &str, name: &str) -> KernelController {
    let text = |attribute: &str| host.text(format!("{directory}/{attribute}"));
    KernelController {
        name: name.to_owned(),
        state: text("state"),
        model: text("model"),
        serial: text("serial"),
        firmware: text("firmware_rev"),
        subsystem_nqn: text("subsysnqn"),
    }
}

/// The namespaces that the controller in `directory` reaches, by number.
pub(super) fn namespaces(host: &Host, directory: &str, controller: &str) -> Vec<Namespace> {
    let mut found = Vec::new();
    for entry in host.names(directory) {
        let Some(name) = DiskName::parse(&entry) else { continue };
        found.push(if name.path.is_some() {
            multipath(host, directory, controller, &entry, name)
        } else {
            let disk = format!("{directory}/{entry}");
            let paths = vec![path_to(host, directory, controller, &disk)];
            described(host, entry, Some(disk), directory, paths)
        });
    }
    found
}

/// The head that a hidden path leads to, with all its paths.
fn multipath(host: &Host, directory: &str, controller: &str, entry: &str, name: DiskName) -> Namespace {
    let head = name.head_name();
    let own = format!("{directory}/{entry}");
    let Some(subsystem) = subsystem_of(host, controller) else {
        let paths = vec![path_to(host, directory, controller, &own)];
        return described(host, head, None, directory, paths).or_read_from(host, &own);
    };
    let mut paths = Vec::new();
    for member in host.names(&subsystem) {
        let sibling = format!("{subsystem}/{member}");
        if DiskName::parse(&member).is_some() || !member.starts_with("nvme") {
            continue;
        }
        let leads = |disk: &String| {
            DiskName::parse(disk)
                .is_some_and(|other| other.path.is_some() && other.head_name() == name.head_name())
        };
        if let Some(disk) = host.names(&sibling).into_iter().find(leads) {
            paths.push(path_to(host, &sibling, &member, &format!("{sibling}/{disk}")));
        }
    }
    let disk = Some(format!("{subsystem}/{head}")).filter(|disk| host.exists(disk));
    described(host, head, disk, &subsystem, paths).or_read_from(host, &own)
}

/// The directory of the subsystem that has the controller.
fn subsystem_of(host: &Host, controller: &str) -> Option<String> {
    let class = "sys/class/nvme-subsystem";
    let has = |name: &String| host.exists(format!("{class}/{name}/{controller}"));
    host.names(class).into_iter().find(has).map(|name| format!("{class}/{name}"))
}

fn path_to(host: &Host, directory: &str, controller: &str, disk: &str) -> PathTo {
    PathTo {
        controller: controller.to_owned(),
        state: host.text(format!("{directory}/state")),
        ana_state: host.text(format!("{disk}/ana_state")),
    }
}

fn described(host: &Host, name: String, disk: Option<String>, parent: &str, paths: Vec<PathTo>) -> Namespace {
    let namespace = Namespace {
        name,
        directory: None,
        parent: parent.to_owned(),
        nsid: None,
        size_bytes: None,
        logical_block_bytes: None,
        metadata_bytes: None,
        nguid: None,
        eui64: None,
        uuid: None,
        paths,
    };
    match &disk {
        Some(directory) => Namespace { directory: disk.clone(), ..namespace.read_from(host, directory) },
        None => namespace,
    }
}

impl Namespace {
    /// Takes size, format and identity from the attributes of a disk.
    fn read_from(mut self, host: &Host, disk: &str) -> Self {
        let attribute = |name: &str| format!("{disk}/{name}");
        // An identifier of zeros is none.
        let some = |text: &String| text.chars().any(|c| c.is_ascii_hexdigit() && c != '0');
        self.nsid = host.number(attribute("nsid"));
        self.size_bytes =
            host.number::<u64>(attribute("size")).and_then(|sectors| sectors.checked_mul(SECTOR_LEN));
        self.logical_block_bytes = host.number(attribute("queue/logical_block_size"));
        self.metadata_bytes = host.number(attribute("metadata_bytes"));
        let digits = |text: String| text.replace([' ', '-'], "");
        self.nguid = host.text(attribute("nguid")).map(digits).filter(some);
        self.eui64 = host.text(attribute("eui")).map(digits).filter(some);
        self.uuid = host.text(attribute("uuid")).filter(some);
        self
    }

    /// The same from a path, while the head itself is not there.
    fn or_read_from(self, host: &Host, disk: &str) -> Self {
        if self.directory.is_some() { self } else { self.read_from(host, disk) }
    }

    /// Its generic node, `ng0n1`, with the directory of that node.
    pub(super) fn generic(&self) -> Option<(String, String)> {
        let name = format!("ng{}", self.name.strip_prefix("nvme")?);
        let directory = format!("{}/{name}", self.parent);
        Some((name, directory))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_disks_are_told_from_those_of_controllers_partitions_and_nodes() {
        assert_eq!(DiskName::parse("nvme10n2"), Some(DiskName { first: 10, path: None, head: 2 }));
        assert_eq!(DiskName::parse("nvme0c12n3"), Some(DiskName { first: 0, path: Some(12), head: 3 }));
        for other in
            ["nvme0", "nvme0n1p1", "ng0n1", "nvme0c1", "nvmen1", "nvme0n", "nvme0c1n2p3", "nvme-subsys0"]
        {
            assert_eq!(DiskName::parse(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn no_name_panics(name in "(nvme)?[0-9cnp-]{0,12}.{0,3}") {
            let _ = DiskName::parse(&name);
        }
    }

    #[test]
    fn only_a_live_and_accessible_path_counts() {
        let path = |state: &str, ana: Option<&str>| PathTo {
            controller: "nvme1".to_owned(),
            state: Some(state.to_owned()),
            ana_state: ana.map(str::to_owned),
        };
        assert!(path("live", None).is_live());
        assert!(path("live", Some("non-optimized")).is_live());
        assert!(!path("live", Some("inaccessible")).is_live());
        assert!(!path("resetting", Some("optimized")).is_live());
        assert!(!PathTo { state: None, ..path("live", None) }.is_live());
    }
}
