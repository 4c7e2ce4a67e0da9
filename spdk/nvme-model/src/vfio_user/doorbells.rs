//! Doorbells in shared memory: a mailbox for each.

use std::os::fd::BorrowedFd;

use async_nvme::vfio_user::wire::SparseArea;
use hugepage_alloc::{AllocError, DmaRegion, RegionOptions};
use nvme_spec::queue::DOORBELL_BASE;

use crate::Model;

/// What is in a mailbox that was emptied. No doorbell has this value: queues have at most 65536 entries.
const EMPTY: u32 = u32::MAX;
/// The largest BAR whose doorbells are shared.
const BAR_LEN_MAX: u64 = 2 << 20;

/// The doorbells of a model, in memory of the same layout as its BAR.
#[derive(Debug)]
pub(crate) struct Doorbells {
    memory: DmaRegion,
    /// Behind the last doorbell.
    end: usize,
    stride: usize,
    bar_len: u64,
}

impl Doorbells {
    /// `None` when the model's BAR is too large for that.
    pub(crate) fn new(model: &Model) -> Result<Option<Self>, AllocError> {
        let (bar_len, stride, count) = {
            let controller = model.lock();
            let stride = 4usize << (controller.options.dstrd & 0xF);
            (controller.bar_len(), stride, 2 * (usize::from(controller.options.io_queues_max) + 1))
        };
        if bar_len > BAR_LEN_MAX {
            return Ok(None);
        }
        let options = RegionOptions { share: true, ..RegionOptions::ordinary() };
        let memory = DmaRegion::with_options(bar_len.try_into().unwrap_or(usize::MAX), &options)?;
        let end = DOORBELL_BASE as usize + count * stride;
        let doorbells = Self { memory, end, stride, bar_len };
        doorbells.clear();
        Ok(Some(doorbells))
    }

    /// What of the BAR is shared.
    pub(crate) fn area(&self) -> SparseArea {
        let offset = u64::from(DOORBELL_BASE);
        SparseArea { offset, len: self.bar_len - offset }
    }

    /// The file that holds it, at the same positions as in the BAR.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.memory.file().map(|(file, _)| file)
    }

    /// Forgets what was rung.
    pub(crate) fn clear(&self) {
        for at in self.positions() {
            let _ = self.memory.store_u32(at, EMPTY);
        }
    }

    /// Rings for the model what was rung in memory. Returns whether anything was.
    pub(crate) fn ring(&self, model: &Model) -> bool {
        let mut any = false;
        for at in self.positions() {
            if self.memory.load_u32(at) == Some(EMPTY) {
                continue;
            }
            let Some(value) = self.memory.swap_u32(at, EMPTY).filter(|&value| value != EMPTY) else {
                continue;
            };
            if let Ok(offset) = u32::try_from(at) {
                model.lock().write32(offset, value);
            }
            any = true;
        }
        any
    }

    fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        (DOORBELL_BASE as usize..self.end).step_by(self.stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ControllerOptions, Subsystem};

    #[test]
    fn a_doorbell_is_taken_once_and_leaves_nothing() {
        let model =
            Subsystem::new("BELL").controller(ControllerOptions { io_queues_max: 2, ..Default::default() });
        let doorbells = Doorbells::new(&model).unwrap().unwrap();
        assert!(!doorbells.ring(&model));
        assert!(doorbells.memory.store_u32(DOORBELL_BASE as usize + 8, 5));
        assert!(doorbells.ring(&model));
        assert!(!doorbells.ring(&model), "not seen twice");
        assert!(doorbells.memory.store_u32(DOORBELL_BASE as usize + 8, 5));
        assert!(doorbells.ring(&model), "the same value again is another ring");
        assert!(doorbells.memory.store_u32(DOORBELL_BASE as usize + 20, 1));
        doorbells.clear();
        assert!(!doorbells.ring(&model));
    }

    #[test]
    fn a_bar_that_is_too_large_is_not_shared() {
        let options = ControllerOptions { dstrd: 15, ..Default::default() };
        assert!(Doorbells::new(&Subsystem::new("BELL").controller(options)).unwrap().is_none());
    }
}
