//! The pool of one core: 2 MiB pages, each carved into buffers of one size class.
//!
//! ```text
//!   free pages ----> 7 -> 3 -> 9
//!   class 4K  -----> 2 -> 5              pages with at least one free buffer; a full page is on no list
//!   class 64K -----> 0
//!                    page 0: used 3, carved 5, free 1 -> 4   (buffers 5.. were never handed out yet)
//! ```
//!
//! All state is in tables sized once. A buffer is named by its *slot*: the number of its first 4 KiB granule in the
//! pool. Taking and giving back are a few list operations each, whatever the state of the pool.

use std::cell::Cell;
use std::rc::Rc;

use crate::region::{BYTES_MAX, REGION_LEN_MAX, refuse_without_room};
use crate::{AllocError, BUFFER_ALIGN, BUFFER_LEN_MAX, Backing, DmaBuf, DmaRegion, RegionOptions};

/// Buffer sizes, as powers of two. All divide a page.
const CLASS_SHIFTS: [u8; 6] = [12, 14, 16, 18, 20, 21];
const GRANULES_PER_PAGE: usize = BUFFER_LEN_MAX / BUFFER_ALIGN;
const PAGE_NONE: u32 = u32::MAX;
const BUFFER_NONE: u16 = u16::MAX;
/// The list of free pages, after those of the classes.
const LIST_FREE: usize = CLASS_SHIFTS.len();

/// Of [`BufferPool::zeroes`]: a size class; and of how many pages a pool must be to spare it.
const ZEROES_LEN: u32 = 1 << 18;
const ZEROES_PAGES_MIN: usize = 8;

/// What a pool shall be, in short: [`RegionOptions`] say more.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// The size in bytes, rounded up to 2 MiB.
    pub bytes: usize,
    /// Whether 2 MiB huge pages are tried first.
    pub prefer_huge: bool,
    /// Whether ordinary pages shall be locked into memory.
    pub lock: bool,
}

impl Default for PoolOptions {
    /// 64 MiB, of huge pages when there are any.
    fn default() -> Self {
        Self { bytes: 64 << 20, prefer_huge: true, lock: true }
    }
}

/// How full a pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolStats {
    /// The size of the pool in bytes.
    pub bytes_total: usize,
    /// Bytes of buffers handed out, by the size of their class.
    pub bytes_in_use: usize,
    /// 2 MiB pages in the pool.
    pub pages_total: usize,
    /// 2 MiB pages that no class holds.
    pub pages_free: usize,
    /// How often [`BufferPool::alloc`] found nothing.
    pub exhausted_count: u64,
    /// The worst backing of the regions.
    pub backing: Backing,
}

/// One core's pool of buffers. A handle: cloning is cheap, and the memory stays mapped while a handle or a buffer
/// lives. Not `Send`.
///
/// Make it on the thread that uses it: the pages come from that thread's NUMA node.
#[derive(Clone, Debug)]
pub struct BufferPool {
    inner: PoolHandle,
}

impl BufferPool {
    /// Maps the memory of a pool and builds its tables.
    ///
    /// # Errors
    /// When the memory cannot be mapped. Missing huge pages are no error, see [`BufferPool::notice`].
    pub fn new(options: &PoolOptions) -> Result<Self, AllocError> {
        Self::with_options(options.bytes, &RegionOptions::of_flags(options.prefer_huge, options.lock))
    }

    /// Maps at least `bytes` of memory as the options say, and builds the tables of a pool over it. With 1 GiB pages
    /// the pool is a multiple of 1 GiB, else of 2 MiB.
    ///
    /// # Errors
    /// As [`crate::Region::with_options`].
    pub fn with_options(bytes: usize, options: &RegionOptions) -> Result<Self, AllocError> {
        if bytes == 0 || bytes > BYTES_MAX {
            return Err(AllocError::BadSize { bytes });
        }
        let mut left = bytes.next_multiple_of(BUFFER_LEN_MAX);
        let mut regions = Vec::with_capacity(left.div_ceil(REGION_LEN_MAX));
        while left > 0 {
            let len = left.min(REGION_LEN_MAX);
            let region = DmaRegion::with_options(len, options)?;
            left -= len;
            if !region.backing().is_huge() {
                // The rest will be of ordinary pages too: know that there are enough before touching them.
                refuse_without_room(left)?;
            }
            regions.push(region);
        }
        Ok(Self { inner: PoolHandle(Rc::new(Inner::new(regions))) })
    }

    /// A buffer of `len` bytes, 4096-aligned, physically contiguous on huge pages; `None` when the pool is
    /// exhausted or `len` is above 2 MiB. Its bytes are those its last user left.
    #[must_use]
    pub fn alloc(&self, len: u32) -> Option<DmaBuf> {
        let inner = &self.inner.0;
        let Some((ptr, slot)) = inner.take(len) else {
            inner.exhausted_count.set(inner.exhausted_count.get() + 1);
            return None;
        };
        Some(DmaBuf::new(self.inner.clone(), ptr, len, slot))
    }

    /// A buffer that is all zeros and the same for all who ask, for what reads as zeros without a device: 256 KiB of the
    /// pool, from the first call on. Whoever gets it only reads it. `None` when the pool is too small to spare that much, or
    /// exhausted.
    #[must_use]
    pub fn zeroes(&self) -> Option<DmaBuf> {
        let inner = &self.inner.0;
        if inner.pages.len() < ZEROES_PAGES_MIN {
            return None;
        }
        if let Some((ptr, slot)) = inner.zeroes.get() {
            self.inner.retain(slot);
            return Some(DmaBuf::new(self.inner.clone(), ptr, ZEROES_LEN, slot));
        }
        let (ptr, slot) = inner.take(ZEROES_LEN)?;
        let zeroes = DmaBuf::new(self.inner.clone(), ptr, ZEROES_LEN, slot);
        zeroes.zero();
        // The pool's own count, which it keeps. It is no buffer in use: of these an idle pool has none.
        self.inner.retain(slot);
        inner.zeroes.set(Some((ptr, slot)));
        Some(zeroes)
    }

    /// Bytes that no buffer holds. Not all of them need be fit for a buffer of any size: pages are carved by class.
    #[must_use]
    #[inline]
    pub fn bytes_free(&self) -> usize {
        self.inner.0.bytes_free.get()
    }

    /// Address and length of each region, for registration with io_uring or DMA mapping. The order is that of
    /// [`DmaBuf::region_index`].
    pub fn regions(&self) -> impl Iterator<Item = (*const u8, usize)> {
        self.inner.0.regions.iter().map(|region| (region.as_ptr().cast_const(), region.len()))
    }

    /// The regions themselves, in the same order: a device that maps them keeps them mapped beyond the pool's life.
    pub fn dma_regions(&self) -> impl Iterator<Item = &DmaRegion> {
        self.inner.0.regions.iter()
    }

    /// The worst backing of the regions.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.inner.0.regions.iter().map(DmaRegion::backing).max().unwrap_or(Backing::OrdinaryUnlocked)
    }

    /// Why the memory is not of a better kind, and what to do about it.
    #[must_use]
    pub fn notice(&self) -> Option<&str> {
        self.inner.0.regions.iter().find_map(DmaRegion::notice)
    }

    /// How full the pool is.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let inner = &self.inner.0;
        let zeroes_len = inner.zeroes.get().map_or(0, |_| ZEROES_LEN as usize);
        PoolStats {
            bytes_total: inner.pages.len() * BUFFER_LEN_MAX,
            bytes_in_use: inner.pages.len() * BUFFER_LEN_MAX - inner.bytes_free.get() - zeroes_len,
            pages_total: inner.pages.len(),
            pages_free: inner.pages_free.get(),
            exhausted_count: inner.exhausted_count.get(),
            backing: self.backing(),
        }
    }

    pub(crate) const fn handle(&self) -> &PoolHandle {
        &self.inner
    }
}

/// A buffer's place in the tables: page and first granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(u32);

impl Slot {
    pub(crate) const fn page(self) -> usize {
        self.0 as usize / GRANULES_PER_PAGE
    }

    const fn granule(self) -> usize {
        self.0 as usize % GRANULES_PER_PAGE
    }
}

/// What a buffer holds of its pool.
#[derive(Clone, Debug)]
pub(crate) struct PoolHandle(Rc<Inner>);

impl PoolHandle {
    #[inline]
    pub(crate) fn retain(&self, slot: Slot) {
        let count = &self.0.counts[slot.0 as usize];
        // Overflow checks are on in every profile: four thousand million clones panic, they do not wrap.
        count.set(count.get() + 1);
    }

    pub(crate) fn release(&self, slot: Slot) {
        let count = &self.0.counts[slot.0 as usize];
        let left = count.get() - 1;
        count.set(left);
        if left == 0 {
            self.0.give_back(slot);
        }
    }

    pub(crate) fn is_sole(&self, slot: Slot) -> bool {
        self.0.counts[slot.0 as usize].get() == 1
    }

    pub(crate) fn region_of(&self, slot: Slot) -> u16 {
        self.0.pages[slot.page()].region
    }

    /// The position of `ptr`, an address in the buffer at `slot`, in its region.
    pub(crate) fn offset_of(&self, slot: Slot, ptr: *const u8) -> usize {
        let region = &self.0.regions[usize::from(self.region_of(slot))];
        ptr.addr() - region.as_ptr().addr()
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

/// One 2 MiB page.
#[derive(Debug)]
struct Page {
    base: *mut u8,
    region: u16,
    /// Index in `CLASS_SHIFTS`; meaningless on the free list.
    class: Cell<u8>,
    /// Buffers handed out.
    used: Cell<u16>,
    /// Buffers ever handed out since the page was carved; those above need no free-list entry.
    carved: Cell<u16>,
    /// The first free buffer among the carved ones.
    free: Cell<u16>,
    next: Cell<u32>,
    prev: Cell<u32>,
}

#[derive(Debug)]
struct Inner {
    regions: Vec<DmaRegion>,
    pages: Box<[Page]>,
    /// Living slices of each buffer, by slot.
    counts: Box<[Cell<u32>]>,
    /// The free buffer after this one in its page, by slot.
    links: Box<[Cell<u16>]>,
    /// First page of each list.
    lists: [Cell<u32>; LIST_FREE + 1],
    pages_free: Cell<usize>,
    bytes_free: Cell<usize>,
    exhausted_count: Cell<u64>,
    /// See [`BufferPool::zeroes`].
    zeroes: Cell<Option<(*mut u8, Slot)>>,
}

impl Inner {
    fn new(regions: Vec<DmaRegion>) -> Self {
        let mut pages = Vec::with_capacity(regions.iter().map(|r| r.len() / BUFFER_LEN_MAX).sum());
        // At most 1 TiB in regions of 1 GiB: 1024 regions.
        for (index, region) in (0u16..).zip(&regions) {
            for start in (0..region.len()).step_by(BUFFER_LEN_MAX) {
                pages.push(Page {
                    base: region.as_ptr().wrapping_add(start),
                    region: index,
                    class: Cell::new(0),
                    used: Cell::new(0),
                    carved: Cell::new(0),
                    free: Cell::new(BUFFER_NONE),
                    next: Cell::new(PAGE_NONE),
                    prev: Cell::new(PAGE_NONE),
                });
            }
        }
        let granules = pages.len() * GRANULES_PER_PAGE;
        let inner = Self {
            regions,
            pages: pages.into_boxed_slice(),
            counts: vec![Cell::new(0); granules].into_boxed_slice(),
            links: vec![Cell::new(BUFFER_NONE); granules].into_boxed_slice(),
            lists: [const { Cell::new(PAGE_NONE) }; LIST_FREE + 1],
            pages_free: Cell::new(0),
            bytes_free: Cell::new(granules * BUFFER_ALIGN),
            exhausted_count: Cell::new(0),
            zeroes: Cell::new(None),
        };
        // The lowest page comes out first.
        for page in (0u32..).take(inner.pages.len()).collect::<Vec<_>>().into_iter().rev() {
            inner.push(LIST_FREE, page);
        }
        inner.pages_free.set(inner.pages.len());
        inner
    }

    /// Takes a buffer for `len` bytes, with a count of one.
    #[inline]
    fn take(&self, len: u32) -> Option<(*mut u8, Slot)> {
        if len <= 1 << CLASS_SHIFTS[0] {
            // Of nearly all: compiled for this class by itself.
            return self.take_of(0);
        }
        let class = CLASS_SHIFTS.iter().position(|&shift| len <= 1 << shift)?;
        self.take_of(class)
    }

    #[inline(always)]
    fn take_of(&self, class: usize) -> Option<(*mut u8, Slot)> {
        let mut page_index = self.lists[class].get();
        if page_index == PAGE_NONE {
            page_index = self.open_page(class)?;
        }
        let page = &self.pages[page_index as usize];
        let granules_shift = CLASS_SHIFTS[class] - CLASS_SHIFTS[0];
        let first = page_index as usize * GRANULES_PER_PAGE;
        let buffer = if page.free.get() == BUFFER_NONE {
            let fresh = page.carved.get();
            page.carved.set(fresh + 1);
            fresh
        } else {
            let free = page.free.get();
            page.free.set(self.links[first + ((free as usize) << granules_shift)].get());
            free
        };
        page.used.set(page.used.get() + 1);
        if usize::from(page.used.get()) == GRANULES_PER_PAGE >> granules_shift {
            self.unlink(class, page_index);
        }
        let granule = (buffer as usize) << granules_shift;
        let slot = first + granule;
        self.counts[slot].set(1);
        self.bytes_free.set(self.bytes_free.get() - (1 << CLASS_SHIFTS[class]));
        let slot = Slot(u32::try_from(slot).ok()?);
        Some((page.base.wrapping_add(granule * BUFFER_ALIGN), slot))
    }

    /// Gives a free page to `class`.
    #[inline(never)]
    fn open_page(&self, class: usize) -> Option<u32> {
        let index = self.lists[LIST_FREE].get();
        if index == PAGE_NONE {
            return None;
        }
        self.unlink(LIST_FREE, index);
        self.pages_free.set(self.pages_free.get() - 1);
        let page = &self.pages[index as usize];
        page.class.set(u8::try_from(class).ok()?);
        page.used.set(0);
        page.carved.set(0);
        page.free.set(BUFFER_NONE);
        self.push(class, index);
        Some(index)
    }

    fn give_back(&self, slot: Slot) {
        let page = &self.pages[slot.page()];
        match usize::from(page.class.get()) {
            // As in [`Inner::take`].
            0 => self.give_back_to(0, slot, page),
            class => self.give_back_to(class, slot, page),
        }
    }

    #[inline(always)]
    fn give_back_to(&self, class: usize, slot: Slot, page: &Page) {
        let Ok(page_index) = u32::try_from(slot.page()) else { return };
        let granules_shift = CLASS_SHIFTS[class] - CLASS_SHIFTS[0];
        let was_full = usize::from(page.used.get()) == GRANULES_PER_PAGE >> granules_shift;
        page.used.set(page.used.get() - 1);
        self.bytes_free.set(self.bytes_free.get() + (1 << CLASS_SHIFTS[class]));
        if page.used.get() == 0 {
            if !was_full {
                self.unlink(class, page_index);
            }
            self.push(LIST_FREE, page_index);
            self.pages_free.set(self.pages_free.get() + 1);
            return;
        }
        #[expect(clippy::cast_possible_truncation, reason = "below 512")]
        let buffer = (slot.granule() >> granules_shift) as u16;
        self.links[slot.0 as usize].set(page.free.get());
        page.free.set(buffer);
        if was_full {
            self.push(class, page_index);
        }
    }

    #[inline(never)]
    fn push(&self, list: usize, index: u32) {
        let head = &self.lists[list];
        let page = &self.pages[index as usize];
        page.prev.set(PAGE_NONE);
        page.next.set(head.get());
        if let Some(next) = self.pages.get(head.get() as usize) {
            next.prev.set(index);
        }
        head.set(index);
    }

    #[inline(never)]
    fn unlink(&self, list: usize, index: u32) {
        let page = &self.pages[index as usize];
        let (prev, next) = (page.prev.get(), page.next.get());
        match self.pages.get(prev as usize) {
            Some(before) => before.next.set(next),
            None => self.lists[list].set(next),
        }
        if let Some(after) = self.pages.get(next as usize) {
            after.prev.set(prev);
        }
    }
}
