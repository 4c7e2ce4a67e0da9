//! What a probe found: one document, or lines for people.

use async_nvme::{ControllerInfo, NamespaceInfo};
use nvme_spec::identify::oncs;
use nvme_spec::log::{ErrorInformationEntry, FirmwareSlot, SmartHealth};
use serde::Serialize;

use crate::cli::out::Out;
use crate::config::format_size;
use crate::initiator::bench::DirectionReport;

/// Entries of the Error Information log that are shown to people.
const ERRORS_SHOWN: usize = 4;
const ZERO_CELSIUS_K: i32 = 273;

/// Everything, as `--json` prints it.
#[derive(Debug, Serialize)]
pub(super) struct ProbeReport {
    /// `vfio`, `vfio-no-iommu`, `vfio-user` or `model`.
    pub(super) access: &'static str,
    /// What it was reached by: PCI address, socket or image.
    pub(super) name: String,
    /// From reset to identified, in milliseconds.
    pub(super) ready_ms: u64,
    pub(super) controller: ControllerReport,
    pub(super) namespaces: Vec<NamespaceReport>,
    pub(super) smart: Option<SmartReport>,
    pub(super) firmware: Option<FirmwareReport>,
    /// The latest entries of the Error Information log.
    pub(super) errors: Vec<ErrorReport>,
    /// Logs that the controller would not give.
    pub(super) missing: Vec<String>,
    /// What the buffers of the read test were made of.
    pub(super) memory: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct ControllerReport {
    model: String,
    serial: String,
    firmware: String,
    subsystem_nqn: String,
    cntlid: u16,
    /// Of the specification that it implements.
    version: String,
    transfer_bytes_max: u32,
    volatile_write_cache: bool,
    /// Optional commands of the NVM command set, by name.
    commands: Vec<&'static str>,
    sgl: bool,
    shadow_doorbells: bool,
}

impl ControllerReport {
    pub(super) fn of(info: &ControllerInfo) -> Self {
        let names = [
            (oncs::COMPARE, "compare"),
            (oncs::DATASET_MANAGEMENT, "dataset-management"),
            (oncs::WRITE_ZEROES, "write-zeroes"),
            (oncs::VERIFY, "verify"),
            (oncs::COPY, "copy"),
        ];
        let [tertiary, minor, major @ ..] = info.version.to_le_bytes();
        Self {
            model: info.model.clone(),
            serial: info.serial.clone(),
            firmware: info.firmware.clone(),
            subsystem_nqn: info.subnqn.clone(),
            cntlid: info.cntlid,
            version: format!("{}.{minor}.{tertiary}", u16::from_le_bytes(major)),
            transfer_bytes_max: info.transfer_len_max,
            volatile_write_cache: info.volatile_write_cache,
            commands: names.iter().filter(|(bit, _)| info.offers(*bit)).map(|(_, name)| *name).collect(),
            sgl: info.sgl,
            shadow_doorbells: info.shadow_doorbells,
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct NamespaceReport {
    pub(super) nsid: u32,
    size_bytes: u64,
    logical_block_bytes: u32,
    nguid: Option<String>,
    eui64: Option<String>,
    uuid: Option<String>,
    /// Whether other controllers reach it, too.
    shared: bool,
    read_only: bool,
    /// Why this driver does not use it.
    pub(super) refusal: Option<&'static str>,
    pub(super) reads: Vec<ReadReport>,
}

impl NamespaceReport {
    pub(super) fn of(info: &NamespaceInfo) -> Self {
        // A format that is refused may be one of which no size can be told.
        let block_bytes = 1u32.checked_shl(info.block_shift.into()).unwrap_or(0);
        Self {
            nsid: info.nsid,
            size_bytes: info.blocks.saturating_mul(block_bytes.into()),
            logical_block_bytes: block_bytes,
            nguid: info.nguid.map(|id| hex(&id)),
            eui64: info.eui64.map(|id| hex(&id)),
            uuid: info.uuid.map(|id| uuid::Uuid::from_bytes(id).to_string()),
            shared: info.shared,
            read_only: info.read_only,
            refusal: info.refusal,
            reads: Vec::new(),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Debug, Serialize)]
pub(super) struct ReadReport {
    /// Reads in flight.
    pub(super) depth: u16,
    pub(super) read_bytes: u32,
    pub(super) elapsed_s: f64,
    pub(super) reads: DirectionReport,
}

/// SMART / Health Information. Counts of 128 bits that do not fit 64 are told as the largest number that does.
#[derive(Debug, Serialize)]
pub(super) struct SmartReport {
    /// Bits of the critical warning, in words.
    critical_warnings: Vec<&'static str>,
    temperature_celsius: Option<i32>,
    available_spare_percent: u8,
    available_spare_threshold_percent: u8,
    percentage_used: u8,
    /// Thousands of 512 bytes.
    data_units_read: u64,
    data_units_written: u64,
    host_read_commands: u64,
    host_write_commands: u64,
    power_cycles: u64,
    power_on_hours: u64,
    unsafe_shutdowns: u64,
    media_errors: u64,
    error_log_entries: u64,
}

impl SmartReport {
    pub(super) fn of(smart: &SmartHealth) -> Self {
        let count = |bytes: [u8; 16]| u64::try_from(u128::from_le_bytes(bytes)).unwrap_or(u64::MAX);
        // Base section 5.1.12.1.3, Critical Warning.
        let words = [
            "the spare is below its threshold",
            "the temperature is out of its limits",
            "the reliability is degraded",
            "the media is read only",
            "the backup of the volatile memory failed",
            "the persistent memory region is unreliable or read only",
        ];
        let set = |(bit, word)| (smart.critical_warning >> bit & 1 == 1).then_some(word);
        let kelvins = smart.composite_temperature.get();
        Self {
            critical_warnings: words.into_iter().enumerate().filter_map(set).collect(),
            // 0 is what a controller says that has no sensor.
            temperature_celsius: (kelvins > 0).then(|| i32::from(kelvins) - ZERO_CELSIUS_K),
            available_spare_percent: smart.available_spare,
            available_spare_threshold_percent: smart.available_spare_threshold,
            percentage_used: smart.percentage_used,
            data_units_read: count(smart.data_units_read),
            data_units_written: count(smart.data_units_written),
            host_read_commands: count(smart.host_read_commands),
            host_write_commands: count(smart.host_write_commands),
            power_cycles: count(smart.power_cycles),
            power_on_hours: count(smart.power_on_hours),
            unsafe_shutdowns: count(smart.unsafe_shutdowns),
            media_errors: count(smart.media_errors),
            error_log_entries: count(smart.error_log_entries),
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct FirmwareReport {
    active_slot: u8,
    /// The revision in each slot that has one, by the slot's number.
    slots: Vec<FirmwareSlotReport>,
}

#[derive(Debug, Serialize)]
struct FirmwareSlotReport {
    slot: u8,
    revision: String,
}

impl FirmwareReport {
    pub(super) fn of(log: &FirmwareSlot) -> Self {
        let text = |revision: &[u8; 8]| {
            let printable = |&byte: &u8| if (0x20..0x7F).contains(&byte) { char::from(byte) } else { ' ' };
            revision.iter().map(printable).collect::<String>().trim().to_owned()
        };
        let slots = (1..).zip(&log.revisions).map(|(slot, revision)| (slot, text(revision)));
        Self {
            active_slot: log.afi & 0b111,
            slots: slots
                .filter(|(_, revision)| !revision.is_empty())
                .map(|(slot, revision)| FirmwareSlotReport { slot, revision })
                .collect(),
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct ErrorReport {
    error_count: u64,
    sqid: u16,
    cid: u16,
    /// The status field without its phase tag.
    status: u16,
    nsid: u32,
    lba: u64,
}

impl ErrorReport {
    pub(super) fn of(entry: &ErrorInformationEntry) -> Self {
        Self {
            error_count: entry.error_count.get(),
            sqid: entry.sqid.get(),
            cid: entry.cid.get(),
            status: entry.status.get() >> 1,
            nsid: entry.nsid.get(),
            lba: entry.lba.get(),
        }
    }
}

/// For people.
pub(super) fn print(report: &ProbeReport, out: &mut Out) -> std::io::Result<()> {
    let ControllerReport { model, serial, firmware, version, cntlid, .. } = &report.controller;
    out.line(format!("{}: {model}  serial {serial}  firmware {firmware}", report.name))?;
    let controller = &report.controller;
    out.line(format!(
        "    NVMe {version}, controller {cntlid} of {}, ready in {} ms by {}",
        controller.subsystem_nqn, report.ready_ms, report.access
    ))?;
    let yes = |flag: bool| if flag { "yes" } else { "no" };
    out.line(format!(
        "    transfers to {}; write cache {}; SGL {}; optional commands: {}",
        format_size(controller.transfer_bytes_max.into()),
        yes(controller.volatile_write_cache),
        yes(controller.sgl),
        controller.commands.join(", ")
    ))?;
    if let Some(smart) = &report.smart {
        print_smart(smart, out)?;
    }
    if let Some(firmware) = &report.firmware {
        let slots = firmware.slots.iter().map(|one| format!("{} {}", one.slot, one.revision));
        let slots = slots.collect::<Vec<_>>().join(", ");
        out.line(format!("    firmware slots: {slots}; slot {} runs", firmware.active_slot))?;
    }
    for error in report.errors.iter().take(ERRORS_SHOWN) {
        out.line(format!(
            "    error {}: queue {} command {} status {:#06x} namespace {} block {}",
            error.error_count, error.sqid, error.cid, error.status, error.nsid, error.lba
        ))?;
    }
    for missing in &report.missing {
        out.line(format!("    {missing}"))?;
    }
    report.namespaces.iter().try_for_each(|namespace| print_namespace(namespace, out))?;
    match &report.memory {
        Some(memory) => out.line(format!("buffers: {memory}")),
        None => Ok(()),
    }
}

fn print_smart(smart: &SmartReport, out: &mut Out) -> std::io::Result<()> {
    for warning in &smart.critical_warnings {
        out.line(format!("    CRITICAL: {warning}"))?;
    }
    let temperature =
        smart.temperature_celsius.map_or("not told".to_owned(), |degrees| format!("{degrees} °C"));
    out.line(format!(
        "    health: spare {} % (least {} %), used {} %, temperature {temperature}, {} media errors",
        smart.available_spare_percent,
        smart.available_spare_threshold_percent,
        smart.percentage_used,
        smart.media_errors
    ))?;
    let bytes = |units: u64| format_size(units.saturating_mul(512_000));
    out.line(format!(
        "    life: {} hours on, {} power cycles, {} unsafe shutdowns, {} read, {} written",
        smart.power_on_hours,
        smart.power_cycles,
        smart.unsafe_shutdowns,
        bytes(smart.data_units_read),
        bytes(smart.data_units_written)
    ))
}

fn print_namespace(namespace: &NamespaceReport, out: &mut Out) -> std::io::Result<()> {
    let mut parts = vec![
        format!("    namespace {}", namespace.nsid),
        format_size(namespace.size_bytes),
        format!("{} B blocks", namespace.logical_block_bytes),
    ];
    parts.extend(namespace.nguid.as_ref().map(|id| format!("nguid {id}")));
    parts.extend(namespace.eui64.as_ref().map(|id| format!("eui64 {id}")));
    parts.extend(namespace.uuid.as_ref().map(|id| format!("uuid {id}")));
    parts.extend(namespace.shared.then(|| "shared".to_owned()));
    parts.extend(namespace.read_only.then(|| "write protected".to_owned()));
    parts.extend(namespace.refusal.map(|why| format!("NOT USABLE: {why}")));
    out.line(parts.join("  "))?;
    for read in &namespace.reads {
        let latency = &read.reads.latency;
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let us = |ns: u64| format!("{:.1}", ns as f64 / 1e3);
        out.line(format!(
            "        {} B at random, {} in flight: {:.0} reads/s, {:.1} MiB/s; us: p50 {}, p99 {}, p99.9 {}, max {}",
            read.read_bytes,
            read.depth,
            read.reads.iops,
            read.reads.bytes_per_s / f64::from(1 << 20),
            us(latency.p50_ns),
            us(latency.p99_ns),
            us(latency.p999_ns),
            us(latency.max_ns)
        ))?;
    }
    Ok(())
}
