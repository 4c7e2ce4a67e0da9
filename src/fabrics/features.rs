//! Get Features and Set Features (NVM Express Base Specification 2.1, sections 5.1.11 and 5.1.25).
//!
//! Nothing can be saved: after a reset every feature is at its default again, but for the keep alive timeout, which
//! belongs to the Connect command.

use std::collections::BTreeMap;

use nvme_spec::aer::config;
use nvme_spec::feature::{FeatureId, FeatureSelect, HostBehaviorSupport, SET_FEATURES_SAVE, capability};
use nvme_spec::{Nsid, Status, SubmissionQueueEntry};
use zerocopy::{FromBytes, IntoBytes};

use super::command::{CommandError, at};
use super::controller::Controller;
use super::options::NSID_MAX;
use super::subsystem::SubsystemKind;

/// The features of I/O controllers; discovery controllers have the second group only.
pub(super) const SUPPORTED: &[FeatureId] = &[
    FeatureId::ARBITRATION,
    FeatureId::POWER_MANAGEMENT,
    FeatureId::TEMPERATURE_THRESHOLD,
    FeatureId::ERROR_RECOVERY,
    FeatureId::VOLATILE_WRITE_CACHE,
    FeatureId::NUMBER_OF_QUEUES,
    FeatureId::WRITE_ATOMICITY,
    FeatureId::HOST_BEHAVIOR_SUPPORT,
    FeatureId::ASYNC_EVENT_CONFIG,
    FeatureId::KEEP_ALIVE_TIMER,
    FeatureId::HOST_IDENTIFIER,
];
const DISCOVERY_SUPPORTED: &[FeatureId] =
    &[FeatureId::ASYNC_EVENT_CONFIG, FeatureId::KEEP_ALIVE_TIMER, FeatureId::HOST_IDENTIFIER];

/// Whether a feature has a value for each namespace instead of one for the controller.
pub(super) fn is_of_namespaces(id: FeatureId) -> bool {
    id == FeatureId::ERROR_RECOVERY
}

/// The features that are kept nowhere else. Some are limits on what this controller never does: they are kept as the
/// host set them, and hold whatever their value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Features {
    /// Arbitration. Commands are taken as they come, from all queues alike, which is what "no limit" says; a burst that
    /// a host sets is a recommendation, and the weights belong to an arbitration that CAP does not offer.
    arbitration: u32,
    /// Over and under temperature threshold of the composite temperature, in kelvins. No temperature is measured, so
    /// none is ever crossed.
    temperature_k: [u16; 2],
    /// Time Limited Error Recovery of each namespace in 100 ms, where it is not 0. The target itself never tries again.
    error_recovery_100ms: BTreeMap<u32, u16>,
    /// Disable Normal. No write is atomic beyond one block, normal or not.
    write_atomicity: u32,
    /// ACRE and ETDAS of Host Behavior Support.
    behavior: [u8; 2],
}

/// AB of Arbitration: no limit (section 5.1.25.1.1).
const NO_BURST_LIMIT: u32 = 0b111;
/// AB, LPW, MPW and HPW.
const ARBITRATION_BITS: u32 = 0xFFFF_FF07;

impl Default for Features {
    fn default() -> Self {
        Self {
            arbitration: NO_BURST_LIMIT,
            temperature_k: [u16::MAX, 0],
            error_recovery_100ms: BTreeMap::new(),
            write_atomicity: 0,
            behavior: [0; 2],
        }
    }
}

/// What features are, elsewhere.
pub(super) struct Context<'a> {
    pub(super) controller: &'a Controller,
    pub(super) kato_ms: u32,
    pub(super) events: u32,
    /// I/O queues granted.
    pub(super) io_queues: u16,
    pub(super) io_queues_max: u16,
}

/// The value of a feature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// In DW0 of the completion.
    Dword(u32),
    /// In data.
    Data(Vec<u8>),
}

/// What Set Features asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It is done; DW0 of the completion.
    Done(u32),
    /// A new keep alive timeout.
    KeepAlive { kato_ms: u32 },
    /// Other asynchronous events.
    Events { enabled: u32 },
    /// The value is in data: see [`set_data`].
    Data { len: u32 },
}

/// Get Features.
pub(super) fn get(
    features: &Features,
    context: &Context<'_>,
    sqe: &SubmissionQueueEntry,
) -> Result<Value, CommandError> {
    let [id, select, ..] = sqe.cdw10.get().to_le_bytes();
    let id = FeatureId(id);
    check_supported(context.controller, id)?;
    match FeatureSelect(select & 0b111) {
        FeatureSelect::CURRENT => current(features, context, id, sqe),
        // Nothing was ever saved, so the saved value is the default.
        FeatureSelect::DEFAULT | FeatureSelect::SAVED => {
            let context = Context { events: 0, io_queues: context.io_queues_max, ..*context };
            current(&Features::default(), &context, id, sqe)
        }
        FeatureSelect::SUPPORTED_CAPABILITIES => Ok(Value::Dword(match id {
            id if is_of_namespaces(id) => capability::CHANGEABLE | capability::NAMESPACE_SPECIFIC,
            FeatureId::VOLATILE_WRITE_CACHE | FeatureId::HOST_IDENTIFIER => 0,
            _ => capability::CHANGEABLE,
        })),
        _ => Err(CommandError::field(at::CDW10)),
    }
}

fn current(
    features: &Features,
    context: &Context<'_>,
    id: FeatureId,
    sqe: &SubmissionQueueEntry,
) -> Result<Value, CommandError> {
    Ok(match id {
        FeatureId::ARBITRATION => Value::Dword(features.arbitration),
        FeatureId::POWER_MANAGEMENT => Value::Dword(0),
        FeatureId::TEMPERATURE_THRESHOLD => {
            let (threshold, sensors) = threshold_of(sqe.cdw11.get())?;
            if sensors != Sensors::Composite {
                return Err(CommandError::field(at::CDW11));
            }
            let [over, under] = features.temperature_k;
            Value::Dword(u32::from(if threshold == Threshold::Over { over } else { under }))
        }
        FeatureId::ERROR_RECOVERY => {
            let nsid = namespace(context.controller, sqe.nsid())?;
            Value::Dword(features.error_recovery_100ms.get(&nsid).copied().unwrap_or(0).into())
        }
        FeatureId::WRITE_ATOMICITY => Value::Dword(features.write_atomicity),
        FeatureId::VOLATILE_WRITE_CACHE => Value::Dword(1),
        FeatureId::NUMBER_OF_QUEUES => Value::Dword(both(context.io_queues)),
        FeatureId::ASYNC_EVENT_CONFIG => Value::Dword(context.events),
        FeatureId::KEEP_ALIVE_TIMER => Value::Dword(context.kato_ms),
        FeatureId::HOST_BEHAVIOR_SUPPORT => {
            let mut data = features.behavior.to_vec();
            data.resize(size_of::<HostBehaviorSupport>(), 0);
            Value::Data(data)
        }
        FeatureId::HOST_IDENTIFIER if sqe.cdw11.get() & 1 == 0 => {
            // EXHID: over fabrics, host identifiers have 128 bits (section 5.1.25.1.28).
            return Err(CommandError::field(at::CDW11));
        }
        FeatureId::HOST_IDENTIFIER => Value::Data(context.controller.host.id.to_vec()),
        _ => return Err(CommandError::field(at::CDW10)),
    })
}

/// Set Features, as far as it needs no data.
pub(super) fn set(
    features: &mut Features,
    controller: &Controller,
    io_queues_max: u16,
    sqe: &SubmissionQueueEntry,
) -> Result<Change, CommandError> {
    let [id, ..] = sqe.cdw10.get().to_le_bytes();
    let id = FeatureId(id);
    check_supported(controller, id)?;
    if sqe.cdw10.get() & SET_FEATURES_SAVE != 0 {
        return Err(CommandError::at(Status::FEATURE_NOT_SAVEABLE, at::CDW10));
    }
    if !is_of_namespaces(id) && sqe.nsid() != Nsid::NONE && sqe.nsid() != Nsid::ALL {
        return Err(CommandError::at(Status::FEATURE_NOT_NAMESPACE_SPECIFIC, at::NSID));
    }
    let value = sqe.cdw11.get();
    match id {
        FeatureId::ARBITRATION => {
            features.arbitration = value & ARBITRATION_BITS;
            Ok(Change::Done(0))
        }
        FeatureId::TEMPERATURE_THRESHOLD => set_temperature(features, value),
        FeatureId::ERROR_RECOVERY => set_error_recovery(features, controller, sqe.nsid(), value),
        FeatureId::WRITE_ATOMICITY => {
            features.write_atomicity = value & 1;
            Ok(Change::Done(0))
        }
        // There is one power state, 0.
        FeatureId::POWER_MANAGEMENT if value & 0x1F == 0 => Ok(Change::Done(0)),
        // The device's cache is not ours to switch; that it is on is all that can be said.
        FeatureId::VOLATILE_WRITE_CACHE if value & 1 == 1 => Ok(Change::Done(0)),
        FeatureId::VOLATILE_WRITE_CACHE => Err(CommandError::at(Status::FEATURE_NOT_CHANGEABLE, at::CDW11)),
        FeatureId::NUMBER_OF_QUEUES => number_of_queues(controller, io_queues_max, value),
        FeatureId::ASYNC_EVENT_CONFIG if value & !known_events(controller) == 0 => {
            Ok(Change::Events { enabled: value })
        }
        FeatureId::KEEP_ALIVE_TIMER => Ok(Change::KeepAlive { kato_ms: value }),
        FeatureId::HOST_BEHAVIOR_SUPPORT => {
            Ok(Change::Data { len: u32::try_from(size_of::<HostBehaviorSupport>()).unwrap_or(0) })
        }
        // Connect sets it (section 5.1.25.1.28).
        FeatureId::HOST_IDENTIFIER => Err(CommandError::sequence()),
        _ => Err(CommandError::field(at::CDW11)),
    }
}

/// Which of the two thresholds of Temperature Threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Threshold {
    Over,
    Under,
}

/// What a Temperature Threshold is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sensors {
    Composite,
    /// All that are implemented: none.
    All,
}

/// THSEL and TMPSEL of Temperature Threshold (section 5.1.25.1.3).
fn threshold_of(cdw11: u32) -> Result<(Threshold, Sensors), CommandError> {
    let threshold = match cdw11 >> 20 & 0b11 {
        0 => Threshold::Over,
        1 => Threshold::Under,
        _ => return Err(CommandError::field(at::CDW11)),
    };
    match cdw11 >> 16 & 0xF {
        0 => Ok((threshold, Sensors::Composite)),
        0xF => Ok((threshold, Sensors::All)),
        // There are no sensors 1 to 8.
        _ => Err(CommandError::field(at::CDW11)),
    }
}

fn set_temperature(features: &mut Features, value: u32) -> Result<Change, CommandError> {
    let (threshold, sensors) = threshold_of(value)?;
    let [kelvin_0, kelvin_1, ..] = value.to_le_bytes();
    let kelvin = u16::from_le_bytes([kelvin_0, kelvin_1]);
    let [over, under] = &mut features.temperature_k;
    if sensors == Sensors::Composite {
        *(if threshold == Threshold::Over { over } else { under }) = kelvin;
    }
    Ok(Change::Done(0))
}

/// Error Recovery (NVM Command Set section 4.1.3.2): TLER, and DULBE which needs what NSFEAT does not offer.
fn set_error_recovery(
    features: &mut Features,
    controller: &Controller,
    nsid: Nsid,
    value: u32,
) -> Result<Change, CommandError> {
    const DULBE: u32 = 1 << 16;
    let [tler_0, tler_1, ..] = value.to_le_bytes();
    let tler_100ms = u16::from_le_bytes([tler_0, tler_1]);
    if value & DULBE != 0 {
        return Err(CommandError::field(at::CDW11));
    }
    let kept = &mut features.error_recovery_100ms;
    if nsid == Nsid::ALL {
        let table = controller.subsystem.table();
        kept.extend(table.iter().map(|export| (export.nsid.0, tler_100ms)));
    } else {
        kept.insert(namespace(controller, nsid)?, tler_100ms);
    }
    Ok(Change::Done(0))
}

/// The identifier of an active namespace.
fn namespace(controller: &Controller, nsid: Nsid) -> Result<u32, CommandError> {
    if nsid.0 == 0 || nsid.0 > NSID_MAX {
        return Err(CommandError::at(Status::INVALID_NAMESPACE, at::NSID));
    }
    controller.subsystem.table().get(nsid).map(|_| nsid.0).ok_or(CommandError::field(at::NSID))
}

/// Set Features with its data, for features that have some.
pub(super) fn set_data(
    features: &mut Features,
    sqe: &SubmissionQueueEntry,
    data: &[u8],
) -> Result<(), CommandError> {
    let [id, ..] = sqe.cdw10.get().to_le_bytes();
    if FeatureId(id) != FeatureId::HOST_BEHAVIOR_SUPPORT {
        return Err(CommandError::sequence());
    }
    let data = HostBehaviorSupport::ref_from_bytes(data)
        .map_err(|_| CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH))?;
    // Telemetry a host may turn on though there is none.
    let unsupported = data.as_bytes().iter().skip(2).any(|&byte| byte != 0);
    if data.acre > 1 || data.etdas > 1 || unsupported {
        return Err(CommandError::fatal(Status::INVALID_FIELD));
    }
    features.behavior = [data.acre, data.etdas];
    Ok(())
}

impl Features {
    /// Whether the host takes CRD (ACRE).
    pub(super) const fn retries_later(&self) -> bool {
        self.behavior[0] != 0
    }
}

/// Number of Queues (section 5.1.25.2.1): what was asked for, as far as there is that much.
fn number_of_queues(controller: &Controller, max: u16, value: u32) -> Result<Change, CommandError> {
    let [sq_0, sq_1, cq_0, cq_1] = value.to_le_bytes();
    let (sqs_z, cqs_z) = (u16::from_le_bytes([sq_0, sq_1]), u16::from_le_bytes([cq_0, cq_1]));
    if sqs_z == u16::MAX || cqs_z == u16::MAX {
        return Err(CommandError::field(at::CDW11));
    }
    if controller.has_io_queues() {
        return Err(CommandError::sequence());
    }
    // Over fabrics queues come in pairs.
    let granted = sqs_z.min(cqs_z).saturating_add(1).min(max);
    controller.grant_io_queues(granted);
    Ok(Change::Done(both(granted)))
}

/// Zero-based in both halves.
fn both(count: u16) -> u32 {
    let count_z = u32::from(count.saturating_sub(1));
    count_z << 16 | count_z
}

fn known_events(controller: &Controller) -> u32 {
    match controller.subsystem.kind {
        SubsystemKind::Nvm => {
            let ana = if controller.shows_ana() { config::ANA_CHANGE } else { 0 };
            config::SMART_CRITICAL | config::NAMESPACE_ATTRIBUTE | ana
        }
        SubsystemKind::Discovery => config::DISCOVERY_LOG_CHANGE,
    }
}

fn check_supported(controller: &Controller, id: FeatureId) -> Result<(), CommandError> {
    let supported = match controller.subsystem.kind {
        SubsystemKind::Nvm => SUPPORTED,
        SubsystemKind::Discovery => DISCOVERY_SUPPORTED,
    };
    if supported.contains(&id) { Ok(()) } else { Err(CommandError::field(at::CDW10)) }
}
