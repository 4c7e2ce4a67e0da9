//! One region of memory: where it came from, and why not from better.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use crate::host::HugePageCounts;
use crate::mapping::Mapping;
use crate::{AllocError, BUFFER_LEN_MAX};

/// The most one region of a pool holds: a registered io_uring buffer ends at 1 GiB (kernel, `io_uring/rsrc.c`).
pub(crate) const REGION_LEN_MAX: usize = 1 << 30;
/// The most that is mapped at once.
pub(crate) const BYTES_MAX: usize = 1 << 40;

/// The size of the pages that are wished for, largest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pages {
    /// 1 GiB pages of hugetlbfs. Then 2 MiB ones are the next best.
    Huge1G,
    /// 2 MiB pages of hugetlbfs.
    Huge2M,
    /// Ordinary pages.
    Ordinary,
}

impl Pages {
    /// The length of one page in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a page is never empty")]
    pub const fn len(self) -> usize {
        match self {
            Self::Huge1G => 1 << 30,
            Self::Huge2M => 2 << 20,
            Self::Ordinary => 4096,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Huge1G => "1 GiB huge pages",
            Self::Huge2M => "2 MiB huge pages",
            Self::Ordinary => "ordinary pages",
        }
    }
}

/// What kind of pages stand behind a mapping, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backing {
    /// 1 GiB pages of hugetlbfs.
    HugePages1G,
    /// 2 MiB pages of hugetlbfs: never swapped, one TLB entry for 2 MiB.
    HugePages2M,
    /// Ordinary pages, locked into memory; transparent huge pages when the kernel feels like it.
    OrdinaryLocked,
    /// Ordinary pages that may be swapped out: the limit on locked memory is too low, or no lock was asked for.
    OrdinaryUnlocked,
    /// Memory of another process, of whatever pages that one took.
    Peer,
}

impl Backing {
    /// Whether these are pages of hugetlbfs.
    #[must_use]
    pub const fn is_huge(self) -> bool {
        matches!(self, Self::HugePages1G | Self::HugePages2M)
    }
}

impl std::fmt::Display for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HugePages1G => "1 GiB huge pages",
            Self::HugePages2M => "2 MiB huge pages",
            Self::OrdinaryLocked => "ordinary pages, locked",
            Self::OrdinaryUnlocked => "ordinary pages, not locked",
            Self::Peer => "memory of another process",
        })
    }
}

/// How memory shall be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionOptions {
    /// The pages that are tried first. Lengths are rounded up to them.
    pub pages: Pages,
    /// Whether worse pages are taken, with a [notice](Region::notice), when the wished ones are not to be had.
    /// Otherwise that is an error.
    pub fallback: bool,
    /// Whether ordinary pages shall be locked into memory. Huge pages need no lock.
    pub lock: bool,
    /// Whether another process shall be able to map the memory, through the file of [`Region::file`].
    pub share: bool,
    /// The NUMA node that the pages shall come from and no other; `None` for the one of the calling thread. Take a
    /// device's from `/sys/bus/pci/devices/*/numa_node`.
    pub node: Option<u32>,
    /// The directory of a hugetlbfs mount that huge pages are taken from, for a host that limits its users by
    /// mounts (`size=`, `uid=`). `None` takes them from the kernel's pool. Cannot be shared.
    pub hugetlbfs: Option<PathBuf>,
}

impl Default for RegionOptions {
    /// 2 MiB pages, else locked ordinary ones; not shared; of the thread's node.
    fn default() -> Self {
        Self { pages: Pages::Huge2M, fallback: true, lock: true, share: false, node: None, hugetlbfs: None }
    }
}

impl RegionOptions {
    /// Ordinary pages that are not locked: for tests, and for memory that no device reaches.
    #[must_use]
    pub fn ordinary() -> Self {
        Self { pages: Pages::Ordinary, lock: false, ..Self::default() }
    }

    /// The short form that some constructors take.
    pub(crate) fn of_flags(prefer_huge: bool, lock: bool) -> Self {
        let pages = if prefer_huge { Pages::Huge2M } else { Pages::Ordinary };
        Self { pages, lock, ..Self::default() }
    }
}

/// One mapping, unmapped on drop. Its length is a multiple of 2 MiB, and so is its address.
///
/// The pages are touched by the thread that maps them, so that they lie on that thread's NUMA node unless the
/// options name another. They are kept out of core dumps (they hold the hosts' data) and out of forked children
/// (which would turn pages under DMA into copies).
#[derive(Debug)]
pub struct Region {
    mapping: Mapping,
    backing: Backing,
    notice: Option<String>,
}

impl Region {
    /// Maps at least `bytes`, rounded up to 2 MiB, of zeroed memory, of 2 MiB huge pages when they are preferred
    /// and there are any. [`Region::with_options`] in short.
    ///
    /// # Errors
    /// When not even ordinary pages can be mapped; whatever is better and missing is told by [`Region::notice`].
    pub fn map(bytes: usize, prefer_huge: bool, lock: bool) -> Result<Self, AllocError> {
        Self::with_options(bytes, &RegionOptions::of_flags(prefer_huge, lock))
    }

    /// Maps at least `bytes`, rounded up to whole pages, of zeroed memory.
    ///
    /// # Errors
    /// When the options contradict each other, name a node that the host does not have, or nothing that they allow
    /// can be mapped.
    pub fn with_options(bytes: usize, options: &RegionOptions) -> Result<Self, AllocError> {
        if bytes == 0 || bytes > BYTES_MAX {
            return Err(AllocError::BadSize { bytes });
        }
        if options.share && options.hugetlbfs.is_some() {
            return Err(AllocError::BadOptions {
                why: "a file on hugetlbfs cannot be sealed and is not shared: leave out the mount, or the sharing",
            });
        }
        let mut notices = Vec::new();
        for (pages, backing) in [(Pages::Huge1G, Backing::HugePages1G), (Pages::Huge2M, Backing::HugePages2M)]
        {
            if pages < options.pages {
                continue;
            }
            let len = bytes.next_multiple_of(pages.len());
            match map_huge(len, pages, options) {
                Ok(mapping) => return Ok(Self { mapping, backing, notice: joined(notices) }),
                Err(Missing::Node(error)) => return Err(error),
                Err(Missing::Pages(why)) => notices.push(notice(len, pages, options, &why)),
            }
            if !options.fallback {
                return Err(AllocError::NoHugePages { why: notices.join("; ") });
            }
        }
        Self::map_ordinary(bytes.next_multiple_of(BUFFER_LEN_MAX), options, notices)
    }

    fn map_ordinary(
        len: usize,
        options: &RegionOptions,
        mut notices: Vec<String>,
    ) -> Result<Self, AllocError> {
        refuse_without_room(len)?;
        let failed = |source| AllocError::Map { bytes: len, source };
        let mapping = if options.share {
            Mapping::of_memfd(len, Pages::Ordinary)
        } else {
            Mapping::anonymous(len, Pages::Ordinary)
        };
        let mapping = mapping.map_err(failed)?;
        bind(&mapping, options.node)?;
        mapping.populate().map_err(failed)?;
        mapping.keep_private();
        let mut backing = Backing::OrdinaryUnlocked;
        if options.lock {
            match mapping.lock() {
                Ok(()) => backing = Backing::OrdinaryLocked,
                Err(errno) => notices.push(format!(
                    "{len} bytes could not be locked into memory ({errno}): raise RLIMIT_MEMLOCK (systemd: \
                     LimitMEMLOCK=infinity)"
                )),
            }
        }
        Ok(Self { mapping, backing, notice: joined(notices) })
    }

    /// A region of another process's memory.
    pub(crate) const fn of_peer(mapping: Mapping) -> Self {
        Self { mapping, backing: Backing::Peer, notice: None }
    }

    /// The first byte. Raw, because a device may write here at any time.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// The length in bytes, a multiple of 2 MiB.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub const fn len(&self) -> usize {
        self.mapping.len()
    }

    /// The kind of pages that was got.
    #[must_use]
    pub const fn backing(&self) -> Backing {
        self.backing
    }

    /// Why it is not a better kind, and what to do about it; `None` when nothing better was asked for.
    #[must_use]
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// The file in memory through which another process maps the region, and the position in it of the region's
    /// first byte; `None` when it was not asked to be shared.
    ///
    /// The file can neither shrink nor grow. Who has it can still punch holes into it, after which those pages read
    /// as zeros; should the host then have no huge page left, touching one ends the process (SIGBUS). So share
    /// memory only with a process that is trusted like a device.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.mapping.file().map(|file| (file, 0))
    }

    /// The NUMA node that the first page came from; `None` when the kernel cannot tell.
    #[must_use]
    pub fn node(&self) -> Option<u32> {
        self.mapping.node()
    }

    pub(crate) const fn is_writable(&self) -> bool {
        self.mapping.is_writable()
    }
}

/// Why huge pages were not got.
enum Missing {
    /// There are none: ordinary ones may do.
    Pages(String),
    /// The options are wrong: nothing else will do.
    Node(AllocError),
}

fn map_huge(len: usize, pages: Pages, options: &RegionOptions) -> Result<Mapping, Missing> {
    let missing = |errno: rustix::io::Errno| Missing::Pages(errno.to_string());
    let mapping = match &options.hugetlbfs {
        Some(directory) => Mapping::of_hugetlbfs(directory, len, pages).map_err(Missing::Pages)?,
        None if options.share => Mapping::of_memfd(len, pages).map_err(missing)?,
        None => Mapping::anonymous(len, pages).map_err(missing)?,
    };
    bind(&mapping, options.node).map_err(Missing::Node)?;
    mapping.populate().map_err(missing)?;
    mapping.keep_private();
    Ok(mapping)
}

fn bind(mapping: &Mapping, node: Option<u32>) -> Result<(), AllocError> {
    match node {
        Some(node) => mapping.bind(node).map_err(|source| AllocError::Node { node, source }),
        None => Ok(()),
    }
}

fn notice(len: usize, pages: Pages, options: &RegionOptions, why: &str) -> String {
    let wanted = len / pages.len();
    let on_node = options.node.map_or_else(String::new, |node| format!(" on node {node}"));
    let free = HugePageCounts::read(pages, options.node).map_or(0, |counts| counts.free);
    let more = wanted.saturating_sub(free).max(1);
    let how = match (pages, options.node) {
        (Pages::Huge2M, None) => "with `sysctl vm.nr_hugepages`".to_owned(),
        (Pages::Huge1G, None) => "with `hugepagesz=1G hugepages=N` on the kernel's command line".to_owned(),
        (_, Some(_)) => match HugePageCounts::directory(pages, options.node) {
            Some(directory) => format!("in {}/nr_hugepages", directory.display()),
            None => "on that node".to_owned(),
        },
        (Pages::Ordinary, None) => String::new(),
    };
    let name = pages.name();
    format!(
        "no {name}{on_node} for {len} bytes ({why}): lesser pages are used; {free} are free, reserve {more} more {how}"
    )
}

fn joined(notices: Vec<String>) -> Option<String> {
    (!notices.is_empty()).then(|| notices.join("; "))
}

/// Refuses `bytes` of ordinary pages that the host does not have. Touching them would wake the OOM killer, which
/// ends whatever process it finds the largest. A host that does not tell (no `/proc`) is taken at its word by mmap.
pub(crate) fn refuse_without_room(bytes: usize) -> Result<(), AllocError> {
    match std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(available) {
        Some(available) if bytes > available => Err(AllocError::NoRoom { bytes, available }),
        _ => Ok(()),
    }
}

/// `MemAvailable` of `/proc/meminfo`, in bytes (kernel, `Documentation/filesystems/proc.rst`).
fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let text = "MemTotal:       24682416 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(available(text), Some(1 << 20));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn more_than_the_host_has_is_refused_before_a_page_is_touched() {
        assert!(
            matches!(Region::map(1 << 40, false, false), Err(AllocError::NoRoom { bytes, .. }) if bytes == 1 << 40)
        );
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        let options = RegionOptions {
            share: true,
            hugetlbfs: Some(PathBuf::from("/dev/hugepages")),
            ..RegionOptions::default()
        };
        assert!(matches!(Region::with_options(1, &options), Err(AllocError::BadOptions { .. })));
    }

    #[test]
    fn a_mount_that_is_none_is_told() {
        let options = RegionOptions {
            hugetlbfs: Some(PathBuf::from("/proc")),
            lock: false,
            ..RegionOptions::default()
        };
        let region = Region::with_options(1, &options).unwrap();
        assert_eq!(region.backing(), Backing::OrdinaryUnlocked);
        assert!(region.notice().unwrap().contains("/proc is no hugetlbfs"), "{:?}", region.notice());
        let strict = RegionOptions { fallback: false, ..options };
        assert!(matches!(Region::with_options(1, &strict), Err(AllocError::NoHugePages { .. })));
    }
}
