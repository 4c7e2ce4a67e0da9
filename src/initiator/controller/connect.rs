//! From a TCP connection to an enabled controller with I/O queues.

use super::admin::{AdminQueue, good, raw_on};
use super::{ConnectOptions, low_half};
use crate::initiator::command;
use crate::initiator::error::InitiatorError;
use crate::initiator::transport::{Queue, QueueOptions};
use nvme_spec::fabrics::{ConnectData, cattr, nqn_field};
use nvme_spec::feature::FeatureId;
use nvme_spec::identify::IdentifyController;
use nvme_spec::register::{Cap, Cc, Csts, Property, css};
use nvme_spec::{Cntlid, Nsid, Qid};
use std::thread::sleep;
use std::time::{Duration, Instant};
use zerocopy::{FromZeros, IntoBytes};

/// Entries of the admin queue, as Linux asks for.
const ADMIN_ENTRIES: u16 = 32;
/// The unit of CAP.TO.
const TO_UNIT: Duration = Duration::from_millis(500);

/// Opens the admin queue; gives the controller's CNTLID with it.
pub(super) fn admin_queue(options: &ConnectOptions) -> Result<(AdminQueue, u16), InitiatorError> {
    let mut queue = Queue::connect(options.address, queue_options(options, ADMIN_ENTRIES))?;
    let result = connect(&mut queue, options, Qid::ADMIN, ADMIN_ENTRIES, Cntlid::DYNAMIC)?;
    let [low, high, auth_low, auth_high] = result.to_le_bytes();
    if auth_low != 0 || auth_high != 0 {
        return Err(InitiatorError::incompatible(
            "the controller wants authentication, which this host cannot do",
        ));
    }
    Ok((AdminQueue::new(queue), u16::from_le_bytes([low, high])))
}

fn queue_options(options: &ConnectOptions, entries: u16) -> QueueOptions {
    QueueOptions {
        // One entry stays empty: a full queue would look like an empty one.
        depth: usize::from(entries.saturating_sub(1).max(1)),
        digests: options.digests(),
        hpda: options.hpda,
        success_flag: options.disable_sq_flow_control,
        timeouts: options.timeouts,
    }
}

/// Sends Connect; gives dword 0 of its completion.
fn connect(
    queue: &mut Queue,
    options: &ConnectOptions,
    qid: Qid,
    entries: u16,
    cntlid: Cntlid,
) -> Result<u32, InitiatorError> {
    let field = |what: &str, nqn: &str| {
        nqn_field(nqn)
            .ok_or_else(|| InitiatorError::invalid(format!("the {what} NQN has not 1 to 223 bytes")))
    };
    let mut data = ConnectData::new_zeroed();
    data.hostid = options.host.id;
    data.cntlid = cntlid.get().into();
    data.subnqn = field("subsystem", &options.subsystem_nqn)?;
    data.hostnqn = field("host", &options.host.nqn)?;
    let attributes = if options.disable_sq_flow_control { cattr::DISABLE_SQ_FLOW_CONTROL } else { 0 };
    let kato_ms = if qid == Qid::ADMIN { options.kato_ms } else { 0 };
    let sqe = command::connect(qid, entries, attributes, kato_ms);
    let completion = raw_on(queue, &sqe, data.as_bytes(), &mut [], |_, _| {})?;
    good("Connect", completion).map(command::Completion::result32)
}

/// Reads CAP and VS, sets CC.EN and waits for CSTS.RDY.
pub(super) fn enable(admin: &mut AdminQueue, options: &ConnectOptions) -> Result<(Cap, u32), InitiatorError> {
    let cap = Cap::from_bits(admin.property_get(Property::CAP, true)?);
    let version = low_half(admin.property_get(Property::VS, false)?);
    let set = if cap.css_iocs() {
        css::ALL
    } else if cap.css_noiocs() && !cap.css_nvm() {
        css::ADMIN_ONLY
    } else {
        css::NVM
    };
    let cc = Cc::new().with_css(set).with_iosqes(6).with_iocqes(4);
    admin.property_set(Property::CC, cc.with_en(true).into_bits())?;
    let deadline = Instant::now() + (TO_UNIT * u32::from(cap.to()).max(1)).max(options.timeouts.initialize);
    loop {
        let csts = Csts::from_bits(low_half(admin.property_get(Property::CSTS, false)?));
        if csts.cfs() {
            return Err(InitiatorError::incompatible("the controller reports a fatal status (CSTS.CFS)"));
        }
        if csts.rdy() {
            return Ok((cap, version));
        }
        if Instant::now() >= deadline {
            return Err(InitiatorError::timeout("the controller does not become ready (CSTS.RDY)"));
        }
        sleep(Duration::from_millis(2));
    }
}

/// Asks for I/O queues and connects those that are granted.
pub(super) fn io_queues(
    admin: &mut AdminQueue,
    options: &ConnectOptions,
    identity: &IdentifyController,
    cap: Cap,
    cntlid: u16,
) -> Result<Vec<Queue>, InitiatorError> {
    if options.io_queues == 0 {
        return Ok(Vec::new());
    }
    let (ioccsz, iorcsz) = (identity.ioccsz_16b.get(), identity.iorcsz_16b.get());
    if ioccsz < 4 || iorcsz < 1 || identity.icdoff_16b.get() != 0 {
        return Err(InitiatorError::incompatible(format!(
            "capsules of IOCCSZ {ioccsz}, IORCSZ {iorcsz}, ICDOFF {}",
            identity.icdoff_16b.get()
        )));
    }
    let wanted_z = u32::from(options.io_queues - 1);
    let granted =
        admin.set_features(FeatureId::NUMBER_OF_QUEUES, Nsid::NONE, wanted_z | wanted_z << 16, &[])?;
    let granted = (granted.result32() & 0xFFFF).min(granted.result32() >> 16) + 1;
    let count = granted.min(options.io_queues.into());
    let entries = options.queue_size.max(2).min(cap.mqes_z().saturating_add(1));
    let mut queues = Vec::with_capacity(count as usize);
    for qid in 1..=u16::try_from(count).unwrap_or(u16::MAX) {
        let mut queue = Queue::connect(options.address, queue_options(options, entries))?;
        connect(&mut queue, options, Qid(qid), entries, Cntlid(cntlid))?;
        queue.set_in_capsule_len_max(ioccsz.saturating_mul(16) - 64);
        queues.push(queue);
    }
    Ok(queues)
}
