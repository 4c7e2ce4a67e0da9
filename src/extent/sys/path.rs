//! Of an inode by its path, without opening it: an open would be denied, or wait.

#![expect(unsafe_code, reason = "calls by path have no safe wrapper")]

use std::ffi::CStr;
use std::io;
use std::ptr;

use super::check;

/// Sets the size of the file at `path` without opening it: `truncate(2)`.
pub(in crate::extent) fn truncate(path: &CStr, len: i64) -> io::Result<()> {
    // SAFETY: truncate reads a string that ends in a null byte, which a CStr is.
    check(unsafe { libc::truncate64(path.as_ptr(), len) }).map(drop)
}

/// Inode number and inode generation of the file at `path`, without opening it: what its handle is made of
/// (`name_to_handle_at(2)`). `None` when that has another form than those of ext4 and XFS.
pub(in crate::extent) fn inode_by_path(path: &CStr) -> io::Result<Option<(u64, u32)>> {
    /// `FILEID_INO32_GEN` (`linux/exportfs.h`): inode number and generation, 32 bits each.
    const INO32_GEN: libc::c_int = 1;
    /// The same with `XFS_FILEID_TYPE_64FLAG` (`fs/xfs/xfs_export.h`): an inode number of 64 bits.
    const INO64_GEN: libc::c_int = 0x81;
    /// `struct file_handle` with room for the longest, `MAX_HANDLE_SZ`.
    #[repr(C)]
    struct Handle {
        len: libc::c_uint,
        kind: libc::c_int,
        id: [u8; 128],
    }
    let mut handle = Handle { len: 128, kind: 0, id: [0; 128] };
    let mut mount: libc::c_int = 0;
    // SAFETY: the path ends in a null byte; the kernel writes at most `len` bytes of the id, which it has, beside the two
    // fields in front of it, and one int for the mount.
    check(unsafe {
        let start = (&raw mut handle).cast::<libc::file_handle>();
        libc::name_to_handle_at(libc::AT_FDCWD, path.as_ptr(), start, &raw mut mount, libc::AT_SYMLINK_FOLLOW)
    })?;
    let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = handle.id;
    Ok(match (handle.kind, handle.len) {
        (INO32_GEN, 8..) => Some((u32::from_ne_bytes([a, b, c, d]).into(), u32::from_ne_bytes([e, f, g, h]))),
        (INO64_GEN, 12..) => {
            Some((u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u32::from_ne_bytes([i, j, k, l])))
        }
        _ => None,
    })
}

/// `file_getattr(2)` and `file_setattr(2)`, Linux 6.17: the same numbers on every architecture that Rust knows.
const FILE_GETATTR: libc::c_long = 468;
const FILE_SETATTR: libc::c_long = 469;

/// `struct file_attr` (`linux/fs.h`), version 0.
#[repr(C)]
#[derive(Default)]
struct FileAttr {
    xflags: u64,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
}

/// Clears the immutable flag of the file at `path` without opening it. ENOSYS before Linux 6.17.
pub(in crate::extent) fn clear_immutable_by_path(path: &CStr) -> io::Result<()> {
    const FS_XFLAG_IMMUTABLE: u64 = 8;
    let mut attributes = FileAttr::default();
    let len = size_of::<FileAttr>();
    // SAFETY: the path ends in a null byte; the kernel writes at most `len` bytes of plain integers.
    let got = unsafe {
        libc::syscall(FILE_GETATTR, libc::AT_FDCWD, path.as_ptr(), &raw mut attributes, len, 0_u32)
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.xflags &= !FS_XFLAG_IMMUTABLE;
    // SAFETY: as above; the kernel only reads.
    let set = unsafe {
        libc::syscall(FILE_SETATTR, libc::AT_FDCWD, path.as_ptr(), &raw const attributes, len, 0_u32)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the kernel has `file_setattr(2)`. Asked with a structure of no length, which changes nothing.
pub(in crate::extent) fn has_file_setattr() -> bool {
    let nothing = ptr::null::<FileAttr>();
    // SAFETY: a structure of length 0 is refused before it is read.
    let answer =
        unsafe { libc::syscall(FILE_SETATTR, libc::AT_FDCWD, c"".as_ptr(), nothing, 0_usize, 0_u32) };
    answer == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
}
