//! The data pointer of a command: where its data is, and the list of its slot when that takes one.

use nvme_spec::SglDescriptor;
use nvme_spec::command::{psdt, sgl_sub_type, sgl_type};
use zerocopy::{IntoBytes, transmute};

use crate::access::DmaMapping;
use crate::kind::Kind;
use crate::limits::{COPY_RANGE_LEN, Limits, copy_range, deallocate_range};
use crate::prp;
use crate::ring::Rings;

/// The memory for the list of a command.
pub(crate) struct Lists<'a> {
    pub(crate) rings: &'a Rings,
    pub(crate) mapping: &'a DmaMapping,
    /// The command's slot.
    pub(crate) slot: u16,
}

impl Lists<'_> {
    fn at(&self) -> usize {
        self.rings.layout.list_at(self.slot)
    }

    /// The device's address of the list.
    fn iova(&self) -> Option<u64> {
        self.mapping.iova(self.at()).map(|iova| iova.0)
    }
}

/// What a command says of its data: bits of its first word, and words 3 and 4.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pointer {
    pub(crate) head: u64,
    pub(crate) dptr: [u64; 2],
}

/// Describes `len` bytes at `iova`. `None` when they cannot be described.
#[inline]
pub(crate) fn point(limits: &Limits, iova: u64, len: u64, lists: &Lists<'_>) -> Option<Pointer> {
    match prp::without_list(iova, len, limits.page as u64) {
        // PRPs are of dwords (Base section 4.3.1).
        Some(dptr) if iova & 3 == 0 => Some(Pointer { head: 0, dptr }),
        _ => point_far(limits, iova, len, lists),
    }
}

/// The same, for what two PRPs do not describe.
#[inline(never)]
fn point_far(limits: &Limits, iova: u64, len: u64, lists: &Lists<'_>) -> Option<Pointer> {
    if limits.sgl {
        let (of_type, sub_type) = (sgl_type::DATA_BLOCK, sgl_sub_type::ADDRESS);
        let block = SglDescriptor::of(of_type, sub_type, iova, u32::try_from(len).ok()?);
        let words: [u64; 2] = transmute!(block);
        return Some(Pointer { head: u64::from(psdt::SGL) << 14, dptr: words.map(u64::from_le) });
    }
    let list = (lists.rings.region(), lists.at(), lists.iova()?, lists.rings.layout.list_len());
    Some(Pointer { head: 0, dptr: prp::with_list(iova, usize::try_from(len).ok()?, limits.page, list)? })
}

/// Describes the data of a command that is not plain: ranges that are made here, or the operation's `buffer`, address
/// and length.
pub(crate) fn point_special(
    limits: &Limits,
    kind: Kind,
    (lba, blocks): (u64, u64),
    buffer: (u64, u64),
    lists: &Lists<'_>,
) -> Option<Pointer> {
    let region = lists.rings.region();
    match kind {
        Kind::Deallocate => {
            if !region.write(lists.at(), deallocate_range(lba, blocks).as_bytes()) {
                return None;
            }
        }
        Kind::Copy => {
            for (at, part) in (lists.at()..).step_by(COPY_RANGE_LEN).zip(limits.copy_parts(lba, blocks)) {
                if !region.write(at, copy_range(part).as_bytes()) {
                    return None;
                }
            }
        }
        Kind::DatasetManagement | Kind::Raw if buffer.1 > 0 => {
            return point(limits, buffer.0, buffer.1, lists);
        }
        _ => return Some(Pointer::default()),
    }
    Some(Pointer { head: 0, dptr: [lists.iova()?, 0] })
}
