//! What the kernel tells of an inode by its descriptor: extents, flags, generation, filesystem, cached pages.

#![expect(unsafe_code, reason = "ioctl and cachestat have no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::ioctl::{self, Getter, Updater};

/// Calls FIEMAP (`linux/fiemap.h`) with `page` as header and room for records: 4 words of header, 7 words a record.
/// The kernel writes at most as many records as the header's `fm_extent_count` says.
pub(in crate::extent) fn fiemap<const WORDS: usize>(
    file: BorrowedFd<'_>,
    page: &mut [u64; WORDS],
) -> io::Result<()> {
    /// `_IOWR('f', 11, struct fiemap)`; the encoded size is that of the header alone.
    const FS_IOC_FIEMAP: ioctl::Opcode = 0xC020_660B;
    let room = (WORDS.saturating_sub(4)) / 7;
    // fm_extent_count is the low half of word 3 on every byte order the kernel's u32 layout gives: bytes 24..28.
    let count =
        page.get(3).map(|word| word.to_ne_bytes()).map(|[a, b, c, d, ..]| u32::from_ne_bytes([a, b, c, d]));
    if count.is_none_or(|count| count as usize > room) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: FIEMAP reads the header and writes header plus fm_extent_count records of 56 bytes, which was just
    // checked to fit the array; any bit pattern is a valid u64.
    unsafe { Ok(ioctl::ioctl(file, Updater::<FS_IOC_FIEMAP, [u64; WORDS]>::new(page))?) }
}

/// The inode's generation: `FS_IOC_GETVERSION`.
pub(in crate::extent) fn inode_generation(file: BorrowedFd<'_>) -> io::Result<u32> {
    /// `_IOR('v', 1, long)`.
    const FS_IOC_GETVERSION: ioctl::Opcode = ioctl::opcode::read::<libc::c_long>(b'v', 1);
    // SAFETY: the kernel writes an int, by its definition at most a long, into the output; both are plain integers.
    let word = unsafe { ioctl::ioctl(file, ZeroedGetter::<FS_IOC_GETVERSION, libc::c_long>(0))? };
    let [a, b, c, d, ..] = word.to_ne_bytes();
    Ok(u32::from_ne_bytes([a, b, c, d]))
}

/// A getter whose output starts as zeros, for ioctls that write less than their type says.
struct ZeroedGetter<const OPCODE: ioctl::Opcode, Output>(Output);

// SAFETY: the pointer handed over is to `Output`, which the users of this type have chosen to be at least what the
// kernel writes, and which is initialised from the start.
unsafe impl<const OPCODE: ioctl::Opcode, Output> ioctl::Ioctl for ZeroedGetter<OPCODE, Output> {
    type Output = Output;
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> ioctl::Opcode {
        OPCODE
    }
    fn as_ptr(&mut self) -> *mut libc::c_void {
        (&raw mut self.0).cast()
    }
    unsafe fn output_from_ptr(
        _: ioctl::IoctlOutput,
        output: *mut libc::c_void,
    ) -> rustix::io::Result<Self::Output> {
        // SAFETY: rustix passes back the pointer of `as_ptr`, which is valid and initialised; it is read once.
        Ok(unsafe { output.cast::<Output>().read() })
    }
}

/// The extended flags of the inode (`FS_XFLAG_*`): `FS_IOC_FSGETXATTR`.
pub(in crate::extent) fn extended_flags(file: BorrowedFd<'_>) -> io::Result<u32> {
    /// `_IOR('X', 31, struct fsxattr)`, 28 bytes.
    const FS_IOC_FSGETXATTR: ioctl::Opcode = ioctl::opcode::read::<[u32; 7]>(b'X', 31);
    // SAFETY: struct fsxattr is 28 bytes of plain integers, and so is the output.
    let [xflags, ..] = unsafe { ioctl::ioctl(file, Getter::<FS_IOC_FSGETXATTR, [u32; 7]>::new())? };
    Ok(xflags)
}

/// The filesystem's UUID: `FS_IOC_GETFSUUID` (Linux 6.9); `None` when it has none of 16 bytes.
pub(in crate::extent) fn filesystem_uuid(file: BorrowedFd<'_>) -> io::Result<Option<[u8; 16]>> {
    /// `_IOR(0x15, 0, struct fsuuid2)`: a length byte and 16 bytes.
    const FS_IOC_GETFSUUID: ioctl::Opcode = ioctl::opcode::read::<[u8; 17]>(0x15, 0);
    // SAFETY: struct fsuuid2 is 17 plain bytes, and so is the output.
    let [len, uuid @ ..] = unsafe { ioctl::ioctl(file, Getter::<FS_IOC_GETFSUUID, [u8; 17]>::new())? };
    Ok((len == 16).then_some(uuid))
}

/// Whether files of this XFS can share blocks: `XFS_IOC_FSGEOMETRY`. ENOTTY where it is no XFS.
pub(in crate::extent) fn xfs_has_reflink(file: BorrowedFd<'_>) -> io::Result<bool> {
    /// `_IOR('X', 126, struct xfs_fsop_geom)`, 256 bytes; `flags` is its 24th word of 32 bits.
    const XFS_IOC_FSGEOMETRY: ioctl::Opcode = ioctl::opcode::read::<[u32; 64]>(b'X', 126);
    const FLAGS: usize = 23;
    const REFLINK: u32 = 1 << 20;
    // SAFETY: struct xfs_fsop_geom is 256 bytes of plain integers, and so is the output.
    let geometry = unsafe { ioctl::ioctl(file, ZeroedGetter::<XFS_IOC_FSGEOMETRY, [u32; 64]>([0; 64]))? };
    Ok(geometry.get(FLAGS).is_some_and(|flags| flags & REFLINK != 0))
}

/// How many pages of `len` bytes from `offset` on (0: to the end) are cached: `cachestat(2)`, Linux 6.5; ENOSYS before.
pub(in crate::extent) fn cached_pages(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<u64> {
    /// The same on every architecture that Rust knows.
    const CACHESTAT: libc::c_long = 451;
    let range = [offset, len];
    let mut found = [0_u64; 5];
    // SAFETY: the kernel reads a struct cachestat_range, two words, and writes a struct cachestat, five words.
    let told =
        unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0_u32) };
    let [cached, ..] = found;
    if told < 0 { Err(io::Error::last_os_error()) } else { Ok(cached) }
}
