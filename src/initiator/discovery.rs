//! What a discovery controller offers.
//!
//! The log is read as Linux hosts read it: header, entries, header again; when the generation counter moved in
//! between, all over (NVMe Base specification 2.1, section 5.1.12.3.1).

use super::controller::{ConnectOptions, Controller, Host};
use super::error::{ErrorKind, InitiatorError};
use nvme_spec::Nsid;
use nvme_spec::fabrics::nqn_text;
use nvme_spec::log::{
    AddressFamily, DiscoveryLogEntry, DiscoveryLogHeader, LogPageId, SubsystemType, TransportType,
};
use std::net::SocketAddr;
use zerocopy::FromBytes;

/// Times that a log which changes while it is read is read again.
const RETRIES_MAX: usize = 6;
/// Entries beyond which a log is not believed.
const ENTRIES_MAX: u64 = 16_384;
const ENTRY_LEN: usize = size_of::<DiscoveryLogEntry>();

/// One way to one subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryEntry {
    /// TRTYPE.
    pub transport: TransportType,
    /// ADRFAM.
    pub address_family: AddressFamily,
    /// SUBTYPE.
    pub subsystem_type: SubsystemType,
    /// TREQ; see [`nvme_spec::log::treq`].
    pub treq: u8,
    /// PORTID.
    pub portid: u16,
    /// CNTLID.
    pub cntlid: u16,
    /// ASQSZ.
    pub asqsz: u16,
    /// EFLAGS; see [`nvme_spec::log::eflags`].
    pub eflags: u16,
    /// TRADDR.
    pub address: String,
    /// TRSVCID: the port.
    pub service: String,
    /// SUBNQN.
    pub subsystem_nqn: String,
    /// SECTYPE of TSAS; see [`nvme_spec::log::sectype`].
    pub sectype: u8,
}

/// A discovery log as it was at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiscoveryLog {
    /// GENCTR.
    pub generation: u64,
    /// The entries.
    pub entries: Vec<DiscoveryEntry>,
}

/// Connects to the discovery controller at `address`, reads its log, and disconnects.
///
/// # Errors
/// What connecting or reading gives; [`ErrorKind::Incompatible`] for a log that makes no sense or never rests.
pub fn discover(address: SocketAddr, host: &Host) -> Result<Vec<DiscoveryEntry>, InitiatorError> {
    let controller = Controller::connect(&ConnectOptions::discovery(address, host.clone()))?;
    let log = read_log(&controller)?;
    controller.shutdown()?;
    Ok(log.entries)
}

/// Reads the log of a connected discovery controller.
///
/// # Errors
/// As [`discover`].
pub fn read_log(controller: &Controller) -> Result<DiscoveryLog, InitiatorError> {
    for _ in 0..=RETRIES_MAX {
        let before = header(controller)?;
        let records = before.numrec.get();
        if before.recfmt.get() != 0 || records > ENTRIES_MAX {
            return Err(InitiatorError::incompatible(format!(
                "a discovery log of format {} with {records} records",
                before.recfmt.get()
            )));
        }
        let len = usize::try_from(records).unwrap_or(usize::MAX).saturating_mul(ENTRY_LEN);
        let data = if len == 0 { Vec::new() } else { page(controller, ENTRY_LEN as u64, len)? };
        // An empty log is read once: there is nothing that could be torn.
        if len == 0 || header(controller)?.genctr == before.genctr {
            let entries = data.chunks_exact(ENTRY_LEN).map(entry).collect::<Result<_, _>>()?;
            return Ok(DiscoveryLog { generation: before.genctr.get(), entries });
        }
    }
    Err(InitiatorError::new(
        ErrorKind::Incompatible,
        "the discovery log changes while it is read, again and again",
    ))
}

fn page(controller: &Controller, offset: u64, len: usize) -> Result<Vec<u8>, InitiatorError> {
    controller.get_log_page(LogPageId::DISCOVERY.0, Nsid::NONE, offset, len)
}

/// The first 20 bytes of the log: as much as Linux reads to begin with.
fn header(controller: &Controller) -> Result<DiscoveryLogHeader, InitiatorError> {
    let mut bytes = page(controller, 0, 20)?;
    bytes.resize(size_of::<DiscoveryLogHeader>(), 0);
    DiscoveryLogHeader::read_from_bytes(&bytes)
        .map_err(|_| InitiatorError::incompatible("the discovery log has no header"))
}

fn entry(bytes: &[u8]) -> Result<DiscoveryEntry, InitiatorError> {
    let wrong = |what: &str| InitiatorError::incompatible(format!("a discovery log entry has {what}"));
    let raw = DiscoveryLogEntry::read_from_bytes(bytes).map_err(|_| wrong("another size"))?;
    let [sectype, ..] = raw.tsas;
    Ok(DiscoveryEntry {
        transport: raw.trtype,
        address_family: raw.adrfam,
        subsystem_type: raw.subtype,
        treq: raw.treq,
        portid: raw.portid.get(),
        cntlid: raw.cntlid.get(),
        asqsz: raw.asqsz.get(),
        eflags: raw.eflags.get(),
        address: text(&raw.traddr).ok_or_else(|| wrong("a TRADDR that is no text"))?,
        service: text(&raw.trsvcid).ok_or_else(|| wrong("a TRSVCID that is no text"))?,
        subsystem_nqn: nqn_text(&raw.subnqn).ok_or_else(|| wrong("no valid SUBNQN"))?.to_owned(),
        sectype,
    })
}

/// ASCII text padded with spaces, or with NULs as some controllers do.
fn text(field: &[u8]) -> Option<String> {
    let field = field.split(|&byte| byte == 0).next()?;
    let text = std::str::from_utf8(field).ok()?.trim_end();
    if text.chars().any(char::is_control) { None } else { Some(text.to_owned()) }
}
