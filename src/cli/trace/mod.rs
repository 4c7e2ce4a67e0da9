//! `fastice trace`: the last commands of the targets that run on this host, one by one.
//!
//! ```text
//!   control sockets --ask--> TraceStatus --> Named commands --> text, a line each
//!                                                          '--> chrome, slices that Perfetto and chrome://tracing draw
//! ```

mod chrome;
mod text;

use std::io;

use clap::{Args, ValueEnum};
use nvme_spec::fabrics::FabricsCommandType;
use nvme_spec::{AdminOpcode, NvmOpcode, Status};

use super::StateDirArg;
use super::exit::{Exit, Outcome};
use super::files::named_state;
use super::out::Out;
use super::status::silence;
use crate::control::{CommandTrace, CoreTrace, TraceStatus, TracedConnection, ask_all_for_traces};
use crate::stage::Stage;

/// Dump the last commands of the running targets, and when each passed its stages
///
/// Each core remembers some thousands of commands, always. A dump stops a core for less than a millisecond.
#[derive(Clone, Debug, Args)]
pub struct TraceArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub state: StateDirArg,
    /// How to print them
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// How commands are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A line a command, in the order of their arrival
    Text,
    /// JSON for ui.perfetto.dev and chrome://tracing
    Chrome,
}

/// Asks and prints.
///
/// # Errors
/// When the state directory does not exist or may not be read, or a target that runs does not answer, or a core of it.
pub fn run(args: &TraceArgs) -> Outcome {
    if let Some(state) = named_state(&args.state.state_dir)? {
        state.records_are_readable()?;
    }
    let (targets, silent): (Vec<_>, Vec<_>) =
        ask_all_for_traces(&args.state.state_dir).into_iter().partition(Result::is_ok);
    let targets: Vec<TraceStatus> = targets.into_iter().flatten().collect();
    let mut silent: Vec<io::Error> = silent.into_iter().filter_map(Result::err).collect();
    let mut out = Out::stdout();
    match args.format {
        Format::Chrome => {
            if targets.is_empty() && silent.is_empty() {
                tracing::warn!(state_dir = %args.state.state_dir.display(), "no target runs: the trace is empty");
            }
            out.json(&chrome::document(&targets))?;
        }
        Format::Text if targets.is_empty() && silent.is_empty() => {
            out.line(format!("no target runs with the state directory {}", args.state.state_dir.display()))?;
        }
        Format::Text => text::tell(&targets, &mut out)?,
    }
    out.flush()?;
    silent.extend(targets.iter().filter(|target| target.silent > 0).map(|target| {
        io::Error::other(format!("process {}: {} core(s) did not answer", target.pid, target.silent))
    }));
    match silent.first() {
        None => Ok(Exit::Ok),
        Some(first) => Err(silence(first)),
    }
}

/// A command with what it belongs to.
#[derive(Clone, Copy)]
struct Named<'a> {
    target: &'a TraceStatus,
    core: &'a CoreTrace,
    command: &'a CommandTrace,
    /// None before Connect.
    connection: Option<&'a TracedConnection>,
}

impl<'a> Named<'a> {
    /// All commands of a target, in the order of their arrival.
    fn all(target: &'a TraceStatus) -> Vec<Self> {
        let of_core = |core: &'a CoreTrace| {
            core.commands.iter().map(move |command| {
                let connection = command.connection.and_then(|at| core.connections.get(at));
                Self { target, core, command, connection }
            })
        };
        let mut all: Vec<_> = target.trace.iter().flat_map(of_core).collect();
        all.sort_by_key(|it| it.arrived_ns());
        all
    }

    const fn arrived_ns(&self) -> u64 {
        self.command.moments_ns[0]
    }

    /// The last of its moments that is known.
    fn end_ns(&self) -> u64 {
        self.command.moments_ns.iter().copied().max().unwrap_or_default()
    }

    /// Whether its answer was sent.
    const fn is_sent(&self) -> bool {
        self.command.moments_ns[Stage::ALL.len()] != 0
    }

    /// The stages that it passed, with their beginning and end. Of one that came to no device there are none but its total.
    fn stages(&self) -> impl Iterator<Item = (Stage, u64, u64)> {
        let moments = &self.command.moments_ns;
        let on_device = moments[1] != 0;
        let pairs = Stage::ALL.into_iter().zip(moments.iter().zip(&moments[1..]));
        pairs
            .filter(move |(_, (from, to))| on_device && **from != 0 && to >= from)
            .map(|(stage, (from, to))| (stage, *from, *to))
    }

    /// The queue; the first that is said is Connect, on a queue that has no number yet.
    fn is_admin(&self) -> bool {
        self.connection.is_none_or(|connection| connection.qid == 0)
    }

    fn is_fabrics(&self) -> bool {
        AdminOpcode(self.command.opcode) == AdminOpcode::FABRICS
    }

    /// Fabrics commands have none: FCTYPE is where other commands have its first byte.
    fn nsid(&self) -> Option<u32> {
        (!self.is_fabrics()).then_some(self.command.nsid)
    }

    fn name(&self) -> String {
        let CommandTrace { opcode, nsid, .. } = *self.command;
        if self.is_fabrics() {
            return format!("Fabrics {:?}", FabricsCommandType(nsid.to_le_bytes()[0]));
        }
        if self.is_admin() {
            format!("{:?}", AdminOpcode(opcode))
        } else {
            format!("{:?}", NvmOpcode(opcode))
        }
    }

    /// First block and number of blocks, of commands that have any.
    fn blocks(&self) -> Option<(u64, u32)> {
        let has_blocks = !self.is_admin()
            && matches!(
                NvmOpcode(self.command.opcode),
                NvmOpcode::READ
                    | NvmOpcode::WRITE
                    | NvmOpcode::COMPARE
                    | NvmOpcode::WRITE_ZEROES
                    | NvmOpcode::VERIFY
                    | NvmOpcode::WRITE_UNCORRECTABLE
            );
        has_blocks.then(|| (self.command.cdw10_11, (self.command.cdw12 & 0xFFFF) + 1))
    }

    const fn status(&self) -> Status {
        Status(self.command.status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target with a connected host: reads that went all the way, a command that was refused, one whose answer waits.
    pub(super) fn target() -> TraceStatus {
        let connection = |qid| TracedConnection {
            host: "nqn.host".to_owned(),
            subsystem: "nqn.subsystem".to_owned(),
            cntlid: 4,
            qid,
        };
        let read = |cid: u16, begin: u64| CommandTrace {
            connection: Some(1),
            opcode: NvmOpcode::READ.0,
            cid,
            nsid: 1,
            cdw10_11: 0x1_0000_0008,
            cdw12: 7,
            status: 0,
            moments_ns: [0, 100, 300, 600, 1000, 91_000, 96_000].map(|at| begin + at),
        };
        let mut waits = read(3, 2_050_000);
        waits.moments_ns[Stage::ALL.len()] = 0;
        let refused = CommandTrace {
            status: Status::LBA_OUT_OF_RANGE.with_dnr().0,
            moments_ns: [2_000_500, 0, 0, 0, 0, 0, 2_001_000],
            ..read(9, 0)
        };
        let connect = CommandTrace {
            opcode: AdminOpcode::FABRICS.0,
            nsid: u32::from(FabricsCommandType::CONNECT.0),
            connection: None,
            ..refused
        };
        let commands = vec![read(2, 2_040_000), read(1, 2_000_000), refused, waits, connect];
        let core = CoreTrace { cpu: 6, ended: 77, connections: vec![connection(0), connection(1)], commands };
        TraceStatus {
            pid: 42,
            at_ns: 3_000_000,
            at_unix_us: 1_700_000_000_000_000,
            silent: 0,
            trace: vec![core],
        }
    }

    #[test]
    fn commands_come_in_the_order_of_their_arrival_with_names_and_blocks() {
        let target = target();
        let all = Named::all(&target);
        let cids: Vec<_> = all.iter().map(|it| it.command.cid).collect();
        assert_eq!(cids, [1, 9, 9, 2, 3]);
        assert_eq!((all[0].name().as_str(), all[0].blocks()), ("READ", Some((0x1_0000_0008, 8))));
        assert_eq!((all[2].name().as_str(), all[2].blocks()), ("Fabrics CONNECT", None));
        assert!(all[0].is_sent() && !all[4].is_sent());
        assert_eq!(all[0].stages().count(), Stage::ALL.len());
        assert_eq!(all[1].stages().count(), 0);
        assert_eq!(all[4].stages().count(), Stage::ALL.len() - 1, "not sent yet");
    }
}
