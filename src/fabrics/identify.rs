//! The Identify command (NVM Express Base Specification 2.1, section 5.1.13; NVM Command Set Specification 1.1,
//! section 4.1.5).
//!
//! Volatile write cache: VWC always says that there is one, because Linux reads it once, when it connects, and a
//! namespace on a caching device may be published later; hosts that were told "no cache" would never send a Flush.
//! Where the device of a namespace has none, VWCNP of the I/O Command Set Independent data says so, and a host that
//! reads it leaves the flushes out.

use nvme_spec::fabrics::nqn_field;
use nvme_spec::identify::{
    CSI_NVM, Cns, ControllerType, IDENTIFY_LEN, IdentifyController, IdentifyControllerNvm, IdentifyNamespace,
    IdentifyNamespaceIndependent, LbaFormat, NAMESPACE_LIST_MAX, NamespaceIdDescriptor, NamespaceIdType,
    cmic, ctratt, lpa, nsattr, nsfeat, nstat, oncs, sgls, vwc,
};
use nvme_spec::log::AnaState;
use nvme_spec::{Nsid, Status, SubmissionQueueEntry, aer, ascii_padded};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::ana;
use super::command::{CommandError, at};
use super::controller::Controller;
use super::export::{Export, FencePolicy};
use super::options::{ABORT_MAX, AER_MAX, ERROR_LOG_ENTRIES, KAS, MDTS, NSID_MAX, VERSION};
use super::status::RETRY_DELAYS_100MS;
use super::subsystem::NamespaceTable;
use super::target::Target;

/// NSFEAT of the independent structure, bit 5: no volatile write cache behind this namespace (VWCNP).
const VWC_NOT_PRESENT: u8 = 1 << 5;
/// DLFEAT bit 3: Write Zeroes may deallocate.
const DEALLOCATE_IN_WRITE_ZEROES: u8 = 1 << 3;
/// OFCS bit 0: Disconnect is supported.
const DISCONNECT: u16 = 1 << 0;
/// FRMW: one slot, which is read only.
const ONE_READ_ONLY_SLOT: u8 = 0b0011;

/// Answers an Identify command of an I/O controller.
pub(super) fn nvm(
    target: &Target,
    controller: &Controller,
    sqe: &SubmissionQueueEntry,
) -> Result<Vec<u8>, CommandError> {
    let [cns, ..] = sqe.cdw10.get().to_le_bytes();
    let [.., csi] = sqe.cdw11.get().to_le_bytes();
    let nsid = sqe.nsid();
    let table = controller.subsystem.table();
    let cns = Cns(cns);
    let has_csi = matches!(cns, Cns::IO_NAMESPACE | Cns::IO_CONTROLLER | Cns::IO_ACTIVE_NAMESPACES);
    if has_csi && csi != CSI_NVM {
        return Err(CommandError::field(at::CDW11));
    }
    match cns {
        Cns::NAMESPACE => {
            Ok(or_zeroes(valid(&table, nsid)?, |export| namespace(controller, export).as_bytes().to_vec()))
        }
        Cns::CONTROLLER => Ok(io_controller(target, controller, &table).as_bytes().to_vec()),
        Cns::ACTIVE_NAMESPACES | Cns::IO_ACTIVE_NAMESPACES => active(&table, nsid),
        Cns::NAMESPACE_DESCRIPTORS => descriptors(existing(&table, nsid)?),
        // The NVM part holds protection information formats only, and there are none.
        Cns::IO_NAMESPACE => Ok(or_zeroes(valid(&table, nsid)?, |_| Vec::new())),
        Cns::IO_CONTROLLER => Ok(io_controller_nvm().as_bytes().to_vec()),
        Cns::INDEPENDENT_NAMESPACE => {
            Ok(or_zeroes(valid(&table, nsid)?, |export| independent(controller, export).as_bytes().to_vec()))
        }
        Cns::IO_COMMAND_SETS => Ok(padded(1u64.to_le_bytes().to_vec())),
        _ => Err(CommandError::field(at::CDW10)),
    }
}

/// Answers an Identify command of a discovery controller, which has no namespaces.
pub(super) fn discovery(
    target: &Target,
    controller: &Controller,
    sqe: &SubmissionQueueEntry,
) -> Result<Vec<u8>, CommandError> {
    let [cns, ..] = sqe.cdw10.get().to_le_bytes();
    if Cns(cns) != Cns::CONTROLLER {
        return Err(CommandError::field(at::CDW10));
    }
    let mut data = common(target, controller);
    data.cntrltype = ControllerType::DISCOVERY;
    data.oaes = U32::new(aer::config::DISCOVERY_LOG_CHANGE);
    data.lpa = lpa::EXTENDED_DATA;
    Ok(data.as_bytes().to_vec())
}

/// What controllers of both kinds say.
fn common(target: &Target, controller: &Controller) -> IdentifyController {
    let mut data = IdentifyController::zeroed();
    let subsystem = &controller.subsystem;
    data.sn = ascii_padded(&subsystem.serial);
    data.mn = ascii_padded(&subsystem.model);
    data.fr = ascii_padded(&target.options().firmware);
    data.cmic = cmic::MULTI_CONTROLLER;
    if target.catalog().ports.len() > 1 {
        data.cmic |= cmic::MULTI_PORT;
    }
    data.mdts = MDTS;
    data.cntlid = U16::new(controller.id);
    data.ver = U32::new(VERSION);
    data.ctratt = U32::new(ctratt::HOST_ID_128 | ctratt::TRAFFIC_BASED_KEEP_ALIVE);
    data.acl_z = ABORT_MAX - 1;
    data.aerl_z = zero_based(AER_MAX);
    data.elpe_z = zero_based(ERROR_LOG_ENTRIES);
    data.kas_100ms = U16::new(KAS);
    data.maxcmd = U16::new(target.options().queue_entries_max);
    data.sgls = U32::new(sgls::SUPPORTED | sgls::ADDRESS_AS_OFFSET | sgls::TRANSPORT_DATA_BLOCK);
    data.subnqn = nqn_field(&subsystem.nqn).unwrap_or([0; 256]);
    data
}

fn io_controller(target: &Target, controller: &Controller, table: &NamespaceTable) -> IdentifyController {
    let mut data = common(target, controller);
    data.cntrltype = ControllerType::IO;
    data.oaes = U32::new(aer::config::NAMESPACE_ATTRIBUTE);
    data.crdt_100ms = RETRY_DELAYS_100MS.map(U16::new);
    data.frmw = ONE_READ_ONLY_SLOT;
    data.lpa = lpa::COMMANDS_EFFECTS | lpa::EXTENDED_DATA | lpa::MISCELLANEOUS;
    data.sqes = 0x66;
    data.cqes = 0x44;
    data.nn = U32::new(NSID_MAX);
    data.mnan = U32::new(NSID_MAX);
    data.oncs = U16::new(optional_commands(table));
    data.vwc = vwc::PRESENT | vwc::FLUSH_ALL_UNSUPPORTED;
    data.ioccsz_16b = U32::new((64 + target.options().in_capsule_bytes) / 16);
    data.iorcsz_16b = U32::new(1);
    data.msdbd = 1;
    data.ofcs = U16::new(DISCONNECT);
    if controller.shows_ana() {
        data.oaes = U32::new(data.oaes.get() | aer::config::ANA_CHANGE);
        ana::show(&mut data);
    }
    data
}

/// ONCS: commands that some namespace can carry out.
pub(super) fn optional_commands(table: &NamespaceTable) -> u16 {
    let any = |has: fn(&Export) -> bool| table.iter().any(|export| has(export));
    let mut bits = oncs::SAVE_AND_SELECT;
    if any(|export| export.device.info().write_zeroes) {
        bits |= oncs::WRITE_ZEROES;
    }
    if any(|export| export.device.info().deallocate) {
        bits |= oncs::DATASET_MANAGEMENT;
    }
    bits
}

/// No size limits beyond those of the commands themselves: zero in every field (NVM Command Set section 4.1.5.4).
fn io_controller_nvm() -> IdentifyControllerNvm {
    IdentifyControllerNvm::zeroed()
}

fn namespace(controller: &Controller, export: &Export) -> IdentifyNamespace {
    let info = export.device.info();
    let blocks = U64::new(export.block_size.blocks_in(export.len).map_or(0, |blocks| blocks.0));
    let granularity = info.physical_block_bytes / export.block_size.bytes();
    let granularity_z = U16::new(u16::try_from(granularity.saturating_sub(1)).unwrap_or(0));
    let mut data = IdentifyNamespace::zeroed();
    (data.nsze, data.ncap, data.nuse) = (blocks, blocks, blocks);
    data.nsfeat = nsfeat::OPTIMAL_PERFORMANCE;
    data.nmic = 1;
    data.dlfeat = if info.deallocate { DEALLOCATE_IN_WRITE_ZEROES } else { 0 };
    (data.npwg_z, data.npwa_z, data.nows_z) = (granularity_z, granularity_z, granularity_z);
    (data.npdg_z, data.npda_z) = (granularity_z, granularity_z);
    data.nsattr = attributes(export);
    if controller.shows_ana() {
        data.anagrpid = ana::group_of(export.nsid);
        if ana::state_of(export) == AnaState::INACCESSIBLE {
            // NUSE is not to be known there (NVM Command Set section 4.1.5.1).
            data.nuse = U64::new(0);
        }
    }
    data.nguid = export.nguid;
    data.eui64 = export.eui64;
    if let Some(format) = data.lbaf.first_mut() {
        *format = LbaFormat { lbads: export.block_size.lbads(), ..LbaFormat::default() };
    }
    data
}

fn independent(controller: &Controller, export: &Export) -> IdentifyNamespaceIndependent {
    let mut data = IdentifyNamespaceIndependent::zeroed();
    data.nsfeat = if export.device.info().volatile_write_cache { 0 } else { VWC_NOT_PRESENT };
    data.nmic = 1;
    data.nsattr = attributes(export);
    if controller.shows_ana() {
        data.anagrpid = ana::group_of(export.nsid);
    }
    data.nstat = if is_ready(controller, export) { nstat::READY } else { 0 };
    data
}

fn attributes(export: &Export) -> u8 {
    if export.is_write_protected() { nsattr::WRITE_PROTECTED } else { 0 }
}

/// NRDY. A fenced namespace answers Namespace Not Ready, and says so here too; but where a fence is told in another way,
/// a host must go on to look at it: Linux leaves what is not ready as it was.
fn is_ready(controller: &Controller, export: &Export) -> bool {
    export.is_live()
        || match export.on_fence {
            FencePolicy::NotReady => false,
            FencePolicy::Ana => controller.shows_ana(),
            FencePolicy::WriteProtect => true,
        }
}

/// EUI64, NGUID and the command set; no UUID, so that kernels name the namespace by its NGUID.
fn descriptors(export: &Export) -> Result<Vec<u8>, CommandError> {
    let mut list = Vec::with_capacity(IDENTIFY_LEN);
    for (nidt, identifier) in [
        (NamespaceIdType::EUI64, export.eui64.as_slice()),
        (NamespaceIdType::NGUID, export.nguid.as_slice()),
        (NamespaceIdType::CSI, &[CSI_NVM]),
    ] {
        let nidl = u8::try_from(identifier.len()).map_err(|_| CommandError::fatal(Status::INTERNAL_ERROR))?;
        list.extend_from_slice(NamespaceIdDescriptor { nidt, nidl, reserved: [0; 2] }.as_bytes());
        list.extend_from_slice(identifier);
    }
    Ok(padded(list))
}

/// The identifiers above `after`.
fn active(table: &NamespaceTable, after: Nsid) -> Result<Vec<u8>, CommandError> {
    if after.0 >= 0xFFFF_FFFE {
        return Err(CommandError::at(Status::INVALID_NAMESPACE, at::NSID));
    }
    let above = table.iter().map(|export| export.nsid.0).filter(|&nsid| nsid > after.0);
    Ok(padded(above.take(NAMESPACE_LIST_MAX).flat_map(u32::to_le_bytes).collect()))
}

/// The namespace of an identifier, `None` when it is valid but not active.
fn valid(table: &NamespaceTable, nsid: Nsid) -> Result<Option<&Export>, CommandError> {
    if nsid.0 == 0 || nsid.0 > NSID_MAX {
        return Err(CommandError::at(Status::INVALID_NAMESPACE, at::NSID));
    }
    Ok(table.get(nsid).map(AsRef::as_ref))
}

fn existing(table: &NamespaceTable, nsid: Nsid) -> Result<&Export, CommandError> {
    valid(table, nsid)?.ok_or(CommandError::at(Status::INVALID_NAMESPACE, at::NSID))
}

/// The data of an active namespace; zeroes for another (section 5.1.13.2.2).
fn or_zeroes(export: Option<&Export>, data: impl Fn(&Export) -> Vec<u8>) -> Vec<u8> {
    padded(export.map_or_else(Vec::new, data))
}

fn padded(mut data: Vec<u8>) -> Vec<u8> {
    data.resize(IDENTIFY_LEN, 0);
    data
}

fn zero_based(count: usize) -> u8 {
    u8::try_from(count.saturating_sub(1)).unwrap_or(u8::MAX)
}
