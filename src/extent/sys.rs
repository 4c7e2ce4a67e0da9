//! The system calls that no safe crate offers: FIEMAP and the inode ioctls, attributes by path, leases, fanotify, signals to a thread,
//! swap areas, freezes, sealed memory. The one module of `extent` with unsafe code; each function is safe to call and returns errno.

#![expect(unsafe_code, reason = "ioctl, fcntl, fanotify, signalfd and mmap have no safe wrapper")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::ioctl::{self, Getter, Updater};
use rustix::mm::{MapFlags, ProtFlags};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

// ---- sealed memory -------------------------------------------------------------------------------------------

/// Bytes in a memfd that nothing can write any more, mapped read-only.
#[derive(Debug)]
pub(super) struct SealedMemory {
    start: NonNull<u8>,
    len: usize,
    /// Mapped again when the content is moved, and kept so that the seals can be looked at.
    file: OwnedFd,
}

// SAFETY: the memory is never written after construction, by anyone: the memfd carries F_SEAL_WRITE, and the mapping
// is PROT_READ. Sharing or moving a pointer to constant memory is sound.
unsafe impl Send for SealedMemory {}
// SAFETY: as above.
unsafe impl Sync for SealedMemory {}

/// What a huge page of the processors that fastice is made for holds.
const HUGE_PAGE_LEN: usize = 2 << 20;

/// Seals a file for good. The kernel refuses with EBUSY while anybody holds a page of it (`memfd_wait_for_pins` in `mm/memfd.c`,
/// which waits for 150 ms): reclaim, for one, takes pages for a moment, and lets them go.
fn add_seals(file: &OwnedFd) -> io::Result<()> {
    const ATTEMPTS: u32 = 40;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let mut result = rustix::fs::fcntl_add_seals(file, seals);
    for _ in 1..ATTEMPTS {
        if result != Err(rustix::io::Errno::BUSY) {
            break;
        }
        result = rustix::fs::fcntl_add_seals(file, seals);
    }
    Ok(result?)
}

impl SealedMemory {
    /// Copies `parts`, one behind the other, into sealed memory.
    pub(super) fn seal(parts: &[&[u8]]) -> io::Result<Self> {
        let file = rustix::fs::memfd_create("fastice-map", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                let written = rustix::io::write(&file, rest)?;
                rest = rest.get(written..).unwrap_or_default();
            }
        }
        let len = parts.iter().map(|part| part.len()).sum();
        add_seals(&file)?;
        // SAFETY: a new mapping at an address the kernel chooses touches no memory of ours. The file has exactly
        // `len` bytes and, sealed against shrinking, keeps them, so no access can fault.
        let start =
            unsafe { rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, &file, 0)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut memory = Self { start, len, file };
        if len >= HUGE_PAGE_LEN {
            memory.move_to_boundary();
        }
        Ok(memory)
    }

    /// Maps the content where huge pages can be, for [`collapse`](Self::collapse).
    fn move_to_boundary(&mut self) {
        let room = self.len + HUGE_PAGE_LEN;
        // SAFETY: a new mapping at an address the kernel chooses, which nobody knows yet.
        let Ok(start) = (unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), MapFlags::PRIVATE)
        }) else {
            return;
        };
        let skip = start.addr().next_multiple_of(HUGE_PAGE_LEN) - start.addr();
        let aligned = start.wrapping_byte_add(skip);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: `aligned..aligned + len` lies within the mapping that was just made, which this one takes the place of. Its
        // file is sealed against shrinking, as above.
        let mapped = unsafe { rustix::mm::mmap(aligned, self.len, ProtFlags::READ, flags, &self.file, 0) };
        let Some(aligned) = mapped.ok().and_then(|mapped| NonNull::new(mapped.cast::<u8>())) else {
            // SAFETY: the whole room is ours, whatever is mapped there.
            let _ = unsafe { rustix::mm::munmap(start, room) };
            return;
        };
        let pages_len = self.len.next_multiple_of(rustix::param::page_size());
        // SAFETY: what is around the new mapping: parts of the room, which nobody uses. Both begin and end on pages.
        unsafe {
            let _ = (skip > 0).then(|| rustix::mm::munmap(start, skip));
            let behind = room.next_multiple_of(rustix::param::page_size()) - skip - pages_len;
            let end = start.wrapping_byte_add(skip + pages_len);
            let _ = (behind > 0).then(|| rustix::mm::munmap(end, behind));
        }
        // The old mapping goes, and nobody has borrowed from it.
        let old = std::mem::replace(&mut self.start, aligned);
        // SAFETY: it was made in `seal` with this length, and no borrow of it is there, as `self` is borrowed mutably.
        let _ = unsafe { rustix::mm::munmap(old.as_ptr().cast(), self.len) };
    }

    /// Has the kernel put the content into huge pages, as far as it fills them, if it can (`MADV_COLLAPSE`, Linux 6.1). A map of a
    /// million extents then takes a dozen entries of the processor's cache of addresses, where there are a thousand or two. It
    /// takes some 30 ms for that, in which the content can be read all the same.
    pub(super) fn collapse(&self) {
        if self.len >= HUGE_PAGE_LEN {
            // SAFETY: the mapping is ours while `self` is borrowed, and its content stays what it is, wherever the kernel keeps
            // it; if it cannot, all stays as it was.
            let _ = unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_COLLAPSE) };
        }
    }

    /// The sealed bytes, page aligned.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `start..start + len` is one live read-only mapping until drop, and the seals make its content
        // constant, as a shared slice demands.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The sealed file, for tests that try to break the seal.
    #[cfg(test)]
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.file.as_fd()
    }
}

impl Drop for SealedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `seal` with this length, and no borrow of it outlives self. A failure
        // would leak memory, nothing more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Has the processor fetch the memory of `items` into its caches. A hint: it reads nothing that could be seen, and waits for
/// nothing. Where the processor has no such instruction it does nothing.
pub(super) fn prefetch<T>(items: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        /// A line of the cache.
        const LINE_LEN: usize = 64;
        let start = items.as_ptr().cast::<i8>();
        for at in (0..size_of_val(items)).step_by(LINE_LEN) {
            // SAFETY: a prefetch never faults and changes nothing but caches; the address lies in `items` all the same.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at)) };
        }
    }
}

// ---- inode ioctls --------------------------------------------------------------------------------------------

/// Calls FIEMAP (`linux/fiemap.h`) with `page` as header and room for records: 4 words of header, 7 words a record.
/// The kernel writes at most as many records as the header's `fm_extent_count` says.
pub(super) fn fiemap<const WORDS: usize>(file: BorrowedFd<'_>, page: &mut [u64; WORDS]) -> io::Result<()> {
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
pub(super) fn inode_generation(file: BorrowedFd<'_>) -> io::Result<u32> {
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
pub(super) fn extended_flags(file: BorrowedFd<'_>) -> io::Result<u32> {
    /// `_IOR('X', 31, struct fsxattr)`, 28 bytes.
    const FS_IOC_FSGETXATTR: ioctl::Opcode = ioctl::opcode::read::<[u32; 7]>(b'X', 31);
    // SAFETY: struct fsxattr is 28 bytes of plain integers, and so is the output.
    let [xflags, ..] = unsafe { ioctl::ioctl(file, Getter::<FS_IOC_FSGETXATTR, [u32; 7]>::new())? };
    Ok(xflags)
}

/// The filesystem's UUID: `FS_IOC_GETFSUUID` (Linux 6.9); `None` when it has none of 16 bytes.
pub(super) fn filesystem_uuid(file: BorrowedFd<'_>) -> io::Result<Option<[u8; 16]>> {
    /// `_IOR(0x15, 0, struct fsuuid2)`: a length byte and 16 bytes.
    const FS_IOC_GETFSUUID: ioctl::Opcode = ioctl::opcode::read::<[u8; 17]>(0x15, 0);
    // SAFETY: struct fsuuid2 is 17 plain bytes, and so is the output.
    let [len, uuid @ ..] = unsafe { ioctl::ioctl(file, Getter::<FS_IOC_GETFSUUID, [u8; 17]>::new())? };
    Ok((len == 16).then_some(uuid))
}

/// Whether files of this XFS can share blocks: `XFS_IOC_FSGEOMETRY`. ENOTTY where it is no XFS.
pub(super) fn xfs_has_reflink(file: BorrowedFd<'_>) -> io::Result<bool> {
    /// `_IOR('X', 126, struct xfs_fsop_geom)`, 256 bytes; `flags` is its 24th word of 32 bits.
    const XFS_IOC_FSGEOMETRY: ioctl::Opcode = ioctl::opcode::read::<[u32; 64]>(b'X', 126);
    const FLAGS: usize = 23;
    const REFLINK: u32 = 1 << 20;
    // SAFETY: struct xfs_fsop_geom is 256 bytes of plain integers, and so is the output.
    let geometry = unsafe { ioctl::ioctl(file, ZeroedGetter::<XFS_IOC_FSGEOMETRY, [u32; 64]>([0; 64]))? };
    Ok(geometry.get(FLAGS).is_some_and(|flags| flags & REFLINK != 0))
}

// ---- page cache ----------------------------------------------------------------------------------------------

/// How many pages of `len` bytes from `offset` on (0: to the end) are cached: `cachestat(2)`, Linux 6.5; ENOSYS before.
pub(super) fn cached_pages(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<u64> {
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

// ---- by path -------------------------------------------------------------------------------------------------

/// Sets the size of the file at `path` without opening it: `truncate(2)`.
pub(super) fn truncate(path: &CStr, len: i64) -> io::Result<()> {
    // SAFETY: truncate reads a string that ends in a null byte, which a CStr is.
    check(unsafe { libc::truncate64(path.as_ptr(), len) }).map(drop)
}

/// Inode number and inode generation of the file at `path`, without opening it: what its handle is made of
/// (`name_to_handle_at(2)`). `None` when that has another form than those of ext4 and XFS.
pub(super) fn inode_by_path(path: &CStr) -> io::Result<Option<(u64, u32)>> {
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
pub(super) fn clear_immutable_by_path(path: &CStr) -> io::Result<()> {
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
pub(super) fn has_file_setattr() -> bool {
    let nothing = ptr::null::<FileAttr>();
    // SAFETY: a structure of length 0 is refused before it is read.
    let answer =
        unsafe { libc::syscall(FILE_SETATTR, libc::AT_FDCWD, c"".as_ptr(), nothing, 0_usize, 0_u32) };
    answer == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
}

// ---- frozen filesystems --------------------------------------------------------------------------------------

/// Freezes the filesystem of `file`: `FIFREEZE`. EBUSY when it is frozen.
pub(super) fn freeze(file: BorrowedFd<'_>) -> io::Result<()> {
    /// `_IOWR('X', 119, int)`; the argument is not read.
    const FIFREEZE: ioctl::Opcode = ioctl::opcode::read_write::<libc::c_int>(b'X', 119);
    // SAFETY: FIFREEZE neither reads nor writes by its argument (`ioctl_fsfreeze` of the kernel takes none).
    unsafe { Ok(ioctl::ioctl(file, ioctl::NoArg::<FIFREEZE>::new())?) }
}

/// Thaws it: `FITHAW`. EINVAL when it is not frozen.
pub(super) fn thaw(file: BorrowedFd<'_>) -> io::Result<()> {
    /// `_IOWR('X', 120, int)`; the argument is not read.
    const FITHAW: ioctl::Opcode = ioctl::opcode::read_write::<libc::c_int>(b'X', 120);
    // SAFETY: as in `freeze`.
    unsafe { Ok(ioctl::ioctl(file, ioctl::NoArg::<FITHAW>::new())?) }
}

// ---- swap areas ----------------------------------------------------------------------------------------------

/// Makes `file` a swap area, of the lowest priority: areas that were there before are filled first. Found through the
/// descriptor, whatever the file is called by now; the kernel opens it for writing.
pub(super) fn swap_on(file: BorrowedFd<'_>) -> io::Result<()> {
    let path = own_path(file)?;
    // SAFETY: swapon reads a string that ends in a null byte, which a CString is.
    check(unsafe { libc::swapon(path.as_ptr(), 0) }).map(drop)
}

/// Ends the swap area on `file`, which the kernel opens for writing. EINTR when a signal came.
pub(super) fn swap_off(file: BorrowedFd<'_>) -> io::Result<()> {
    swap_off_by_path(&own_path(file)?)
}

/// Ends the swap area on the file at `path`.
pub(super) fn swap_off_by_path(path: &CStr) -> io::Result<()> {
    // SAFETY: as in `swap_on`.
    check(unsafe { libc::swapoff(path.as_ptr()) }).map(drop)
}

fn own_path(file: BorrowedFd<'_>) -> io::Result<CString> {
    Ok(CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
}

// ---- leases --------------------------------------------------------------------------------------------------

/// The lease types of `fcntl(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lease {
    /// Broken by an open for writing, or a truncation.
    Read,
    /// Broken by any open.
    Write,
    /// None.
    None,
}

impl Lease {
    const fn raw(self) -> libc::c_int {
        (match self {
            Self::Read => libc::F_RDLCK,
            Self::Write => libc::F_WRLCK,
            Self::None => libc::F_UNLCK,
        }) as libc::c_int
    }
}

/// Takes, changes or drops the lease on `file`.
pub(super) fn set_lease(file: BorrowedFd<'_>, lease: Lease) -> io::Result<()> {
    // SAFETY: F_SETLEASE takes an integer; no memory is touched.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, lease.raw()) }).map(drop)
}

/// The lease on `file`; while it is being broken, the type it must become.
pub(super) fn get_lease(file: BorrowedFd<'_>) -> io::Result<Lease> {
    // SAFETY: F_GETLEASE takes no argument; no memory is touched.
    let raw = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) })?;
    Ok(if raw == Lease::Read.raw() {
        Lease::Read
    } else if raw == Lease::Write.raw() {
        Lease::Write
    } else {
        Lease::None
    })
}

/// Directs the signals of `file` (lease breaks) to one thread of this process, as the realtime signal [`break_signal`].
pub(super) fn direct_signals(file: BorrowedFd<'_>, thread: ThreadId) -> io::Result<()> {
    /// `fcntl.h`: not in the libc crate for every target.
    const F_SETSIG: libc::c_int = 10;
    const F_SETOWN_EX: libc::c_int = 15;
    const F_OWNER_TID: libc::c_int = 0;
    #[repr(C)]
    struct OwnerEx {
        kind: libc::c_int,
        pid: libc::pid_t,
    }
    let owner = OwnerEx { kind: F_OWNER_TID, pid: thread.0 };
    // SAFETY: F_SETOWN_EX reads a struct f_owner_ex, which `owner` is laid out as and outlives the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, &raw const owner) })?;
    // SAFETY: F_SETSIG takes an integer; no memory is touched.
    check(unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, break_signal()) }).map(drop)
}

/// The signal that tells of a lease break. It is sent to one thread, which has it blocked, so it meets no other user
/// of the same number in this process.
fn break_signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

/// The kernel's id of a thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct ThreadId(libc::pid_t);

/// Blocks the lease-break signal, and SIGIO which the kernel falls back to when its queue is full, in the calling
/// thread for good, and returns a descriptor to read them from and the id to direct them to. For threads of our own
/// making only.
pub(super) fn take_signals() -> io::Result<(OwnedFd, ThreadId)> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set; the others read or change that initialised set, and the mask of the
    // calling thread only. The descriptor signalfd returns is new and ours alone.
    unsafe {
        check(libc::sigemptyset(set.as_mut_ptr()))?;
        check(libc::sigaddset(set.as_mut_ptr(), break_signal()))?;
        check(libc::sigaddset(set.as_mut_ptr(), libc::SIGIO))?;
        let set = set.assume_init_ref();
        match libc::pthread_sigmask(libc::SIG_BLOCK, set, ptr::null_mut()) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        let fd = check(libc::signalfd(-1, set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok((OwnedFd::from_raw_fd(fd), ThreadId(libc::gettid())))
    }
}

// ---- fanotify ------------------------------------------------------------------------------------------------

/// A fanotify group that is asked for permission. Its event descriptors are opened non-blocking, so that reading an
/// event never waits for a lease of our own.
pub(super) fn fanotify_group() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_CONTENT | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
    let event_flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_LARGEFILE | libc::O_NONBLOCK;
    let event_flags = libc::c_uint::try_from(event_flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: fanotify_init takes integers; the descriptor it returns is new and ours alone.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::fanotify_init(flags, event_flags))?)) }
}

/// Asks `group` for permission for every open, also for execution, of the inode of `file`.
pub(super) fn mark_opens(group: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    let mask = libc::FAN_OPEN_PERM;
    // SAFETY: a null path makes the mark that of the descriptor itself; no memory is touched.
    check(unsafe {
        libc::fanotify_mark(group.as_raw_fd(), libc::FAN_MARK_ADD, mask, file.as_raw_fd(), ptr::null())
    })
    .map(drop)
}

/// Takes that back. Whoever waits to open the file goes on.
pub(super) fn unmark_opens(group: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    let (flags, mask) = (libc::FAN_MARK_REMOVE, libc::FAN_OPEN_PERM);
    // SAFETY: as in `mark_opens`.
    check(unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask, file.as_raw_fd(), ptr::null()) })
        .map(drop)
}

/// Takes ownership of the descriptor that came in a fanotify event.
pub(super) fn event_descriptor(fd: i32) -> Option<OwnedFd> {
    // SAFETY: the kernel installed this descriptor for the reader of the event, who is its only owner.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
