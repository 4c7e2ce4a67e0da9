//! Mappings: every system call of this crate that touches an address space.
//!
//! ```text
//!   anonymous ------- private pages, ordinary or huge        nobody else can see them
//!   of_memfd -------- a file in memory that we made           can be handed to another process
//!   of_hugetlbfs ---- an unlinked file on a hugetlbfs mount
//!   of_peer_file ---- a file in memory that another process made
//! ```
//!
//! A mapping is made in this order: map, bind to a NUMA node, then touch ([`Mapping::populate`]): pages go where the
//! policy says at the moment of their first touch.
#![expect(unsafe_code, reason = "maps and unmaps memory")]

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};

use crate::{BUFFER_LEN_MAX, Pages};

/// `f_type` of hugetlbfs (kernel, `include/uapi/linux/magic.h`).
const HUGETLBFS_MAGIC: i64 = 0x9584_58F6;
/// `get_mempolicy`: tell the node of an address (kernel, `include/uapi/linux/mempolicy.h`).
const MPOL_F_NODE: libc::c_int = 1 << 0;
const MPOL_F_ADDR: libc::c_int = 1 << 1;
/// Most NUMA nodes that a mask names: the kernel's own limit on `x86_64`.
const NODES_MAX: u32 = 1024;

/// One mapping, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    file: Option<OwnedFd>,
    writable: bool,
}

impl Mapping {
    /// Private pages of no file. The length is a multiple of the page's; the address is a multiple of 2 MiB.
    pub(crate) fn anonymous(len: usize, pages: Pages) -> Result<Self, Errno> {
        let private = MapFlags::PRIVATE;
        let base = match pages {
            Pages::Huge1G => map_anonymous(len, private | MapFlags::HUGETLB | MapFlags::HUGE_1GB)?,
            Pages::Huge2M => map_anonymous(len, private | MapFlags::HUGETLB | MapFlags::HUGE_2MB)?,
            Pages::Ordinary => {
                let base = reserve_aligned(len, ProtFlags::READ | ProtFlags::WRITE)?;
                // SAFETY: the range was just mapped by us; the advice does not change its contents.
                let _ = unsafe { mm::madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
                base
            }
        };
        Ok(Self { base, len, file: None, writable: true })
    }

    /// A file in memory, sealed so that nobody who gets it can cut it off under our feet.
    pub(crate) fn of_memfd(len: usize, pages: Pages) -> Result<Self, Errno> {
        let huge = match pages {
            Pages::Huge1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
            Pages::Huge2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Pages::Ordinary => MemfdFlags::empty(),
        };
        let file = rustix::fs::memfd_create(
            c"hugepage-alloc",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge,
        )?;
        rustix::fs::ftruncate(&file, len as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let base = match pages {
            Pages::Huge1G | Pages::Huge2M => map_file(&file, 0, len, true, None)?,
            Pages::Ordinary => {
                let base = reserve_aligned(len, ProtFlags::empty())?;
                map_file(&file, 0, len, true, Some(base)).inspect_err(|_| unmap(base.as_ptr(), len))?
            }
        };
        if pages == Pages::Ordinary {
            // SAFETY: the range was just mapped by us; the advice does not change its contents.
            let _ = unsafe { mm::madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
        }
        Ok(Self { base, len, file: Some(file), writable: true })
    }

    /// A file on the hugetlbfs mounted at `directory`, unlinked as soon as it is open. It is not kept: whoever had
    /// it could cut it off, for hugetlbfs knows no seals.
    pub(crate) fn of_hugetlbfs(directory: &Path, len: usize, pages: Pages) -> Result<Self, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let place = directory.display();
        let mount = rustix::fs::statfs(directory).map_err(|errno| format!("{place}: {errno}"))?;
        if mount.f_type != HUGETLBFS_MAGIC {
            return Err(format!("{place} is no hugetlbfs"));
        }
        if usize::try_from(mount.f_bsize) != Ok(pages.len()) {
            return Err(format!("the pages of {place} are of {} bytes", mount.f_bsize));
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!(".hugepage-alloc-{}-{number}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let unlinked = std::fs::remove_file(&path);
        unlinked.map_err(|error| format!("{}: {error}", path.display()))?;
        let base = rustix::fs::ftruncate(&file, len as u64)
            .and_then(|()| map_file(file.as_fd(), 0, len, true, None))
            .map_err(|errno| format!("{place}: {errno}"))?;
        Ok(Self { base, len, file: None, writable: true })
    }

    /// A file in memory that another process gave us. See [`crate::DmaRegion::from_file`] for what is refused.
    pub(crate) fn of_peer_file(
        file: OwnedFd,
        offset: u64,
        len: usize,
        writable: bool,
    ) -> Result<Self, PeerFileError> {
        let page_len = page_len_of(&file)?;
        if len == 0
            || len > 1 << 40
            || !len.is_multiple_of(page_len)
            || !offset.is_multiple_of(page_len as u64)
        {
            return Err(PeerFileError::Range { offset, len });
        }
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| PeerFileError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(PeerFileError::NotSealed);
        }
        // Now that it cannot shrink any more.
        let size = u64::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(PeerFileError::Range { offset, len });
        }
        if page_len > 4096 {
            // A huge page that is missing would show as SIGBUS on first touch.
            rustix::fs::fallocate(&file, FallocateFlags::empty(), offset, len as u64)?;
        }
        let base = map_file(&file, offset, len, writable, None)?;
        Ok(Self { base, len, file: None, writable })
    }

    pub(crate) const fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) const fn is_writable(&self) -> bool {
        self.writable
    }

    /// The file behind it, when another process may have it.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Has the pages come from `node` and no other. Only before they are touched.
    pub(crate) fn bind(&self, node: u32) -> Result<(), Errno> {
        const WORD_BITS: u32 = usize::BITS;
        if node >= NODES_MAX {
            return Err(Errno::INVAL);
        }
        let mut mask = [0usize; (NODES_MAX / WORD_BITS) as usize];
        mask[(node / WORD_BITS) as usize] = 1 << (node % WORD_BITS);
        // SAFETY: the range is the mapping that `self` owns, the mask lives through the call and is as long as is
        // said (the kernel counts one bit more than it reads); the policy does not change the contents.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.len,
                libc::MPOL_BIND,
                mask.as_ptr(),
                libc::c_ulong::from(NODES_MAX) + 1,
                0,
            )
        };
        if result == 0 { Ok(()) } else { Err(last_error()) }
    }

    /// The NUMA node of the first page, once it is touched; `None` when the kernel cannot tell.
    pub(crate) fn node(&self) -> Option<u32> {
        let mut node: libc::c_int = -1;
        // SAFETY: the node is written to a variable of ours; no mask is asked for; the address is in the mapping
        // that `self` owns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut node,
                ptr::null_mut::<libc::c_ulong>(),
                0,
                self.base.as_ptr(),
                MPOL_F_NODE | MPOL_F_ADDR,
            )
        };
        if result == 0 { u32::try_from(node).ok() } else { None }
    }

    /// Makes the kernel supply every page now. Without this a cgroup limit, or a node without huge pages, would
    /// show as SIGBUS on first touch.
    pub(crate) fn populate(&self) -> Result<(), Errno> {
        // SAFETY: the range is the mapping that `self` owns; touching pages does not change their contents.
        match unsafe { mm::madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxPopulateWrite) } {
            // EINVAL: a kernel before 5.14, which cannot say; the reservation made by mmap holds there.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Keeps the pages out of core dumps and forked children. Both are best effort: neither changes what works.
    pub(crate) fn keep_private(&self) {
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: the range is the mapping that `self` owns; neither advice changes its contents.
            let _ = unsafe { mm::madvise(self.base.as_ptr().cast(), self.len, advice) };
        }
    }

    pub(crate) fn lock(&self) -> Result<(), Errno> {
        // SAFETY: the range is the mapping that `self` owns; locking does not change its contents.
        unsafe { mm::mlock(self.base.as_ptr().cast(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.base.as_ptr(), self.len);
    }
}

/// Why a file of another process was not mapped.
#[derive(Debug, thiserror::Error)]
pub enum PeerFileError {
    /// It is no file in memory that can no longer shrink.
    #[error("the file can shrink under its users: only a memfd with F_SEAL_SHRINK is mapped")]
    NotSealed,
    /// The range leaves the file, or does not consist of whole pages.
    #[error("{len} bytes at {offset} are no whole pages of the file")]
    Range {
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        len: usize,
    },
    /// The kernel refused.
    #[error("mapping the file failed")]
    Map(#[from] Errno),
}

/// The length of the pages of a file in memory.
fn page_len_of(file: &OwnedFd) -> Result<usize, PeerFileError> {
    let filesystem = rustix::fs::fstatfs(file)?;
    if filesystem.f_type != HUGETLBFS_MAGIC {
        return Ok(4096);
    }
    usize::try_from(filesystem.f_bsize)
        .ok()
        .filter(|len| len.is_power_of_two())
        .ok_or(PeerFileError::NotSealed)
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// Maps `len` bytes at a multiple of 2 MiB, by mapping more and giving back both ends.
fn reserve_aligned(len: usize, protection: ProtFlags) -> Result<NonNull<u8>, Errno> {
    let mapped = len.checked_add(BUFFER_LEN_MAX).ok_or(Errno::NOMEM)?;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let whole = unsafe { mm::mmap_anonymous(ptr::null_mut(), mapped, protection, MapFlags::PRIVATE)? };
    let whole = whole.cast::<u8>();
    let head = whole.align_offset(BUFFER_LEN_MAX);
    let base = whole.wrapping_add(head);
    unmap(whole, head);
    unmap(base.wrapping_add(len), mapped - head - len);
    NonNull::new(base).ok_or(Errno::NOMEM)
}

fn map_anonymous(len: usize, flags: MapFlags) -> Result<NonNull<u8>, Errno> {
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let base =
        unsafe { mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)? };
    NonNull::new(base.cast()).ok_or(Errno::NOMEM)
}

/// Maps a file, at an address of the kernel's choice or over `over`, a range that the caller owns and nobody uses.
fn map_file(
    file: impl AsFd,
    offset: u64,
    len: usize,
    writable: bool,
    over: Option<NonNull<u8>>,
) -> Result<NonNull<u8>, Errno> {
    let mut protection = ProtFlags::READ;
    protection.set(ProtFlags::WRITE, writable);
    let mut flags = MapFlags::SHARED;
    flags.set(MapFlags::FIXED, over.is_some());
    let at = over.map_or(ptr::null_mut(), |base| base.as_ptr().cast());
    // SAFETY: without `over` the kernel chooses an address where nothing is; with it, what is replaced is the
    // caller's reservation of the same length.
    let base = unsafe { mm::mmap(at, len, protection, flags, file, offset)? };
    NonNull::new(base.cast()).ok_or(Errno::NOMEM)
}

fn unmap(base: *mut u8, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: callers pass (the rest of) a mapping they own and give up.
    let result = unsafe { mm::munmap(base.cast::<c_void>(), len) };
    debug_assert!(result.is_ok(), "unmapping memory of ours failed: {result:?}");
}
