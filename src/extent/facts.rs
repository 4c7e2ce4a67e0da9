//! What is known of a file beside its extents: everything the acceptance rules ask.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, IFlags, Statx, StatxAttributes, StatxFlags};

use super::accept::Violation;
use super::device::Sysfs;
use super::error::ExtentError;
use super::identity::{DeviceNumber, DiskIdentity, FilesystemIdentity, FilesystemKind, MapIdentity};
use super::sys;
use crate::units::ByteLen;

/// What is known of a file beside its extents.
#[derive(Clone, Debug)]
pub struct FileFacts {
    /// The absolute path under which it was opened.
    pub path: PathBuf,
    /// What it is when it is no regular file, e.g. `a directory`.
    pub not_regular: Option<&'static str>,
    /// Its size.
    pub size: ByteLen,
    /// Its inode number.
    pub inode: u64,
    /// Its inode's generation; 0 where the filesystem tells none.
    pub inode_generation: u32,
    /// The device number it reports (`st_dev`).
    pub device: DeviceNumber,
    /// The name of the filesystem type.
    pub filesystem_name: String,
    /// The filesystem type, when it is one that fastice can serve from.
    pub filesystem: Option<FilesystemKind>,
    /// The filesystem's UUID, when it tells one.
    pub filesystem_uuid: Option<[u8; 16]>,
    /// The filesystem's block size in bytes.
    pub filesystem_block_size: u32,
    /// The whole disk under the filesystem, or why there is none that can be served.
    pub disk: Result<DiskIdentity, Violation>,
    /// Whether the immutable flag is set.
    pub immutable: bool,
    /// Whether its data is encrypted. FIEMAP does not show it on ext4.
    pub encrypted: bool,
    /// Whether fs-verity seals it.
    pub verity: bool,
    /// Whether it is accessed by DAX.
    pub dax: bool,
    /// Whether it lies on the XFS realtime device.
    pub realtime: bool,
    /// Whether it is an active swap file.
    pub swap: bool,
    /// How its data comes to go through the journal, if it does.
    pub journaled_data: Option<&'static str>,
    /// Whether the filesystem says that there is no direct I/O on it.
    pub no_direct_io: bool,
}

impl FileFacts {
    /// Gathers the facts of `file`, opened as `path`.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when the system does not answer.
    pub(super) fn gather(file: &File, path: &Path) -> Result<Self, ExtentError> {
        let stat = stat(file, path)?;
        let io = |action| move |source: io::Error| ExtentError::io(action, path, source);
        let statfs =
            rustix::fs::fstatfs(file).map_err(|e| ExtentError::io("stat the filesystem of", path, e))?;
        let device = DeviceNumber { major: stat.stx_dev_major, minor: stat.stx_dev_minor };
        let mount = Mount::of(device).map_err(io("find the mount of"))?;
        let (filesystem_name, filesystem) =
            filesystem_type(u64::try_from(statfs.f_type).ok(), mount.as_ref());
        let flags = rustix::fs::ioctl_getflags(file).unwrap_or(IFlags::empty());
        let disk = Sysfs::system().disk(device).map_err(io("resolve the device of"))?;
        let attributes = stat.stx_attributes;
        let direct_io_told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
        let filesystem_uuid = match filesystem {
            Some(kind) => uuid(file, kind, device).map_err(io("read the filesystem UUID of"))?,
            None => None,
        };
        Ok(Self {
            path: path.to_path_buf(),
            not_regular: not_regular(&stat),
            size: ByteLen(stat.stx_size),
            inode: stat.stx_ino,
            inode_generation: sys::inode_generation(file.as_fd()).unwrap_or_default(),
            device,
            filesystem_name,
            filesystem,
            filesystem_uuid,
            filesystem_block_size: u32::try_from(statfs.f_bsize).unwrap_or_default(),
            disk,
            immutable: attributes.contains(StatxAttributes::IMMUTABLE),
            encrypted: attributes.contains(StatxAttributes::ENCRYPTED),
            verity: attributes.contains(StatxAttributes::VERITY),
            dax: attributes.contains(StatxAttributes::DAX),
            realtime: filesystem == Some(FilesystemKind::Xfs)
                && sys::extended_flags(file.as_fd()).map_err(io("read the flags of"))? & FS_XFLAG_REALTIME
                    != 0,
            swap: is_swap(stat.stx_ino, device).map_err(io("look for swap files while examining"))?,
            journaled_data: journaled_data(filesystem, flags, device, mount.as_ref()),
            no_direct_io: direct_io_told && stat.stx_dio_mem_align == 0,
        })
    }

    /// The identity a map of this file has.
    ///
    /// # Errors
    /// The violation that leaves the file without an identity.
    pub(super) fn identity(&self) -> Result<MapIdentity, Violation> {
        let kind = self.filesystem.ok_or(Violation::Filesystem { name: self.filesystem_name.clone() })?;
        let uuid = self.filesystem_uuid.ok_or(Violation::NoUuid)?;
        Ok(MapIdentity {
            path: self.path.clone(),
            inode: self.inode,
            inode_generation: self.inode_generation,
            size: self.size,
            reserved: ByteLen(0),
            filesystem: FilesystemIdentity {
                kind,
                uuid,
                block_size: self.filesystem_block_size,
                device: self.device,
            },
            disk: self.disk.clone()?,
        })
    }
}

const FS_XFLAG_REALTIME: u32 = 1;

/// `statx` of an open file, with all that the rules ask.
pub(super) fn stat(file: &File, path: &Path) -> Result<Statx, ExtentError> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN;
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, mask).map_err(|e| ExtentError::io("stat", path, e))
}

/// Whether the immutable flag of an open file is set, by the filesystem's own word.
pub(super) fn is_immutable(file: &File, path: &Path) -> Result<bool, ExtentError> {
    Ok(stat(file, path)?.stx_attributes.contains(StatxAttributes::IMMUTABLE))
}

fn not_regular(stat: &Statx) -> Option<&'static str> {
    match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::BlockDevice => Some("a block device"),
        FileType::CharacterDevice => Some("a character device"),
        FileType::Fifo => Some("a pipe"),
        FileType::Socket => Some("a socket"),
        FileType::Symlink => Some("a symbolic link"),
        FileType::Unknown => Some("of unknown type"),
    }
}

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    filesystem: String,
    super_options: String,
}

impl Mount {
    /// The mount of the filesystem with device number `device`, if this namespace sees one.
    fn of(device: DeviceNumber) -> io::Result<Option<Self>> {
        let table = fs::read("/proc/self/mountinfo")?;
        Ok(Self::find(&String::from_utf8_lossy(&table), device))
    }

    /// `proc_pid_mountinfo(5)`: id, parent, major:minor, root, mount point, options, optional fields, a dash, type,
    /// source, options of the superblock.
    fn find(table: &str, device: DeviceNumber) -> Option<Self> {
        let device = device.to_string();
        table.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            if left.split(' ').nth(2)? != device {
                return None;
            }
            let mut right = right.split(' ');
            let filesystem = right.next()?.to_owned();
            Some(Self { filesystem, super_options: right.nth(1).unwrap_or_default().to_owned() })
        })
    }
}

/// The options of the mounted filesystem with device number `device`, as the mount table tells them.
pub(super) fn mount_options(device: DeviceNumber) -> io::Result<Option<String>> {
    Ok(Mount::of(device)?.map(|mount| mount.super_options))
}

/// The name of the filesystem type, and the type if it can be served: the magic number and the mount table must agree,
/// because ext2, ext3 and ext4 share a magic number.
fn filesystem_type(magic: Option<u64>, mount: Option<&Mount>) -> (String, Option<FilesystemKind>) {
    const XFS_SUPER_MAGIC: u64 = 0x5846_5342;
    const EXT4_SUPER_MAGIC: u64 = 0xEF53;
    let name = mount.map(|mount| mount.filesystem.clone());
    let kind = match (magic, name.as_deref()) {
        (Some(XFS_SUPER_MAGIC), Some("xfs")) => Some(FilesystemKind::Xfs),
        (Some(EXT4_SUPER_MAGIC), Some("ext4")) => Some(FilesystemKind::Ext4),
        _ => None,
    };
    let name = name.or_else(|| magic.and_then(name_of_magic).map(str::to_owned));
    let name = name.unwrap_or_else(|| format!("of magic number {:#x}", magic.unwrap_or_default()));
    (name, kind)
}

/// The name of a filesystem whose files have another device number than its mount (`include/uapi/linux/magic.h`): each
/// subvolume of btrfs has one of its own, and so may the layers of an overlay.
const fn name_of_magic(magic: u64) -> Option<&'static str> {
    match magic {
        0x9123_683E => Some("btrfs"),
        0x794C_7630 => Some("overlay"),
        0xCA45_1A4E => Some("bcachefs"),
        _ => None,
    }
}

/// ext4 journals data for a whole filesystem or for one file. The mount table leaves out what is the superblock's
/// default, so the filesystem's own list of options is asked first.
fn journaled_data(
    kind: Option<FilesystemKind>,
    flags: IFlags,
    device: DeviceNumber,
    mount: Option<&Mount>,
) -> Option<&'static str> {
    if kind != Some(FilesystemKind::Ext4) {
        return None;
    }
    if flags.contains(IFlags::JOURNALING) {
        return Some("the file's FS_JOURNAL_DATA_FL");
    }
    let name = Sysfs::system().device_name(device).unwrap_or_default();
    let options = fs::read_to_string(format!("/proc/fs/ext4/{name}/options")).unwrap_or_default();
    let mounted =
        mount.is_some_and(|mount| mount.super_options.split(',').any(|option| option == "data=journal"));
    (mounted || options.lines().any(|option| option == "data=journal")).then_some("mount option data=journal")
}

/// Whether the inode is one of the swap files of `/proc/swaps`.
pub(super) fn is_swap(inode: u64, device: DeviceNumber) -> io::Result<bool> {
    Ok(swap_paths(&swaps()?).any(|path| {
        fs::metadata(path).is_ok_and(|meta| meta.ino() == inode && number_of(meta.dev()) == device)
    }))
}

/// The devices of the filesystems that have swap files.
pub(super) fn swap_devices() -> io::Result<Vec<DeviceNumber>> {
    let of = |path: PathBuf| fs::metadata(path).ok().map(|meta| number_of(meta.dev()));
    Ok(swap_paths(&swaps()?).filter_map(of).collect())
}

/// `/proc/swaps`; empty on a kernel without swap.
fn swaps() -> io::Result<Vec<u8>> {
    match settled(|| read_in_large_pieces(Path::new("/proc/swaps"))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        table => table,
    }
}

fn read_in_large_pieces(path: &Path) -> io::Result<Vec<u8>> {
    let (mut file, mut table) = (File::open(path)?, Vec::new());
    let mut piece = vec![0; 1 << 16];
    loop {
        match io::Read::read(&mut file, &mut piece)? {
            0 => return Ok(table),
            len => table.extend_from_slice(piece.get(..len).unwrap_or_default()),
        }
    }
}

/// What is read twice the same. The kernel tells of swap areas by their place in the list (`swap_start`, `mm/swapfile.c`):
/// where one ends between two reads of a piece, the one that comes next is passed over, and looks as if it had ended too.
/// A list that does not come to rest is given twice over, so that nothing is missing that was there.
fn settled(mut read: impl FnMut() -> io::Result<Vec<u8>>) -> io::Result<Vec<u8>> {
    const ATTEMPTS: usize = 8;
    let mut table = read()?;
    for _ in 0..ATTEMPTS {
        let again = read()?;
        if again == table {
            return Ok(table);
        }
        table = again;
    }
    table.extend(read()?);
    Ok(table)
}

/// The paths of the swap files in a `/proc/swaps` table.
fn swap_paths(table: &[u8]) -> impl Iterator<Item = PathBuf> {
    table.split(|byte| *byte == b'\n').skip(1).filter_map(|line| {
        let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
        let name = fields.next()?;
        (fields.next()? == b"file").then(|| PathBuf::from(std::ffi::OsString::from_vec(unescape_octal(name))))
    })
}

/// Undoes the kernel's `\040` for blanks in tables of `/proc`.
pub(crate) fn unescape_octal(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        rest = tail;
        if let ([a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..], b'\\') = (tail, *first) {
            bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = tail;
        } else {
            bytes.push(*first);
        }
    }
    bytes
}

/// The device number in the parts that the kernel prints.
pub(super) fn number_of(dev: u64) -> DeviceNumber {
    DeviceNumber { major: rustix::fs::major(dev), minor: rustix::fs::minor(dev) }
}

/// The UUID of the filesystem with device number `device`, of which `place` is any file or directory; `None` when it is none
/// that fastice knows, or has none.
pub(super) fn uuid_by(place: &File, device: DeviceNumber) -> io::Result<Option<[u8; 16]>> {
    let magic = u64::try_from(rustix::fs::fstatfs(place)?.f_type).ok();
    let (_, kind) = filesystem_type(magic, Mount::of(device)?.as_ref());
    kind.map_or(Ok(None), |kind| uuid(place, kind, device))
}

/// The filesystem's UUID, from the filesystem, or from its superblock where the kernel is older than that question.
fn uuid(file: &File, kind: FilesystemKind, device: DeviceNumber) -> io::Result<Option<[u8; 16]>> {
    if let Ok(uuid) = sys::filesystem_uuid(file.as_fd()) {
        return Ok(uuid);
    }
    let Some(node) = Sysfs::system().device_node(device) else { return Ok(None) };
    // XFS: sb_uuid of struct xfs_dsb at 32. ext4: s_uuid at 0x68 of the superblock at 1024.
    let offset = match kind {
        FilesystemKind::Xfs => 32,
        FilesystemKind::Ext4 => 1024 + 0x68,
    };
    let mut uuid = [0; 16];
    File::open(node)?.read_exact_at(&mut uuid, offset)?;
    Ok(Some(uuid).filter(|uuid| *uuid != [0; 16]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_tables_with_blanks_and_partitions() {
        let table =
            b"Filename\t\t\tType\t\tSize\n/srv/a\\040b\\134c file\t\t12\t0\t-2\n/dev/sda2 partition 1 0 -3\n";
        assert_eq!(swap_paths(table).collect::<Vec<_>>(), [PathBuf::from("/srv/a b\\c")]);
        assert_eq!(swap_paths(b"").count(), 0);
    }

    #[test]
    fn an_area_that_was_passed_over_while_another_ended_is_seen_again() {
        let tables: [&[u8]; 4] =
            [b"head\n/a file\n/c file\n", b"head\n/b file\n/c file\n", b"head\n/b file\n/c file\n", b""];
        let mut reads = tables.iter();
        let read = || Ok(reads.next().map_or_else(Vec::new, |table| table.to_vec()));
        assert_eq!(settled(read).unwrap(), tables[1]);
        // One that ends and begins all the time hides nobody else.
        let mut turn = 0_u32;
        let read = || {
            turn += 1;
            Ok(if turn.is_multiple_of(2) {
                b"head\n/a file\n/c file\n".to_vec()
            } else {
                b"head\n/b file\n".to_vec()
            })
        };
        let table = settled(read).unwrap();
        let paths: Vec<_> = swap_paths(&table).collect();
        assert!(["/a", "/b", "/c"].iter().all(|path| paths.contains(&PathBuf::from(path))), "{paths:?}");
    }

    #[test]
    fn mounts_are_found_by_device_behind_optional_fields() {
        let table = "22 1 7:4 / /a\\040b rw,relatime shared:1 master:2 - ext4 /dev/loop4 rw,data=journal\n\
                     broken line\n23 1 0:5 / /proc rw - proc proc rw\n";
        let mount = Mount::find(table, DeviceNumber { major: 7, minor: 4 }).unwrap();
        assert_eq!(mount, Mount { filesystem: "ext4".into(), super_options: "rw,data=journal".into() });
        assert_eq!(Mount::find(table, DeviceNumber { major: 7, minor: 5 }), None);
    }

    #[test]
    fn ext3_is_not_ext4_though_its_magic_number_is() {
        let mount = |name: &str| Mount { filesystem: name.into(), super_options: String::new() };
        assert_eq!(filesystem_type(Some(0xEF53), Some(&mount("ext3"))), ("ext3".into(), None));
        assert_eq!(filesystem_type(Some(0xEF53), Some(&mount("ext4"))).1, Some(FilesystemKind::Ext4));
        assert_eq!(filesystem_type(Some(0x9123_683E), Some(&mount("btrfs"))), ("btrfs".into(), None));
        assert_eq!(filesystem_type(Some(0x6969), None), ("of magic number 0x6969".into(), None));
        assert_eq!(filesystem_type(Some(0x9123_683E), None), ("btrfs".into(), None));
    }
}
