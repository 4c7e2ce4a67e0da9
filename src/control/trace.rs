//! The last commands of all cores, as a running target tells of them.
//!
//! The control thread asks each core by a letter, and waits for none; whoever has to answer the client collects what they send. Each
//! core copies its own rings between two turns, so what it tells is of one moment. Cores are asked one after another: their
//! moments differ by some turns, but time stamps are of one clock.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::stage::{Stage, Stamp, TraceCopy, TracedCommand};

/// How long a core may take to answer a letter.
const CORE_PATIENCE: Duration = Duration::from_secs(2);

/// Moments of a command: the boundaries of its stages.
pub const MOMENTS: usize = Stage::ALL.len() + 1;

/// The copies of all cores, as they come.
pub(super) struct Copies {
    pub(super) copies: Receiver<TraceCopy>,
    /// How many cores were asked.
    pub(super) asked: usize,
}

/// The last commands of a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceStatus {
    /// Its process.
    pub pid: u32,
    /// A moment by the clock of all moments here: nanoseconds since the target looked at it first.
    pub at_ns: u64,
    /// The same by the calendar: microseconds since 1970.
    pub at_unix_us: u64,
    /// Cores that did not answer in time.
    pub silent: usize,
    /// The others.
    pub trace: Vec<CoreTrace>,
}

/// The last commands of a core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreTrace {
    /// Its CPU.
    pub cpu: usize,
    /// How many commands it has answered since it runs; those that are not here are forgotten.
    pub ended: u64,
    /// Whose commands they are.
    pub connections: Vec<TracedConnection>,
    /// In the order in which their answers were made.
    pub commands: Vec<CommandTrace>,
}

/// A queue of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedConnection {
    /// The host's NQN.
    pub host: String,
    /// The subsystem's NQN.
    pub subsystem: String,
    /// The host's controller there.
    pub cntlid: u16,
    /// Its queue.
    pub qid: u16,
}

/// A command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandTrace {
    /// Which of the connections of its core; none before Connect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<usize>,
    /// OPC.
    pub opcode: u8,
    /// CID.
    pub cid: u16,
    /// NSID.
    pub nsid: u32,
    /// CDW11:CDW10.
    pub cdw10_11: u64,
    /// CDW12.
    pub cdw12: u32,
    /// The status that it ended with: type, code, DNR.
    pub status: u16,
    /// When it arrived, when it passed the ends of the stages of [`Stage::ALL`]; 0 where it did not, or not yet.
    pub moments_ns: [u64; MOMENTS],
}

impl CommandTrace {
    fn of(traced: &TracedCommand) -> Self {
        let TracedCommand { command, who, stamps, sent } = *traced;
        let moments =
            [stamps.arrived, stamps.begun, stamps.parsed, stamps.looked_up, stamps.handed, stamps.done, sent];
        Self {
            connection: who,
            opcode: command.opcode,
            cid: command.cid.get(),
            nsid: command.nsid.get(),
            cdw10_11: command.cdw10_11(),
            cdw12: command.cdw12.get(),
            status: command.status.0,
            moments_ns: moments.map(Stamp::ns),
        }
    }
}

impl CoreTrace {
    fn of(copy: &TraceCopy) -> Self {
        let connections = copy.who.iter().map(|who| TracedConnection {
            host: who.host.clone(),
            subsystem: who.subsystem.clone(),
            cntlid: who.cntlid,
            qid: who.qid,
        });
        Self {
            cpu: copy.cpu,
            ended: copy.ended,
            connections: connections.collect(),
            commands: copy.commands().map(|command| CommandTrace::of(&command)).collect(),
        }
    }
}

/// Waits for the copies of all cores, for so long as a core may take.
pub(super) fn collect(Copies { copies, asked }: &Copies) -> TraceStatus {
    let deadline = Instant::now() + CORE_PATIENCE;
    let mut trace = Vec::with_capacity(*asked);
    while trace.len() < *asked {
        match copies.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(copy) => trace.push(CoreTrace::of(&copy)),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    trace.sort_by_key(|core| core.cpu);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    TraceStatus {
        pid: std::process::id(),
        at_ns: Stamp::now().ns(),
        at_unix_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
        silent: *asked - trace.len(),
        trace,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::stage::Trace;

    #[test]
    fn cores_that_end_without_an_answer_are_counted() {
        let (reply, copies) = channel();
        for (cpu, ended) in [(9, 0), (3, 7)] {
            let mut copy = Trace::default().copy(cpu);
            copy.ended = ended;
            reply.send(copy).expect("it listens");
        }
        drop(reply);
        let told = collect(&Copies { copies, asked: 3 });
        assert_eq!((told.silent, told.trace.len(), told.trace[0].cpu, told.trace[0].ended), (1, 2, 3, 7));
        let text = serde_json::to_string(&told).expect("a document");
        assert_eq!(serde_json::from_str::<TraceStatus>(&text).expect("the same"), told);
    }
}
