//! The data pointer of a command (Base sections 4.3.1, 4.3.2).
//!
//! ```text
//!   buffer      ...[####|########|########|##.....|      contiguous for the device, at any multiple of 4
//!   PRP1  ---------^    ^        ^        ^
//!   PRP2 or list -------'--------'--------'              each at the start of a page
//! ```

use hugepage_alloc::DmaRegion;
use nvme_spec::SglDescriptor;
use zerocopy::transmute;

/// Bytes of list that `transfer_len` bytes may need, as a power of two: the first page is PRP1's, and one may be cut.
pub(crate) const fn list_len(transfer_len: usize, page: usize) -> usize {
    let entries = transfer_len.div_ceil(page);
    let len = (entries * 8).next_power_of_two();
    // At least a cache line, and whole lines, for they are written line by line.
    if len < 64 { 64 } else { len }
}

/// PRP1 and PRP2 for `len` bytes at `iova`. `None` when they lie in more than two pages.
#[inline]
pub(crate) const fn without_list(iova: u64, len: u64, page: u64) -> Option<[u64; 2]> {
    let in_page = iova & (page - 1);
    let end = in_page + len;
    if end <= page {
        return Some([iova, 0]);
    }
    if end <= 2 * page { Some([iova, iova - in_page + page]) } else { None }
}

/// PRP1 and PRP2 for `len` bytes at `iova` in more than two pages, by a list. The list goes to position `list_at` of
/// `region`, which is `list_iova` to the device. Returns `None` when the list would not fit `list_len` bytes.
pub(crate) fn with_list(
    iova: u64,
    len: usize,
    page: usize,
    list: (&DmaRegion, usize, u64, usize),
) -> Option<[u64; 2]> {
    let mask = page as u64 - 1;
    let first_len = page - usize::try_from(iova & mask).ok()?;
    let next = (iova & !mask) + page as u64;
    let left = len.checked_sub(first_len)?;
    let (region, list_at, list_iova, list_len) = list;
    let entries = left.div_ceil(page);
    if entries * 8 > list_len {
        return None;
    }
    for line in 0..entries.div_ceil(8) {
        // Entries behind the last one are never read; all of a line is written at once.
        let at = |index: usize| next.wrapping_add(((line * 8 + index) * page) as u64).to_le();
        let words = [at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)];
        if !region.store_u64s(list_at + line * 64, words) {
            return None;
        }
    }
    Some([iova, list_iova])
}

/// PRP1 and PRP2 as the data pointer.
pub(crate) fn pointers(prp1: u64, prp2: u64) -> SglDescriptor {
    transmute!([prp1.to_le(), prp2.to_le()])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prp(iova: u64, len: usize, page: usize, list: (&DmaRegion, usize, u64, usize)) -> Option<[u64; 2]> {
        without_list(iova, len as u64, page as u64).or_else(|| with_list(iova, len, page, list))
    }

    #[test]
    fn every_offset_and_length_is_covered_page_by_page() {
        let region = DmaRegion::map(1, false, false).unwrap();
        for page in [4096usize, 65536] {
            for offset in [0usize, 4, 512, 2048, 4092, page - 4] {
                for len in [4usize, 512, 4096, 4100, 8192, 12288, 65536, 262_144] {
                    let iova = 0x10_0000_0000 + offset as u64;
                    let list_len = list_len(262_144, page);
                    let list = (&region, 4096, 0xAB000, list_len);
                    let [one, two] = prp(iova, len, page, list).unwrap();
                    assert_eq!(one, iova);
                    let first = len.min(page - offset % page);
                    let mut left = len - first;
                    if left == 0 {
                        assert_eq!(two, 0);
                    } else if left <= page {
                        assert_eq!(two, iova + first as u64);
                    } else {
                        assert_eq!(two, 0xAB000);
                        let mut expected = iova + first as u64;
                        for index in 0.. {
                            assert_eq!(region.load_u64(4096 + index * 8), Some(expected));
                            assert_eq!(expected % page as u64, 0);
                            expected += page as u64;
                            if left <= page {
                                break;
                            }
                            left -= page;
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_list_that_does_not_fit_is_none() {
        let region = DmaRegion::map(1, false, false).unwrap();
        assert!(prp(0x1000, 4096 * 10, 4096, (&region, 0, 0x9000, 64)).is_none());
        assert!(prp(0x1000, 4096 * 9, 4096, (&region, 0, 0x9000, 64)).is_some());
    }
}
