//! Log pages (Base section 5.1.12.1), and what fills them.

use nvme_spec::log::{ErrorInformationEntry, FirmwareSlot, LogPageId, SmartHealth};
use nvme_spec::queue::GetLogCdw10;
use nvme_spec::status::sct;
use nvme_spec::{NvmOpcode, Status, SubmissionQueueEntry, ascii_padded};
use zerocopy::{FromZeros, IntoBytes};

use crate::controller::Controller;

/// Error Information log entries that are kept: ELPE plus one.
pub(crate) const ERROR_ENTRIES: usize = 64;

/// What the SMART log counts.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    read_commands: u64,
    write_commands: u64,
    bytes_read: u64,
    bytes_written: u64,
    media_errors: u64,
    pub(crate) errors: u64,
}

impl Counts {
    pub(crate) const fn add(&mut self, opcode: NvmOpcode, bytes: u64) {
        match opcode {
            NvmOpcode::READ => {
                self.read_commands += 1;
                self.bytes_read += bytes;
            }
            NvmOpcode::WRITE => {
                self.write_commands += 1;
                self.bytes_written += bytes;
            }
            _ => {}
        }
    }
}

impl Controller {
    /// The bytes of a log page that a Get Log Page asks for.
    pub(crate) fn get_log(&mut self, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        let cdw10 = GetLogCdw10::from_bits(sqe.cdw10.get());
        let len = log_len(sqe);
        let offset = u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32;
        if len > 1 << 20 || !offset.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let page = match LogPageId(cdw10.lid()) {
            LogPageId::ERROR_INFORMATION => self.error_information(),
            LogPageId::SMART_HEALTH => self.smart().as_bytes().to_vec(),
            LogPageId::FIRMWARE_SLOT => firmware().as_bytes().to_vec(),
            LogPageId::CHANGED_NAMESPACES => self.changed_namespaces(),
            _ => return Err(Status::INVALID_LOG_PAGE.with_dnr()),
        };
        let start = usize::try_from(offset).ok().filter(|&start| start <= page.len());
        let start = start.ok_or(Status::INVALID_FIELD.with_dnr())?;
        let mut data = page[start..].to_vec();
        data.resize(usize::try_from(len).map_err(|_| Status::INVALID_FIELD)?, 0);
        self.give(sqe, &data)?;
        if !cdw10.rae() {
            self.clear_events(cdw10.lid());
        }
        Ok(())
    }

    /// Events of a type that was reported are masked until its log page was read.
    pub(crate) fn is_masked(&self, dw0: u32) -> bool {
        self.masked.iter().any(|masked| masked & 7 == dw0 & 7)
    }

    fn clear_events(&mut self, page: u8) {
        self.masked.retain(|dw0| dw0.to_le_bytes()[2] != page);
        if LogPageId(page) == LogPageId::CHANGED_NAMESPACES {
            self.namespaces_listed = self.shared.generation();
        }
    }

    fn changed_namespaces(&self) -> Vec<u8> {
        let changed = self.shared.changed_since(self.namespaces_listed);
        // FFFFFFFFh first: more than fit (Base section 5.1.12.1.5).
        let changed = if changed.len() > 1024 { vec![u32::MAX] } else { changed };
        let mut list: Vec<u8> = changed.into_iter().flat_map(u32::to_le_bytes).collect();
        list.resize(4096, 0);
        list
    }

    /// Notes a command that failed.
    pub(crate) fn log_error(&mut self, sqid: u16, sqe: &SubmissionQueueEntry, status: Status) {
        if status.is_success() {
            return;
        }
        self.counts.errors += 1;
        self.counts.media_errors += u64::from(status.sct() == sct::MEDIA);
        if self.error_log.len() == ERROR_ENTRIES {
            self.error_log.pop_back();
        }
        self.error_log.push_front(ErrorInformationEntry {
            error_count: self.counts.errors.into(),
            sqid: sqid.into(),
            cid: sqe.cid,
            status: status.to_wire().into(),
            parameter_error_location: u16::MAX.into(),
            lba: if sqid == 0 { 0 } else { sqe.cdw10_11() }.into(),
            nsid: sqe.nsid,
            opcode: sqe.opcode,
            ..Default::default()
        });
    }

    fn error_information(&self) -> Vec<u8> {
        let mut page: Vec<u8> = self.error_log.iter().flat_map(|entry| entry.as_bytes().to_vec()).collect();
        page.resize(ERROR_ENTRIES * 64, 0);
        page
    }

    fn smart(&self) -> SmartHealth {
        let wide = |count: u64| {
            let mut field = [0; 16];
            field[..8].copy_from_slice(&count.to_le_bytes());
            field
        };
        // In thousands of 512 bytes, rounded up.
        let units = |bytes: u64| wide(bytes.div_ceil(512_000));
        let mut log = SmartHealth::new_zeroed();
        log.composite_temperature.set(310);
        log.available_spare = 100;
        log.available_spare_threshold = 10;
        log.power_cycles = wide(1);
        log.data_units_read = units(self.counts.bytes_read);
        log.data_units_written = units(self.counts.bytes_written);
        log.host_read_commands = wide(self.counts.read_commands);
        log.host_write_commands = wide(self.counts.write_commands);
        log.media_errors = wide(self.counts.media_errors);
        log.error_log_entries = wide(self.counts.errors);
        log
    }
}

/// Bytes that a Get Log Page asks for.
pub(crate) fn log_len(sqe: &SubmissionQueueEntry) -> u64 {
    let cdw10 = GetLogCdw10::from_bits(sqe.cdw10.get());
    let dwords_z = u64::from(cdw10.numdl_z()) | u64::from(sqe.cdw11.get() & 0xFFFF) << 16;
    (dwords_z + 1) * 4
}

fn firmware() -> FirmwareSlot {
    let mut log = FirmwareSlot::new_zeroed();
    log.afi = 1;
    log.revisions[0] = ascii_padded("1.0");
    log
}
