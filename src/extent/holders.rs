//! Who has a file open: what `/proc` and `/sys` show, for the message that refuses a pin.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::error::Holder;
use super::facts::number_of;
use super::identity::DeviceNumber;

/// How many holders are named at most.
const NAMED_MAX: usize = 16;

/// The holders of the inode beside the one descriptor with which this process asks: processes with a descriptor or a
/// mapping, loop devices, swap.
/// What cannot be seen (kernel users such as an NFS server, other containers) is missing.
pub(super) fn find(inode: u64, device: DeviceNumber, swap: bool) -> Vec<Holder> {
    let mut holders = Vec::new();
    if swap {
        holders.push(Holder::Swap);
    }
    holders.extend(loop_devices(inode, device));
    let me = std::process::id();
    let processes = entries(Path::new("/proc")).filter_map(|name| name.parse::<u32>().ok());
    for pid in processes {
        let own = usize::from(pid == me);
        if open_count(pid, inode, device) > own || has_mapped(pid, inode, device) {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            holders.push(Holder::Process { pid, command: command.trim().to_owned() });
            if holders.len() == NAMED_MAX {
                break;
            }
        }
    }
    holders
}

/// The same of an open file.
pub(super) fn of_file(file: &File) -> io::Result<Vec<Holder>> {
    let stat = file.metadata()?;
    Ok(find(stat.ino(), number_of(stat.dev()), false))
}

/// The names in a directory; none when it cannot be read, as for a process that just ended.
fn entries(directory: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

fn open_count(pid: u32, inode: u64, device: DeviceNumber) -> usize {
    let directory = format!("/proc/{pid}/fd");
    let directory = Path::new(&directory);
    entries(directory).filter(|fd| is_inode(&directory.join(fd), inode, device)).count()
}

/// Follows the link to the open file itself, also when its name is gone. Opens nothing.
fn is_inode(path: &Path, inode: u64, device: DeviceNumber) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.ino() == inode && number_of(meta.dev()) == device)
}

/// `proc_pid_maps(5)`: address, permissions, offset, device (hexadecimal), inode, path.
fn has_mapped(pid: u32, inode: u64, device: DeviceNumber) -> bool {
    let device = format!("{:02x}:{:02x}", device.major, device.minor);
    let inode = inode.to_string();
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    String::from_utf8_lossy(&maps).lines().any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(3);
        fields.next() == Some(device.as_str()) && fields.next() == Some(inode.as_str())
    })
}

fn loop_devices(inode: u64, device: DeviceNumber) -> impl Iterator<Item = Holder> {
    entries(Path::new("/sys/block")).filter_map(move |name| {
        let backing = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
        is_inode(Path::new(backing.trim_end()), inode, device).then_some(Holder::LoopDevice { name })
    })
}
