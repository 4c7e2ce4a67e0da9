//! Who uses a block device: what would lose its data if the device went away.
//!
//! ```text
//!   nvme0n1 ---- partitions ---- nvme0n1p1 ---- holders ---- dm-0 ---- holders ---- ...
//!      |                            |                          |
//!      `------------ each of them: mounts, swap, loop devices, exports, open descriptors
//! ```
//!
//! Read once for the whole host, then asked for each device. What only the kernel knows is missing here: a member of
//! a ZFS pool, say. Whoever takes a device must ask the kernel too, by an exclusive open (see `kernel`).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::host::Host;

/// How deep holders may be stacked on each other.
const HOLDERS_DEPTH_MAX: usize = 16;

/// In what way a device is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::cli) enum UseKind {
    /// A filesystem on it is mounted.
    Mount,
    /// A mounted filesystem of several devices has it as a member.
    Member,
    /// It is swapped to.
    Swap,
    /// Another block device stands on it: device-mapper, MD, bcache.
    Holder,
    /// A loop device stands on it.
    Loop,
    /// The kernel's NVMe target exports it.
    Export,
    /// A process has it open.
    Open,
}

/// One use of one device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(in crate::cli) struct Use {
    /// The block device or node: the namespace, a partition of it, or what stands on them.
    pub(super) device: String,
    /// In what way.
    pub(super) kind: UseKind,
    /// By what: a mount point with its filesystem, a holder's name, a process.
    pub(super) by: String,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, by) = (&self.device, &self.by);
        match self.kind {
            UseKind::Mount => write!(f, "{device} is mounted on {by}"),
            UseKind::Member => write!(f, "{device} is a member of the mounted {by}"),
            UseKind::Swap => write!(f, "{device} is swap space"),
            UseKind::Holder => write!(f, "{by} stands on {device}"),
            UseKind::Loop => write!(f, "the loop device {by} stands on {device}"),
            UseKind::Export => write!(f, "{device} is exported by the kernel as {by}"),
            UseKind::Open => write!(f, "{device} is open in {by}"),
        }
    }
}

impl Use {
    /// The command that ends it.
    pub(super) fn remedy(&self) -> String {
        let node = format!("/dev/{}", self.device);
        match self.kind {
            UseKind::Mount => format!("umount {}", self.by.split(" (").next().unwrap_or(&self.by)),
            UseKind::Member => format!("unmount that filesystem, or `btrfs device remove {node}`"),
            UseKind::Swap => format!("swapoff {node}"),
            UseKind::Holder if self.by.starts_with("dm-") => {
                "end that mapping: dmsetup remove, vgchange -an, cryptsetup close or multipath -f".to_owned()
            }
            UseKind::Holder if self.by.starts_with("md") => format!("mdadm --stop /dev/{}", self.by),
            UseKind::Holder => format!("take {} down", self.by),
            UseKind::Loop => format!("losetup -d /dev/{}", self.by),
            UseKind::Export => "disable that namespace in nvmetcli".to_owned(),
            UseKind::Open => "end that process".to_owned(),
        }
    }
}

/// A process with a node of `/dev` open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(in crate::cli) struct Process {
    /// Its id.
    pub(in crate::cli) pid: u32,
    /// Its name.
    pub(in crate::cli) command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

#[derive(Debug)]
struct Mount {
    /// `major:minor` of the filesystem.
    number: String,
    /// The names of the devices it was mounted from; empty for those without.
    sources: Vec<String>,
    /// The mount point and the type, and whose mount namespace it is in when that is another than ours.
    text: String,
}

/// An open descriptor of a node below `/dev`.
#[derive(Debug)]
struct OpenNode {
    process: Process,
    /// The path below `/dev`, as the kernel tells it.
    name: String,
    /// What it is, and its number.
    number: Option<(Kind, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Block,
    Character,
}

/// All uses of block devices on a host, as they were when it was read.
#[derive(Debug)]
pub(in crate::cli) struct Usage {
    host: Host,
    mounts: Vec<Mount>,
    swaps: BTreeSet<String>,
    /// Loop devices by the device they stand on.
    loops: Vec<(String, String)>,
    /// Exported namespaces by device.
    exports: Vec<(String, String)>,
    /// Members of filesystems over several devices.
    members: BTreeMap<String, String>,
    open: Vec<OpenNode>,
}

impl Usage {
    /// Reads the host.
    pub(in crate::cli) fn read(host: &Host) -> Self {
        Self {
            mounts: mounts(host),
            swaps: swaps(host),
            loops: loops(host),
            exports: exports(host),
            members: members(host),
            open: open_nodes(host),
            host: host.clone(),
        }
    }

    /// The uses of a disk, of its partitions, and of all that stands on them.
    pub(super) fn of_disk(&self, directory: &str) -> Vec<Use> {
        let mut uses = BTreeSet::new();
        self.collect(directory, 0, &mut uses);
        uses.into_iter().collect()
    }

    fn collect(&self, directory: &str, depth: usize, uses: &mut BTreeSet<Use>) {
        self.collect_one(directory, depth, uses);
        for entry in self.host.names(directory) {
            let part = format!("{directory}/{entry}");
            if self.host.exists(format!("{part}/partition")) {
                self.collect_one(&part, depth, uses);
            }
        }
    }

    fn collect_one(&self, directory: &str, depth: usize, uses: &mut BTreeSet<Use>) {
        let name = directory.rsplit('/').next().unwrap_or(directory);
        let number = self.host.text(format!("{directory}/dev")).unwrap_or_default();
        let mut add = |kind: UseKind, by: String| _ = uses.insert(Use { device: name.to_owned(), kind, by });
        for mount in &self.mounts {
            if mount.number == number || mount.sources.iter().any(|source| source == name) {
                add(UseKind::Mount, mount.text.clone());
            }
        }
        if let Some(filesystem) = self.members.get(name) {
            add(UseKind::Member, filesystem.clone());
        }
        if self.swaps.contains(name) {
            add(UseKind::Swap, "swap".to_owned());
        }
        let named = |pairs: &[(String, String)]| -> Vec<String> {
            pairs.iter().filter(|(device, _)| device == name).map(|(_, by)| by.clone()).collect()
        };
        named(&self.loops).into_iter().for_each(|by| add(UseKind::Loop, by));
        named(&self.exports).into_iter().for_each(|by| add(UseKind::Export, by));
        for process in self.users(name, Kind::Block, &number) {
            add(UseKind::Open, process.to_string());
        }
        for holder in self.host.names(format!("{directory}/holders")) {
            let mapping = self.host.text(format!("sys/block/{holder}/dm/name"));
            let by = mapping.map_or_else(|| holder.clone(), |mapping| format!("{holder} ({mapping})"));
            uses.insert(Use { device: name.to_owned(), kind: UseKind::Holder, by });
            if depth < HOLDERS_DEPTH_MAX {
                self.collect(&format!("sys/block/{holder}"), depth + 1, uses);
            }
        }
    }

    /// The uses of a character device: processes that have it open, and exports of a whole controller.
    pub(super) fn of_character(&self, name: &str, directory: &str) -> Vec<Use> {
        let number = self.host.text(format!("{directory}/dev")).unwrap_or_default();
        let users = self.users(name, Kind::Character, &number);
        let open = users.into_iter().map(|process| (UseKind::Open, process.to_string()));
        let exports = self.exports.iter().filter(|(device, _)| device == name);
        open.chain(exports.map(|(_, by)| (UseKind::Export, by.clone())))
            .map(|(kind, by)| Use { device: name.to_owned(), kind, by })
            .collect()
    }

    /// The processes that have the node `/dev/NAME` open, whatever its number.
    pub(in crate::cli) fn open_by_name(&self, name: &str) -> Vec<Process> {
        let users: BTreeSet<&Process> =
            self.open.iter().filter(|node| node.name == name).map(|node| &node.process).collect();
        users.into_iter().cloned().collect()
    }

    fn users(&self, name: &str, kind: Kind, number: &str) -> BTreeSet<Process> {
        let is_it = |node: &&OpenNode| match &node.number {
            // A node of another name may be made for the same device.
            Some((of, has)) => *of == kind && has == number && !number.is_empty(),
            None => node.name == name,
        };
        self.open.iter().filter(is_it).map(|node| node.process.clone()).collect()
    }
}

/// The mounts that this process sees, and those of other mount namespaces.
fn mounts(host: &Host) -> Vec<Mount> {
    let own = host.link_name("proc/self/ns/mnt");
    let mut mounts = parse_mounts(host, &host.text("proc/self/mountinfo").unwrap_or_default(), None);
    let mut seen = BTreeSet::from([own]);
    for pid in processes(host) {
        let Some(namespace) = host.link_name(format!("proc/{pid}/ns/mnt")) else { continue };
        if !seen.insert(Some(namespace)) {
            continue;
        }
        let table = host.text(format!("proc/{pid}/mountinfo")).unwrap_or_default();
        for mount in parse_mounts(host, &table, Some(pid)) {
            // What we see ourselves needs no second mention.
            let known = |seen: &Mount| seen.number == mount.number && seen.sources == mount.sources;
            if !mounts.iter().any(known) {
                mounts.push(mount);
            }
        }
    }
    mounts
}

/// `proc_pid_mountinfo(5)`: id, parent, major:minor, root, mount point, options, optional fields, a dash, type,
/// source, options of the superblock.
fn parse_mounts(host: &Host, table: &str, pid: Option<u32>) -> Vec<Mount> {
    let one = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let number = left.next()?.to_owned();
        let point = unescape(left.nth(1)?);
        let mut right = right.split(' ');
        let filesystem = right.next()?;
        let source = unescape(right.next().unwrap_or_default());
        let of = pid.map(|pid| format!(", in the mount namespace of process {pid}")).unwrap_or_default();
        let text = format!("{} ({filesystem}{of})", point.display());
        Some(Mount { number, sources: device_names(host, &source), text })
    };
    table.lines().filter_map(one).collect()
}

/// The device names in a mount source: one path, or several with colons between them (bcachefs).
fn device_names(host: &Host, source: &Path) -> Vec<String> {
    let parts: Vec<&[u8]> = source.as_os_str().as_bytes().split(|byte| *byte == b':').collect();
    // `server:/dev/x` is a directory of another host.
    if !parts.iter().all(|part| part.starts_with(b"/dev/")) {
        return Vec::new();
    }
    parts.iter().map(|part| device_name(host, Path::new(OsStr::from_bytes(part)))).collect()
}

/// The name in sysfs of the device node at `path`, links such as those of `/dev/disk` followed.
fn device_name(host: &Host, path: &Path) -> String {
    let below = path.strip_prefix("/").unwrap_or(path);
    let resolved = fs::canonicalize(host.path(below)).unwrap_or_else(|_| path.to_owned());
    resolved.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `/proc/swaps`: a line of heads, then file name, type, size, used, priority.
fn swaps(host: &Host) -> BTreeSet<String> {
    let table = host.text("proc/swaps").unwrap_or_default();
    let one = |line: &str| {
        let mut fields = line.split_whitespace();
        let name = unescape(fields.next()?);
        // A swap file lies on a filesystem, which is then mounted.
        (fields.next()? == "partition").then(|| device_name(host, &name))
    };
    table.lines().skip(1).filter_map(one).collect()
}

fn loops(host: &Host) -> Vec<(String, String)> {
    let one = |name: String| {
        let backing = host.text(format!("sys/block/{name}/loop/backing_file"))?;
        let device = backing.strip_prefix("/dev/").map(|_| device_name(host, Path::new(&backing)))?;
        Some((device, name))
    };
    host.names("sys/block").into_iter().filter_map(one).collect()
}

/// Namespaces and whole controllers that the kernel's own NVMe target exports.
fn exports(host: &Host) -> Vec<(String, String)> {
    let subsystems = "sys/kernel/config/nvmet/subsystems";
    let mut found = Vec::new();
    for nqn in host.names(subsystems) {
        let namespaces = format!("{subsystems}/{nqn}/namespaces");
        let places = host.names(&namespaces).into_iter().map(|nsid| format!("{namespaces}/{nsid}"));
        for place in places.chain([format!("{subsystems}/{nqn}/passthru")]) {
            let enabled = host.text(format!("{place}/enable")).is_some_and(|text| text == "1");
            if let Some(path) = host.text(format!("{place}/device_path")).filter(|_| enabled) {
                found.push((device_name(host, Path::new(&path)), nqn.clone()));
            }
        }
    }
    found
}

/// Members of mounted btrfs filesystems: their mounts name only one of them.
fn members(host: &Host) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for filesystem in host.names("sys/fs/btrfs") {
        for device in host.names(format!("sys/fs/btrfs/{filesystem}/devices")) {
            found.insert(device, format!("btrfs {filesystem}"));
        }
    }
    found
}

fn processes(host: &Host) -> impl Iterator<Item = u32> {
    host.names("proc").into_iter().filter_map(|name| name.parse().ok())
}

/// Every open node below `/dev`, of every process but this one.
fn open_nodes(host: &Host) -> Vec<OpenNode> {
    let me = std::process::id();
    let mut found = Vec::new();
    for pid in processes(host).filter(|pid| *pid != me) {
        let directory = format!("proc/{pid}/fd");
        let mut process = None;
        for fd in host.names(&directory) {
            let link = host.path(format!("{directory}/{fd}"));
            let Ok(target) = fs::read_link(&link) else { continue };
            // Only these are followed: a file of a network filesystem might never answer.
            let Some(name) = target.to_str().and_then(|text| text.strip_prefix("/dev/")) else { continue };
            let command = || host.text(format!("proc/{pid}/comm")).unwrap_or_default();
            let process = process.get_or_insert_with(|| Process { pid, command: command() });
            let name = name.strip_suffix(" (deleted)").unwrap_or(name).to_owned();
            found.push(OpenNode { process: process.clone(), name, number: number_of(&link) });
        }
    }
    found
}

/// What an open descriptor is, by the node behind it.
fn number_of(link: &Path) -> Option<(Kind, String)> {
    let meta = fs::metadata(link).ok()?;
    let kind = match meta.file_type() {
        kind if kind.is_block_device() => Kind::Block,
        kind if kind.is_char_device() => Kind::Character,
        _ => return None,
    };
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    Some((kind, format!("{major}:{minor}")))
}

/// Undoes the kernel's `\040` for blanks in tables of `/proc`.
fn unescape(text: &str) -> PathBuf {
    PathBuf::from(OsString::from_vec(crate::extent::unescape_octal(text.as_bytes())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_table_panics(table in "([0-9:/ a-z\\\\-]{0,40}( - )?[a-z/:\\\\0-9 ]{0,30}\n){0,4}") {
            let host = Host::at("/nonexistent");
            let _ = parse_mounts(&host, &table, Some(1));
        }
    }

    #[test]
    fn mounts_are_read_behind_optional_fields_and_with_blanks() {
        let host = Host::at("/nonexistent");
        let table = "22 1 259:1 / /a\\040b rw,relatime shared:1 master:2 - ext4 /dev/nvme0n1p1 rw\n\
                     broken line\n\
                     23 1 0:45 / /pool rw - bcachefs /dev/nvme0n1:/dev/nvme1n1 rw\n\
                     24 1 0:46 / /n rw - nfs4 server:/dev rw\n";
        let mounts = parse_mounts(&host, table, None);
        let texts: Vec<&str> = mounts.iter().map(|mount| mount.text.as_str()).collect();
        assert_eq!(texts, ["/a b (ext4)", "/pool (bcachefs)", "/n (nfs4)"]);
        assert_eq!(mounts[0].number, "259:1");
        assert_eq!(mounts[1].sources, ["nvme0n1", "nvme1n1"]);
        assert!(mounts[2].sources.is_empty());
    }
}
