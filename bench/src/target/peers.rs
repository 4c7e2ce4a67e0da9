//! Whom the target is set beside: what is there, and how a side is started.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::LEN;
use super::cases::{Bars, Case};
use super::light::LightHost;
use super::process::{Served, TargetProcess};
use super::spdk::{Spdk, SpdkProcess};
use super::work::Kind;
use crate::threads::cpu_time_of;

/// One that the same work is given to.
#[derive(Clone, Debug)]
pub(super) enum Peer {
    /// Answers the same bytes, with no work behind it.
    Bare,
    /// SPDK's target.
    Spdk(Spdk),
}

/// Those that are on this machine. Who is absent is named, and why.
pub(super) fn found(absent: &mut Vec<String>) -> Vec<Peer> {
    let mut peers = vec![Peer::Bare];
    match Spdk::find() {
        Ok(spdk) => peers.push(Peer::Spdk(spdk)),
        Err(why) => absent.push(format!("{}: {why}", super::spdk::NAME)),
    }
    peers
}

impl Peer {
    /// What rows call it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Bare => "a bare responder on the same sockets, which has no work",
            Self::Spdk(spdk) => &spdk.name,
        }
    }

    /// What stands behind the case in the names of its rows.
    pub(super) const fn place(&self) -> &'static str {
        match self {
            Self::Bare => "",
            Self::Spdk(_) => "/spdk",
        }
    }

    /// Whether it can do this.
    pub(super) fn can(&self, case: &Case) -> bool {
        match self {
            Self::Bare => case.has_ceiling(),
            Self::Spdk(_) => true,
        }
    }

    /// What must hold beside it.
    pub(super) fn bars(&self, case: &Case) -> Bars {
        match self {
            Self::Bare => case.bars_of_ceiling(),
            Self::Spdk(_) => case.bars_of_spdk(),
        }
    }
}

/// Who answers in a round.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side<'p> {
    /// fastice.
    Ours,
    /// A peer.
    Peer(&'p Peer),
}

impl Side<'_> {
    /// Starts it for this case.
    pub(super) fn start(&self, case: &Case) -> Result<Target> {
        Ok(match self {
            Self::Ours => Target::Child(TargetProcess::start(case.served)?),
            Self::Peer(Peer::Bare) => {
                let served =
                    if case.work.kind == Kind::Read { Served::BareReads } else { Served::BareWrites };
                Target::Bare(TargetProcess::start(served)?)
            }
            Self::Peer(Peer::Spdk(spdk)) => Target::Spdk(spdk.start(case.served)?),
        })
    }
}

/// One that runs, and ends with this.
#[derive(Debug)]
pub(super) enum Target {
    /// fastice, in this program.
    Child(TargetProcess),
    /// The bare responder, in this program.
    Bare(TargetProcess),
    /// SPDK's.
    Spdk(SpdkProcess),
}

impl Target {
    fn address(&self) -> SocketAddr {
        match self {
            Self::Child(process) | Self::Bare(process) => process.address,
            Self::Spdk(process) => process.address,
        }
    }

    /// A host of it.
    pub(super) fn host(&self, case: &Case) -> Result<LightHost> {
        let Case { work, connections, depth, .. } = *case;
        match self {
            Self::Bare(_) => LightHost::connect_bare(self.address(), work, depth, LEN),
            Self::Child(_) | Self::Spdk(_) => LightHost::join(self.address(), work, connections, depth, LEN),
        }
    }

    /// The processor time of all its threads so far.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        let pid = match self {
            Self::Child(process) | Self::Bare(process) => process.pid(),
            Self::Spdk(process) => process.pid(),
        };
        cpu_time_of(&pid.to_string(), &[""])
    }

    /// Microseconds for which it was busy so far; `None` when it does not tell.
    pub(super) fn busy_us(&mut self) -> Result<Option<f64>> {
        match self {
            Self::Child(process) => process.busy_us().map(Some),
            Self::Bare(_) => Ok(None),
            Self::Spdk(process) => process.busy_us().map(Some),
        }
    }
}
