//! The Get Log Page command and the pages of I/O controllers (NVM Express Base Specification 2.1, section 5.1.12).

use nvme_spec::log::{
    ANA_RETURN_GROUPS_ONLY, CHANGED_NAMESPACES_MAX, CommandsEffects, FirmwareSlot, LogPageId, SmartHealth,
    SupportedLogPages, effect,
};
use nvme_spec::{AdminOpcode, Nsid, NvmOpcode, Status, SubmissionQueueEntry, ascii_padded};
use zerocopy::{FromZeros, IntoBytes};

use super::command::{CommandError, at};
use super::controller::Controller;
use super::exchange::Arrival;
use super::options::TRANSFER_BYTES_MAX;
use super::subsystem::SubsystemKind;
use super::target::Target;
use super::{ana, discovery, features, identify};

/// NVMe-MI Commands Supported and Effects (section 5.1.12.1.19): there are none.
const MI_EFFECTS: LogPageId = LogPageId(0x13);
/// Scope of the effects dwords: the command or feature touches one controller.
const SCOPE_CONTROLLER: u32 = 1 << 21;
/// As above: one namespace.
const SCOPE_NAMESPACE: u32 = 1 << 20;

/// A Get Log Page command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) page: LogPageId,
    /// Retain Asynchronous Event.
    pub(super) retain_event: bool,
    specific: u8,
    bytes: u32,
    offset: u64,
    nsid: Nsid,
}

impl Request {
    /// Takes the command apart and checks what does not depend on the page.
    pub(super) fn parse(sqe: &SubmissionQueueEntry) -> Result<Self, CommandError> {
        let [page, specific, numd_0, numd_1] = sqe.cdw10.get().to_le_bytes();
        let [numd_2, numd_3, ..] = sqe.cdw11.get().to_le_bytes();
        let dwords_z = u32::from_le_bytes([numd_0, numd_1, numd_2, numd_3]);
        let bytes = (u64::from(dwords_z) + 1) * 4;
        let bytes = u32::try_from(bytes)
            .ok()
            .filter(|&bytes| bytes <= TRANSFER_BYTES_MAX)
            .ok_or(CommandError::field(at::CDW10))?;
        let offset = u64::from(sqe.cdw13.get()) << 32 | u64::from(sqe.cdw12.get());
        if offset % 4 != 0 {
            return Err(CommandError::field(at::CDW12));
        }
        if sqe.cdw14.get() & 1 << 23 != 0 {
            // Offset type: indices instead of bytes, which no page here has.
            return Err(CommandError::field(at::CDW14));
        }
        Ok(Self {
            page: LogPageId(page),
            retain_event: specific & 0x80 != 0,
            specific: specific & 0x7F,
            bytes,
            offset,
            nsid: sqe.nsid(),
        })
    }

    /// The part of `page` that the host asked for: zeroes behind its end.
    pub(super) fn part_of(&self, page: Vec<u8>) -> Result<Vec<u8>, CommandError> {
        let offset = usize::try_from(self.offset).ok().filter(|&offset| offset <= page.len());
        let offset = offset.ok_or(CommandError::field(at::CDW12))?;
        let mut part = page;
        part.drain(..offset);
        part.resize(self.bytes as usize, 0);
        Ok(part)
    }
}

/// A whole log page.
pub(super) fn page(
    target: &Target,
    controller: &Controller,
    arrival: &Arrival,
    request: &Request,
) -> Result<Vec<u8>, CommandError> {
    if !supported(controller).any(|id| id == request.page) {
        return Err(CommandError::at(Status::INVALID_LOG_PAGE, at::CDW10));
    }
    if request.page == LogPageId::DISCOVERY {
        // Its specific bits ask for more than one's own share, or for longer records: neither is there.
        return Ok(discovery::log(target, controller, arrival));
    }
    if request.page == LogPageId::ANA && request.specific & !ANA_RETURN_GROUPS_ONLY == 0 {
        return Ok(ana::log(&controller.subsystem, request.specific & ANA_RETURN_GROUPS_ONLY != 0));
    }
    if request.specific != 0 {
        return Err(CommandError::field(at::CDW10));
    }
    Ok(match request.page {
        LogPageId::SUPPORTED => supported_page(controller),
        LogPageId::ERROR_INFORMATION => controller.with_errors(|errors| errors.page()),
        LogPageId::SMART_HEALTH => smart(target, controller, request.nsid)?,
        LogPageId::FIRMWARE_SLOT => firmware(target),
        LogPageId::CHANGED_NAMESPACES => changed_namespaces(controller),
        LogPageId::COMMANDS_EFFECTS => commands_effects(controller),
        LogPageId::FEATURES_EFFECTS => features_effects(),
        _ => vec![0; 4096],
    })
}

fn supported(controller: &Controller) -> impl Iterator<Item = LogPageId> {
    let pages: &[LogPageId] = match controller.subsystem.kind {
        SubsystemKind::Nvm => &[
            LogPageId::SUPPORTED,
            LogPageId::ERROR_INFORMATION,
            LogPageId::SMART_HEALTH,
            LogPageId::FIRMWARE_SLOT,
            LogPageId::CHANGED_NAMESPACES,
            LogPageId::COMMANDS_EFFECTS,
            LogPageId::FEATURES_EFFECTS,
            MI_EFFECTS,
        ],
        SubsystemKind::Discovery => {
            &[LogPageId::SUPPORTED, LogPageId::ERROR_INFORMATION, LogPageId::DISCOVERY]
        }
    };
    pages.iter().copied().chain(controller.shows_ana().then_some(LogPageId::ANA))
}

fn supported_page(controller: &Controller) -> Vec<u8> {
    let mut page = SupportedLogPages::new_zeroed();
    for id in supported(controller) {
        if let Some(dword) = page.lids.get_mut(usize::from(id.0)) {
            dword.set(effect::SUPPORTED);
        }
    }
    page.as_bytes().to_vec()
}

/// SMART / Health (section 5.1.12.1.3). The files' device is not ours to question, so its temperature and wear are not
/// reported; what hosts did is.
fn smart(target: &Target, controller: &Controller, nsid: Nsid) -> Result<Vec<u8>, CommandError> {
    if nsid != Nsid::NONE && nsid != Nsid::ALL {
        // LPA says that there is no log for each namespace.
        return Err(CommandError::field(at::NSID));
    }
    let traffic = controller.traffic();
    let mut page = SmartHealth::new_zeroed();
    page.available_spare = 100;
    page.data_units_read = wide(data_units(traffic.read_bytes));
    page.data_units_written = wide(data_units(traffic.written_bytes));
    page.host_read_commands = wide(traffic.read_commands);
    page.host_write_commands = wide(traffic.write_commands);
    page.power_on_hours = wide(target.started.elapsed().as_secs() / 3600);
    page.media_errors = wide(controller.with_errors(|errors| errors.media_count()));
    page.error_log_entries = wide(controller.with_errors(|errors| errors.count()));
    Ok(page.as_bytes().to_vec())
}

/// Thousands of 512 bytes, rounded up.
const fn data_units(bytes: u64) -> u64 {
    bytes.div_ceil(512_000)
}

fn wide(number: u64) -> [u8; 16] {
    u128::from(number).to_le_bytes()
}

fn firmware(target: &Target) -> Vec<u8> {
    let mut page = FirmwareSlot::new_zeroed();
    page.afi = 1;
    if let Some(revision) = page.revisions.first_mut() {
        *revision = ascii_padded(&target.options().firmware);
    }
    page.as_bytes().to_vec()
}

/// The changed namespaces, ascending; FFFFFFFFh alone when they are more than fit (section 5.1.12.1.5).
fn changed_namespaces(controller: &Controller) -> Vec<u8> {
    let changed = controller.changed_namespaces(false);
    let listed = if changed.len() > CHANGED_NAMESPACES_MAX { vec![Nsid::ALL.0] } else { changed };
    let mut page: Vec<u8> = listed.into_iter().flat_map(u32::to_le_bytes).collect();
    page.resize(CHANGED_NAMESPACES_MAX * 4, 0);
    page
}

fn commands_effects(controller: &Controller) -> Vec<u8> {
    let mut page = CommandsEffects::new_zeroed();
    for opcode in [
        AdminOpcode::GET_LOG_PAGE,
        AdminOpcode::IDENTIFY,
        AdminOpcode::ABORT,
        AdminOpcode::SET_FEATURES,
        AdminOpcode::GET_FEATURES,
        AdminOpcode::ASYNC_EVENT_REQUEST,
        AdminOpcode::KEEP_ALIVE,
    ] {
        if let Some(dword) = page.admin.get_mut(usize::from(opcode.0)) {
            dword.set(effect::SUPPORTED | SCOPE_CONTROLLER);
        }
    }
    let table = controller.subsystem.table();
    let optional = identify::optional_commands(&table);
    let has = |bit: u16| optional & bit != 0;
    let writes = effect::BLOCK_CONTENT_CHANGE;
    for (opcode, effects, is_supported) in [
        (NvmOpcode::FLUSH, 0, true),
        (NvmOpcode::WRITE, writes, true),
        (NvmOpcode::READ, 0, true),
        (NvmOpcode::WRITE_ZEROES, writes, has(nvme_spec::identify::oncs::WRITE_ZEROES)),
        (NvmOpcode::DATASET_MANAGEMENT, writes, has(nvme_spec::identify::oncs::DATASET_MANAGEMENT)),
    ] {
        if is_supported && let Some(dword) = page.io.get_mut(usize::from(opcode.0)) {
            // No scope bits: Linux 6.12 warns of "unusual effects" for whatever it does not know here.
            dword.set(effect::SUPPORTED | effects);
        }
    }
    page.as_bytes().to_vec()
}

/// Feature Identifiers Supported and Effects (section 5.1.12.1.18): a dword for each identifier, FSUPP in bit 0.
fn features_effects() -> Vec<u8> {
    let mut page = vec![0; 1024];
    for feature in features::SUPPORTED {
        let at = usize::from(feature.0) * 4;
        let scope = if features::is_of_namespaces(*feature) { SCOPE_NAMESPACE } else { SCOPE_CONTROLLER };
        if let Some(dword) = page.get_mut(at..at + 4) {
            dword.copy_from_slice(&(effect::SUPPORTED | scope).to_le_bytes());
        }
    }
    page
}
