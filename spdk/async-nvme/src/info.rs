//! What a controller and its namespaces say of themselves, checked and in plain numbers.

use nvme_spec::identify::{
    CSI_NVM, IdentifyController, IdentifyControllerNvm, IdentifyNamespace, NamespaceIdDescriptor,
    NamespaceIdType, oacs, oncs, sgls, vwc,
};
use zerocopy::FromBytes;

use crate::quirks::Quirks;

/// Most blocks of one command: NLB is 16 bits, zero-based.
pub(crate) const NLB_MAX: u64 = 1 << 16;

/// What a controller is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControllerInfo {
    /// SN, without padding.
    pub serial: String,
    /// MN, without padding.
    pub model: String,
    /// FR, without padding.
    pub firmware: String,
    /// SUBNQN.
    pub subnqn: String,
    /// CNTLID.
    pub cntlid: u16,
    /// VER, as the VS register.
    pub version: u32,
    /// The largest transfer in bytes, from MDTS and the driver's own limit.
    pub transfer_len_max: u32,
    /// Whether there is a volatile write cache.
    pub volatile_write_cache: bool,
    /// ONCS, less what a quirk takes away.
    pub oncs: u16,
    /// Whether data may be described by SGLs.
    pub sgl: bool,
    /// Whether data that SGLs describe may be at any address; else at multiples of 4.
    pub sgl_any_address: bool,
    /// OAES.
    pub oaes: u32,
    /// Aborts that may be open at once.
    pub aborts_max: u16,
    /// Asynchronous Event Requests that may be open at once.
    pub event_requests_max: u16,
    /// The I/O queue pairs that were granted.
    pub io_queues: u16,
    /// Most blocks a Write Zeroes may have, in bytes; 0 is no limit.
    pub write_zeroes_len_max: u64,
    /// Most bytes of a Verify; 0 is no limit.
    pub verify_len_max: u64,
    /// Most blocks of a range of Dataset Management; 0 is no limit.
    pub deallocate_blocks_max: u32,
    /// Most ranges of a Dataset Management; 0 is no limit.
    pub dataset_ranges_max: u8,
    /// Most blocks of all ranges of a Dataset Management; 0 is no limit.
    pub dataset_blocks_max: u64,
    /// Whether Copy takes source ranges in descriptor format 0h.
    pub copies_by_format_0: bool,
    /// A boundary in bytes that reads and writes do better not to cross (a quirk); 0 when there is none.
    pub boundary_len: u32,
    /// Whether it offers shadow doorbells (Doorbell Buffer Config).
    pub shadow_doorbells: bool,
    /// Error Information log entries that it keeps.
    pub error_log_entries: u16,
    /// The highest temperatures in kelvins before it warns, and before it is critical; 0 when it does not say.
    pub temperature_limits_k: (u16, u16),
    /// How long a shutdown may take in microseconds (RTD3E); 0 when it does not say.
    pub shutdown_us: u32,
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    let clean = field[..end].iter().map(|&b| if (0x20..0x7F).contains(&b) { char::from(b) } else { '?' });
    clean.collect::<String>().trim().to_owned()
}

/// `unit` times two to the `power`; 0 when `power` is, for "no limit".
fn limit(unit: u64, power: u8) -> u64 {
    if power == 0 { 0 } else { unit.checked_shl(u32::from(power)).unwrap_or(0) }
}

impl ControllerInfo {
    /// From Identify Controller. `page_min` is CAP.MPSMIN in bytes, `len_max` the driver's own limit.
    pub(crate) fn parse(data: &[u8], page_min: u64, len_max: u32, quirks: Quirks) -> Option<Self> {
        let (id, _) = IdentifyController::read_from_prefix(data).ok()?;
        let mdts = limit(page_min, id.mdts);
        let transfer = if mdts == 0 { u64::from(len_max) } else { mdts.min(u64::from(len_max)) };
        let mut optional = id.oncs.get();
        if quirks.no_write_zeroes {
            optional &= !oncs::WRITE_ZEROES;
        }
        let stripe = if quirks.boundary_at_mdts && mdts > 0 { u32::try_from(mdts).unwrap_or(0) } else { 0 };
        Some(Self {
            boundary_len: stripe,
            serial: text(&id.sn),
            model: text(&id.mn),
            firmware: text(&id.fr),
            subnqn: text(&id.subnqn),
            cntlid: id.cntlid.get(),
            version: id.ver.get(),
            transfer_len_max: u32::try_from(transfer).unwrap_or(len_max),
            volatile_write_cache: id.vwc & vwc::PRESENT != 0,
            oncs: optional,
            sgl: matches!(id.sgls.get() & 0b11, sgls::SUPPORTED | sgls::SUPPORTED_BY_DWORDS),
            sgl_any_address: id.sgls.get() & 0b11 == sgls::SUPPORTED,
            oaes: id.oaes.get(),
            aborts_max: u16::from(id.acl_z) + 1,
            event_requests_max: u16::from(id.aerl_z) + 1,
            copies_by_format_0: id.cdfs.get() & 1 != 0,
            shadow_doorbells: id.oacs.get() & oacs::DOORBELL_BUFFER_CONFIG != 0,
            error_log_entries: u16::from(id.elpe_z) + 1,
            temperature_limits_k: (id.wctemp.get(), id.cctemp.get()),
            shutdown_us: id.rtd3e_us.get(),
            // Controllers that do not know their own limits, before NVMe 2.0, may have the one of transfers.
            write_zeroes_len_max: transfer,
            verify_len_max: transfer,
            ..Self::default()
        })
    }

    /// Adds Identify Controller of the NVM Command Set.
    pub(crate) fn add_nvm(&mut self, data: &[u8], page_min: u64) {
        if let Ok((id, _)) = IdentifyControllerNvm::read_from_prefix(data) {
            self.write_zeroes_len_max = limit(page_min, id.wzsl);
            self.verify_len_max = limit(page_min, id.vsl);
            self.deallocate_blocks_max = id.dmrsl.get();
            self.dataset_ranges_max = id.dmrl;
            self.dataset_blocks_max = id.dmsl.get();
        }
    }

    /// Whether an optional command is there, by its bit of ONCS.
    #[must_use]
    pub const fn offers(&self, bit: u16) -> bool {
        self.oncs & bit != 0
    }
}

/// What a namespace is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// NSID.
    pub nsid: u32,
    /// Its size in blocks.
    pub blocks: u64,
    /// The size of a block as a power of two.
    pub block_shift: u8,
    /// NGUID, when it has one.
    pub nguid: Option<[u8; 16]>,
    /// EUI64, when it has one.
    pub eui64: Option<[u8; 8]>,
    /// UUID, when it has one.
    pub uuid: Option<[u8; 16]>,
    /// NOIOB in blocks; 0 for none.
    pub noiob: u16,
    /// Most blocks of a source range of a Copy (MSSRL); 0 when it is not told.
    pub copy_range_blocks_max: u16,
    /// Most blocks of a Copy (MCL); 0 when it is not told.
    pub copy_blocks_max: u32,
    /// Most source ranges of a Copy (MSRC).
    pub copy_ranges_max: u16,
    /// Whether other controllers may reach it too.
    pub shared: bool,
    /// Whether it is write protected.
    pub read_only: bool,
    /// Whether deallocated blocks read as zeros.
    pub deallocated_reads_zero: bool,
    /// Why this driver does not use it; `None` when it does.
    pub refusal: Option<&'static str>,
}

impl NamespaceInfo {
    /// From Identify Namespace. `None` when the namespace is inactive.
    pub(crate) fn parse(nsid: u32, data: &[u8], quirks: Quirks) -> Option<Self> {
        let (id, _) = IdentifyNamespace::read_from_prefix(data).ok()?;
        if id.nsze.get() == 0 {
            return None;
        }
        // The low nibble, and above it bits 6:5 when there are more than 16 formats (NVM section 4.1.5.1).
        let high = if id.nlbaf_z > 15 { id.flbas >> 5 & 0b11 } else { 0 };
        let index = usize::from(id.flbas & 0xF | high << 4);
        let format = id.lbaf.get(index).copied().unwrap_or_default();
        let refusal = match (format.ms.get(), format.lbads) {
            (0, 9 | 12) if id.blocks_fit(format.lbads) => None,
            (0, 9 | 12) => Some("its size in bytes is beyond 64 bits"),
            (0, _) => Some("its blocks are neither 512 nor 4096 bytes long; format it with such blocks"),
            _ => Some("its format has metadata; format it with MS 0 (nvme format --ms=0)"),
        };
        let some = |bytes: &[u8]| !quirks.bogus_ids && bytes.iter().any(|&byte| byte != 0);
        Some(Self {
            nsid,
            blocks: id.nsze.get(),
            block_shift: format.lbads,
            nguid: some(&id.nguid).then_some(id.nguid),
            eui64: some(&id.eui64).then_some(id.eui64),
            uuid: None,
            noiob: id.noiob.get(),
            copy_range_blocks_max: id.mssrl.get(),
            copy_blocks_max: id.mcl.get(),
            copy_ranges_max: u16::from(id.msrc) + 1,
            shared: id.nmic & 1 != 0,
            read_only: id.nsattr & 1 != 0,
            deallocated_reads_zero: id.dlfeat & 0b111 == 0b001,
            refusal,
        })
    }

    /// Adds the identification descriptors; stops at what is not one.
    pub(crate) fn add_descriptors(&mut self, mut data: &[u8], quirks: Quirks) {
        while let Ok((header, rest)) = NamespaceIdDescriptor::read_from_prefix(data) {
            let Some((id, after)) = rest.split_at_checked(usize::from(header.nidl)) else { break };
            if header.nidl == 0 {
                break;
            }
            match header.nidt {
                NamespaceIdType::CSI if id != [CSI_NVM] => {
                    self.refusal = Some("its command set is not the NVM command set");
                }
                _ if quirks.bogus_ids => {}
                NamespaceIdType::EUI64 => self.eui64 = id.try_into().ok().or(self.eui64),
                NamespaceIdType::NGUID => self.nguid = id.try_into().ok().or(self.nguid),
                NamespaceIdType::UUID => self.uuid = id.try_into().ok().or(self.uuid),
                _ => {}
            }
            data = after;
        }
    }

    /// Whether both have the same identity, size and format: whether a block of one is that block of the other.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let identity = |ns: &Self| (ns.nsid, ns.nguid, ns.eui64, ns.uuid);
        let shape = |ns: &Self| (ns.blocks, ns.block_shift, ns.refusal);
        identity(self) == identity(other) && shape(self) == shape(other)
    }

    /// The size of a block in bytes.
    #[must_use]
    pub const fn block_len(&self) -> u32 {
        1 << self.block_shift
    }
}

trait BlocksFit {
    fn blocks_fit(&self, shift: u8) -> bool;
}

impl BlocksFit for IdentifyNamespace {
    fn blocks_fit(&self, shift: u8) -> bool {
        self.nsze.get().leading_zeros() >= u32::from(shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn parse(data: &[u8]) -> Option<NamespaceInfo> {
        NamespaceInfo::parse(1, data, Quirks::default())
    }

    #[test]
    fn identifiers_that_are_no_identity_are_not_taken() {
        let mut id = IdentifyNamespace::zeroed();
        id.nsze.set(100);
        id.lbaf[0].lbads = 9;
        id.nguid = [7; 16];
        let bogus = Quirks { bogus_ids: true, ..Quirks::default() };
        let mut info = NamespaceInfo::parse(1, id.as_bytes(), bogus).unwrap();
        info.add_descriptors(&[1, 8, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8], bogus);
        assert_eq!((info.nguid, info.eui64), (None, None));
        assert_eq!(parse(id.as_bytes()).unwrap().nguid, Some([7; 16]));
    }

    #[test]
    fn other_command_sets_are_told() {
        let mut info = NamespaceInfo::default();
        info.add_descriptors(&[4, 1, 0, 0, 0], Quirks::default());
        assert_eq!(info.refusal, None);
        info.add_descriptors(&[4, 1, 0, 0, 2], Quirks::default());
        assert!(info.refusal.unwrap().contains("command set"));
    }

    #[test]
    fn formats_that_are_not_ours_are_told() {
        let mut id = IdentifyNamespace::zeroed();
        assert_eq!(parse(id.as_bytes()), None, "inactive");
        id.nsze.set(100);
        id.lbaf[0].lbads = 12;
        assert_eq!(parse(id.as_bytes()).unwrap().refusal, None);
        id.lbaf[0].ms.set(8);
        assert!(parse(id.as_bytes()).unwrap().refusal.unwrap().contains("metadata"));
        id.lbaf[0] = nvme_spec::identify::LbaFormat { ms: 0.into(), lbads: 200, rp: 0 };
        assert!(parse(id.as_bytes()).unwrap().refusal.is_some());
        id.lbaf[0].lbads = 9;
        id.nsze.set(u64::MAX);
        assert!(parse(id.as_bytes()).unwrap().refusal.is_some());
    }

    #[test]
    fn descriptors_of_nonsense_change_nothing() {
        let mut info = NamespaceInfo { nguid: Some([7; 16]), ..Default::default() };
        info.add_descriptors(&[2, 200, 0, 0, 1], Quirks::default());
        info.add_descriptors(&[2, 3, 0, 0, 1, 2, 3], Quirks::default());
        info.add_descriptors(&[], Quirks::default());
        assert_eq!(info.nguid, Some([7; 16]));
    }
}
