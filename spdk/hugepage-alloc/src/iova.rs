//! Addresses for devices behind an IOMMU: which are free, which are given out.
//!
//! ```text
//!   what the IOMMU can translate   |0-------------|      |-------------------------------|
//!   allowed                         ^ never page 0   hole (such as MSI, 0xFEE0_0000)
//!   given out                        AAAA  BB              CCCCCCCC
//! ```
//!
//! Whoever owns an address space (a VFIO container, a socket to a software device) owns one allocator for it and asks
//! it before each mapping. The lowest free range that fits is taken. For the control path: the cost grows with the
//! number of free ranges.

use std::collections::BTreeMap;

/// What lengths are rounded up to, in bytes: the smallest page of an IOMMU.
pub const IOVA_GRANULE: u64 = 4096;

/// Hands out ranges of device addresses that never overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IovaAllocator {
    /// First to last address of each free range. No two touch.
    free: BTreeMap<u64, u64>,
    /// First to last address of each range given out.
    used: BTreeMap<u64, u64>,
}

impl IovaAllocator {
    /// An allocator over ranges of allowed addresses, each from its first to its last address, both included. They
    /// may overlap and be in any order; what is no whole granule is left out, and so is a range whose last address
    /// lies below its first.
    ///
    /// Page 0 is never handed out, so that a forgotten address is not a valid one.
    #[must_use]
    pub fn new(allowed: &[(u64, u64)]) -> Self {
        let mut allocator = Self::default();
        for &(first, last) in allowed.iter().filter(|(first, last)| first <= last) {
            let Some(start) = align_up(first.max(IOVA_GRANULE), IOVA_GRANULE) else { continue };
            // Behind the last whole granule; 0 stands for 2^64.
            let end = last.wrapping_add(1) & !(IOVA_GRANULE - 1);
            if last >= start && (end == 0 || end > start) {
                allocator.release(start, end.wrapping_sub(1));
            }
        }
        allocator
    }

    /// Takes `len_bytes` (rounded up to [`IOVA_GRANULE`]) at a multiple of `align_bytes`. `None` when there is no
    /// such range, when the length is 0, or when the alignment is no power of two.
    #[must_use]
    pub fn allocate(&mut self, len_bytes: u64, align_bytes: u64) -> Option<u64> {
        if !align_bytes.is_power_of_two() {
            return None;
        }
        let len = rounded(len_bytes)?;
        let align = align_bytes.max(IOVA_GRANULE);
        let (start, last) = self.free.iter().find_map(|(&first, &free_last)| {
            let start = align_up(first, align)?;
            let last = start.checked_add(len - 1)?;
            (last <= free_last).then_some((start, last))
        })?;
        self.take(start, last);
        self.used.insert(start, last);
        Some(start)
    }

    /// Takes the very range of `len_bytes` from `start`. Returns false, and takes nothing, when not all of it is
    /// free or `start` is no multiple of [`IOVA_GRANULE`].
    #[must_use]
    pub fn reserve(&mut self, start: u64, len_bytes: u64) -> bool {
        let Some(len) = rounded(len_bytes).filter(|_| start.is_multiple_of(IOVA_GRANULE)) else {
            return false;
        };
        let Some(last) = start.checked_add(len - 1) else { return false };
        let inside = self.free.range(..=start).next_back().is_some_and(|(_, &free_last)| last <= free_last);
        if inside {
            self.take(start, last);
            self.used.insert(start, last);
        }
        inside
    }

    /// Gives back a range as it was taken. Returns false, and changes nothing, when there is no such range.
    #[must_use]
    pub fn free(&mut self, start: u64, len_bytes: u64) -> bool {
        let Some(last) = rounded(len_bytes).and_then(|len| start.checked_add(len - 1)) else { return false };
        if self.used.get(&start) != Some(&last) {
            return false;
        }
        self.used.remove(&start);
        self.release(start, last);
        true
    }

    /// Bytes that are given out.
    #[must_use]
    pub fn bytes_used(&self) -> u64 {
        self.used.iter().map(|(start, last)| last - start + 1).sum()
    }

    /// The length of the longest free range in bytes, whatever its alignment.
    #[must_use]
    pub fn bytes_free_max(&self) -> u64 {
        self.free.iter().map(|(start, last)| (last - start).saturating_add(1)).max().unwrap_or(0)
    }

    /// Cuts a range out of the free one that holds it.
    fn take(&mut self, start: u64, last: u64) {
        let Some((&first, &free_last)) = self.free.range(..=start).next_back() else { return };
        self.free.remove(&first);
        if first < start {
            self.free.insert(first, start - 1);
        }
        if last < free_last {
            self.free.insert(last + 1, free_last);
        }
    }

    /// Adds a range to the free ones, joined with all that overlap or touch it.
    fn release(&mut self, mut start: u64, mut last: u64) {
        if let Some((&first, &before)) = self.free.range(..=start).next_back()
            && before.saturating_add(1) >= start
        {
            self.free.remove(&first);
            (start, last) = (first, last.max(before));
        }
        while let Some((&first, &after)) = self.free.range(start..).next() {
            if first > last.saturating_add(1) {
                break;
            }
            self.free.remove(&first);
            last = last.max(after);
        }
        self.free.insert(start, last);
    }
}

/// A length in whole granules; `None` for 0 and for what leaves 64 bits.
fn rounded(len_bytes: u64) -> Option<u64> {
    if len_bytes == 0 { None } else { align_up(len_bytes, IOVA_GRANULE) }
}

/// `align` is a power of two.
fn align_up(at: u64, align: u64) -> Option<u64> {
    Some(at.checked_add(align - 1)? & !(align - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = IOVA_GRANULE;
    /// Pages that the naive model knows of.
    const PAGES: usize = 64;

    /// A page is forbidden, free, or held by the allocation with this number.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum PageState {
        Forbidden,
        Free,
        Held(usize),
    }

    struct Naive {
        pages: [PageState; PAGES],
    }

    impl Naive {
        fn new(allowed: &[(u64, u64)]) -> Self {
            let mut pages = [PageState::Forbidden; PAGES];
            for (at, page) in (0u64..).zip(&mut pages).skip(1) {
                // The ranges below are whole pages.
                if allowed.iter().any(|&(first, last)| first <= at * PAGE && at * PAGE + PAGE - 1 <= last) {
                    *page = PageState::Free;
                }
            }
            Self { pages }
        }

        /// The lowest place for `count` pages at a multiple of `align` pages.
        fn place(&self, count: usize, align: usize) -> Option<usize> {
            (0..PAGES).step_by(align).find(|&at| {
                self.pages
                    .get(at..at + count)
                    .is_some_and(|pages| pages.iter().all(|&p| p == PageState::Free))
            })
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate { bytes: u64, align_shift: u32 },
        Reserve { page: u32, bytes: u64 },
        Free(prop::sample::Index),
        FreeWrongly { page: u32, bytes: u64 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (1..=9 * PAGE, 0u32..16).prop_map(|(bytes, align_shift)| Step::Allocate { bytes, align_shift }),
            1 => (0..64u32, 1..=5 * PAGE).prop_map(|(page, bytes)| Step::Reserve { page, bytes }),
            3 => any::<prop::sample::Index>().prop_map(Step::Free),
            1 => (0..64u32, 1..=5 * PAGE).prop_map(|(page, bytes)| Step::FreeWrongly { page, bytes }),
        ];
        prop::collection::vec(step, 1..200)
    }

    fn allowed() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let range = (0..PAGES as u64, 1..20u64).prop_map(|(page, count)| {
            let end = (page + count).min(PAGES as u64);
            (page * PAGE, end * PAGE - 1)
        });
        prop::collection::vec(range, 0..5)
    }

    #[expect(clippy::cast_possible_truncation, reason = "a few pages")]
    fn pages_of(bytes: u64) -> usize {
        bytes.div_ceil(PAGE) as usize
    }

    proptest! {
        #[test]
        fn does_what_a_table_of_pages_does(allowed in allowed(), steps in steps()) {
            let mut allocator = IovaAllocator::new(&allowed);
            let mut naive = Naive::new(&allowed);
            let mut held: Vec<(usize, u64, u64)> = Vec::new();
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Allocate { bytes, align_shift } => {
                        let align = (1 << align_shift) as usize;
                        let place = naive.place(pages_of(bytes), align.div_ceil(4096));
                        let got = allocator.allocate(bytes, 1 << align_shift);
                        prop_assert_eq!(got, place.map(|at| at as u64 * PAGE));
                        if let Some(at) = place {
                            naive.pages[at..at + pages_of(bytes)].fill(PageState::Held(number));
                            held.push((number, at as u64 * PAGE, bytes));
                        }
                    }
                    Step::Reserve { page, bytes } => {
                        let at = page as usize;
                        let range = naive.pages.get_mut(at..at + pages_of(bytes));
                        let range = range.filter(|pages| pages.iter().all(|&p| p == PageState::Free));
                        prop_assert_eq!(allocator.reserve(u64::from(page) * PAGE, bytes), range.is_some());
                        if let Some(pages) = range {
                            pages.fill(PageState::Held(number));
                            held.push((number, u64::from(page) * PAGE, bytes));
                        }
                    }
                    Step::Free(index) if !held.is_empty() => {
                        let (owner, start, bytes) = held.swap_remove(index.index(held.len()));
                        prop_assert!(allocator.free(start, bytes));
                        prop_assert!(!allocator.free(start, bytes), "twice");
                        for page in &mut naive.pages {
                            if *page == PageState::Held(owner) {
                                *page = PageState::Free;
                            }
                        }
                    }
                    Step::Free(_) => {}
                    Step::FreeWrongly { page, bytes } => {
                        let at = u64::from(page) * PAGE;
                        let there = held.iter().any(|&(_, start, len)| {
                            start == at && pages_of(len) == pages_of(bytes)
                        });
                        if !there {
                            prop_assert!(!allocator.free(at, bytes));
                        }
                    }
                }
                let used = naive.pages.iter().filter(|page| matches!(page, PageState::Held(_))).count();
                prop_assert_eq!(allocator.bytes_used(), used as u64 * PAGE);
            }
            for (_, start, bytes) in held {
                prop_assert!(allocator.free(start, bytes));
            }
            prop_assert_eq!(allocator, IovaAllocator::new(&allowed));
        }

        #[test]
        fn no_numbers_lead_out_of_the_ranges(
            allowed in prop::collection::vec((any::<u64>(), any::<u64>()), 0..4),
            asks in prop::collection::vec((any::<u64>(), any::<u64>(), 0u32..64), 0..20),
        ) {
            let mut allocator = IovaAllocator::new(&allowed);
            let mut got: Vec<(u64, u64)> = Vec::new();
            for (len, shrink, align_shift) in asks {
                let len = len >> (shrink % 64);
                let Some(start) = allocator.allocate(len, 1 << align_shift) else { continue };
                let last = start + (len - 1);
                prop_assert!(start.is_multiple_of(1 << align_shift) && start >= PAGE);
                prop_assert!(got.iter().all(|&(first, end)| last < first || end < start));
                // Random ranges of 64 bits seldom touch; each end must lie in one of them.
                for at in [start, last] {
                    prop_assert!(allowed.iter().any(|&(first, end)| (first..=end).contains(&at)));
                }
                got.push((start, last));
            }
        }
    }

    #[test]
    fn all_of_64_bits_can_be_given_but_not_page_0() {
        let mut allocator = IovaAllocator::new(&[(0, u64::MAX)]);
        assert_eq!(allocator.bytes_free_max(), u64::MAX - PAGE + 1);
        assert_eq!(allocator.allocate(PAGE, 1), Some(PAGE));
        assert!(allocator.reserve(u64::MAX - PAGE + 1, PAGE));
        assert!(!allocator.reserve(u64::MAX - PAGE + 1, PAGE));
        assert!(!allocator.reserve(0, PAGE));
        assert_eq!(allocator.allocate(1 << 62, 1 << 62), Some(1 << 62));
        assert!(allocator.free(u64::MAX - PAGE + 1, PAGE));
    }

    #[test]
    fn senseless_questions_have_no_answer() {
        let mut allocator = IovaAllocator::new(&[(PAGE, 0), (5, 4), (0x1_0001, 0x1_1FFF)]);
        assert_eq!(allocator.bytes_free_max(), PAGE, "only whole pages");
        assert_eq!(allocator.allocate(0, PAGE), None);
        assert_eq!(allocator.allocate(1, 3), None);
        assert_eq!(allocator.allocate(1, 0), None);
        assert_eq!(allocator.allocate(u64::MAX, 1), None);
        assert_eq!(allocator.allocate(1, 1 << 63), None);
        assert!(!allocator.free(0x1_1000, u64::MAX));
        assert_eq!(allocator.allocate(1, 1), Some(0x1_1000));
    }

    #[test]
    fn holes_are_not_crossed() {
        let mut allocator = IovaAllocator::new(&[(0, 0xFEDF_FFFF), (0xFEF0_0000, 0xFFFF_FFFF)]);
        assert!(allocator.reserve(PAGE, 0xFEDF_0000 - PAGE));
        assert_eq!(allocator.allocate(2 << 20, 2 << 20), Some(0xFF00_0000));
    }
}
