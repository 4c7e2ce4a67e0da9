//! Commands as this host builds them. CID and SGL are set when a command is submitted.

use crate::units::Lba;
use nvme_spec::command::psdt;
use nvme_spec::fabrics::{ConnectCommand, FabricsCommandType, PropertyGetCommand, PropertySetCommand};
use nvme_spec::identify::Cns;
use nvme_spec::nvm::IoCdw12;
use nvme_spec::register::Property;
use nvme_spec::{AdminOpcode, Nsid, NvmOpcode, Qid, SglDescriptor, Status, SubmissionQueueEntry};
use zerocopy::transmute;

/// The direction and length of a command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// No data.
    None,
    /// That many bytes go to the controller.
    ToController(u32),
    /// That many bytes come from the controller.
    ToHost(u32),
}

/// What a completion queue entry says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Dwords 0 and 1: the command specific result.
    pub result: u64,
    /// The status.
    pub status: Status,
}

impl Completion {
    /// Dword 0 of the result.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
    pub const fn result32(self) -> u32 {
        self.result as u32
    }
}

/// An otherwise empty command.
#[must_use]
pub fn command(opcode: u8, nsid: Nsid) -> SubmissionQueueEntry {
    SubmissionQueueEntry { opcode, nsid: nsid.get().into(), ..Default::default() }
}

/// Read, Write or Write Zeroes of `nlb_z + 1` blocks (NVM Command Set specification 1.1, section 3.3).
#[must_use]
pub fn io(opcode: NvmOpcode, nsid: Nsid, lba: Lba, nlb_z: u16, fua: bool) -> SubmissionQueueEntry {
    let [low, high] = halves(lba.get());
    SubmissionQueueEntry {
        cdw10: low.into(),
        cdw11: high.into(),
        cdw12: IoCdw12::new().with_nlb_z(nlb_z).with_fua(fua).into_bits().into(),
        ..command(opcode.0, nsid)
    }
}

/// Identify (NVMe Base specification 2.1, section 5.1.13).
#[must_use]
pub fn identify(cns: Cns, nsid: Nsid, csi: u8) -> SubmissionQueueEntry {
    SubmissionQueueEntry {
        cdw10: u32::from(cns.0).into(),
        cdw11: (u32::from(csi) << 24).into(),
        ..command(AdminOpcode::IDENTIFY.0, nsid)
    }
}

/// Get Log Page of `len` bytes, a multiple of four, from byte `offset` on (Base section 5.1.12).
#[must_use]
pub fn get_log_page(lid: u8, nsid: Nsid, offset: u64, len: u32, retain_event: bool) -> SubmissionQueueEntry {
    let numd_z = (len / 4).saturating_sub(1);
    let [offset_low, offset_high] = halves(offset);
    SubmissionQueueEntry {
        cdw10: (u32::from(lid) | u32::from(retain_event) << 15 | (numd_z & 0xFFFF) << 16).into(),
        cdw11: (numd_z >> 16).into(),
        cdw12: offset_low.into(),
        cdw13: offset_high.into(),
        ..command(AdminOpcode::GET_LOG_PAGE.0, nsid)
    }
}

/// Connect (Base section 6.3). `entries` is the size of the queue: one more than its commands in flight.
#[must_use]
pub fn connect(qid: Qid, entries: u16, cattr: u8, kato_ms: u32) -> SubmissionQueueEntry {
    transmute!(ConnectCommand {
        opcode: AdminOpcode::FABRICS.0,
        fctype: FabricsCommandType::CONNECT.0,
        qid: qid.get().into(),
        sqsize_z: entries.saturating_sub(1).into(),
        cattr,
        kato_ms: kato_ms.into(),
        ..Default::default()
    })
}

/// Property Get of 4 or 8 bytes (Base section 6.5).
#[must_use]
pub fn property_get(property: Property, eight_bytes: bool) -> SubmissionQueueEntry {
    transmute!(PropertyGetCommand {
        opcode: AdminOpcode::FABRICS.0,
        fctype: FabricsCommandType::PROPERTY_GET.0,
        attrib: u8::from(eight_bytes),
        ofst: property.0.into(),
        ..Default::default()
    })
}

/// Property Set of 4 bytes (Base section 6.6).
#[must_use]
pub fn property_set(property: Property, value: u32) -> SubmissionQueueEntry {
    transmute!(PropertySetCommand {
        opcode: AdminOpcode::FABRICS.0,
        fctype: FabricsCommandType::PROPERTY_SET.0,
        ofst: property.0.into(),
        value: u64::from(value).into(),
        ..Default::default()
    })
}

/// Low and high dword.
#[expect(clippy::cast_possible_truncation, reason = "two halves")]
const fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// The command with its CID and the SGL descriptor for its data, PSDT included (NVMe Base specification 2.1,
/// section 4.3.2; NVMe/TCP Transport specification 1.1, section 3.2.1).
pub(crate) fn finish(command: &SubmissionQueueEntry, cid: u16, data_len: u32, in_capsule: bool) -> [u8; 64] {
    let dptr =
        if in_capsule { SglDescriptor::in_capsule(0, data_len) } else { SglDescriptor::transport(data_len) };
    transmute!(SubmissionQueueEntry {
        flags: command.flags & 0x3F | psdt::SGL << 6,
        cid: cid.into(),
        dptr,
        ..*command
    })
}
