//! The Error Information log of one controller (NVM Express Base Specification 2.1, section 5.1.12.1.2).

use std::collections::VecDeque;

use nvme_spec::log::{ErrorInformationEntry, TransportType};
use nvme_spec::{Status, SubmissionQueueEntry};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::options::ERROR_LOG_ENTRIES;

/// The parameter error location of an error that no field is to blame for.
const NO_LOCATION: u16 = 0xFFFF;

/// The last errors, newest first, and how many there were.
#[derive(Debug, Default)]
pub(super) struct ErrorLog {
    entries: VecDeque<ErrorInformationEntry>,
    count: u64,
    media_count: u64,
}

impl ErrorLog {
    /// Records that a command of queue `qid` failed; `location` is the byte of the command at fault.
    pub(super) fn push(
        &mut self,
        qid: u16,
        sqe: &SubmissionQueueEntry,
        status: Status,
        location: Option<u16>,
    ) {
        self.count = self.count.saturating_add(1);
        if matches!(status.code(), Status::UNRECOVERED_READ_ERROR | Status::WRITE_FAULT) {
            self.media_count = self.media_count.saturating_add(1);
        }
        self.entries.truncate(ERROR_LOG_ENTRIES - 1);
        self.entries.push_front(ErrorInformationEntry {
            error_count: U64::new(self.count),
            sqid: U16::new(qid),
            cid: sqe.cid,
            status: U16::new(status.to_wire()),
            parameter_error_location: U16::new(location.unwrap_or(NO_LOCATION)),
            lba: U64::new(if qid == 0 { 0 } else { sqe.cdw10_11() }),
            nsid: if qid == 0 { U32::new(0) } else { sqe.nsid },
            trtype: TransportType::TCP.0,
            opcode: sqe.opcode,
            version: 1,
            ..Default::default()
        });
    }

    /// How many errors there were.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// How many of them the medium is to blame for: what SMART calls media and data integrity errors.
    pub(super) fn media_count(&self) -> u64 {
        self.media_count
    }

    /// The log page: newest entry first, empty entries are zero.
    pub(super) fn page(&self) -> Vec<u8> {
        let mut page: Vec<u8> = self.entries.iter().flat_map(|entry| entry.as_bytes().to_vec()).collect();
        page.resize(ERROR_LOG_ENTRIES * size_of::<ErrorInformationEntry>(), 0);
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_error_comes_first_and_old_ones_fall_out() {
        let mut log = ErrorLog::default();
        for cid in 0..100u16 {
            let sqe = SubmissionQueueEntry {
                opcode: 2,
                cid: U16::new(cid),
                nsid: U32::new(7),
                ..Default::default()
            };
            log.push(3, &sqe, Status::LBA_OUT_OF_RANGE.with_dnr(), Some(40));
        }
        let page = log.page();
        assert_eq!(page.len(), 64 * 64);
        assert_eq!(page[..8], 100u64.to_le_bytes());
        assert_eq!(page[8..10], 3u16.to_le_bytes());
        assert_eq!(page[10..12], 99u16.to_le_bytes());
        assert_eq!(page[12..14], (0x4080u16 << 1).to_le_bytes());
        assert_eq!(page[14..16], 40u16.to_le_bytes());
        assert_eq!(page[24..28], 7u32.to_le_bytes());
        assert_eq!(page[63 * 64..63 * 64 + 8], 37u64.to_le_bytes());
        assert_eq!((log.count(), log.media_count()), (100, 0));
        log.push(3, &SubmissionQueueEntry::default(), Status::UNRECOVERED_READ_ERROR.with_dnr(), None);
        log.push(3, &SubmissionQueueEntry::default(), Status::WRITE_FAULT, None);
        assert_eq!((log.count(), log.media_count()), (102, 2));
    }
}
