//! Whom the target is set beside: what is there, and how a side is started.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::cases::{Bars, Case};
use super::front::Together;
use super::light::LightHost;
use super::perf::Perf;
use super::previous::{Previous, PreviousProcess};
use super::process::{Served, TargetProcess};
use super::spdk::{Spdk, SpdkProcess};
use super::work::Kind;
use crate::profiles::windows::{BARE, OURS, UNPINNED};
use crate::threads::cpu_time_of;

const UNGATHERED: &str = "fastice, which leaves no socket alone (gather_us = 0)";

/// One that the same work is given to.
#[derive(Clone, Debug)]
pub(super) enum Peer {
    /// Answers the same bytes, with no work behind it.
    Bare,
    /// The same for a host that joins by the book, and that host of both sides; the light one where it is none.
    Front(Option<Perf>, Together),
    /// SPDK's target.
    Spdk(Spdk),
    /// SPDK's target, and SPDK's initiator for both sides.
    SpdkByItsInitiator(Spdk, Perf),
    /// fastice, as it was.
    Previous(Previous),
    /// fastice, with the same blocks of the same device and no pin.
    Unpinned,
    /// fastice, which leaves no socket alone, and the host of both sides; the light one where it is none.
    Ungathered(Option<Perf>),
}

/// How a peer is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PeerKind {
    /// The bare responder
    Bare,
    /// The bare responder, by SPDK's initiator
    BarePerf,
    /// SPDK's target, by the light host
    Spdk,
    /// SPDK's target, by SPDK's initiator
    SpdkPerf,
    /// Our previous release
    Previous,
    /// The same blocks without a pin, or without a map
    Unpinned,
    /// Ours, which leaves no socket alone, by both hosts
    Ungathered,
}

/// Those that are on this machine. Who is absent is named, and why.
pub(super) fn found(absent: &mut Vec<String>) -> Vec<Peer> {
    let mut peers =
        vec![Peer::Bare, Peer::Front(None, Together::One), Peer::Unpinned, Peer::Ungathered(None)];
    if let Ok(perf) = Perf::find() {
        peers.extend([Together::One, Together::All].map(|how| Peer::Front(Some(perf.clone()), how)));
        peers.push(Peer::Ungathered(Some(perf)));
    }
    let mut missing = |name: &str, why: &anyhow::Error| absent.push(format!("{name}: {why}"));
    match Spdk::find() {
        Ok(spdk) => {
            peers.push(Peer::Spdk(spdk.clone()));
            match Perf::find() {
                Ok(perf) => peers.push(Peer::SpdkByItsInitiator(spdk, perf)),
                Err(why) => missing(super::perf::NAME, &why),
            }
        }
        Err(why) => {
            missing(super::spdk::NAME, &why);
            if let Err(why) = Perf::find() {
                missing(super::perf::NAME, &why);
            }
        }
    }
    match Previous::find() {
        Ok(previous) => peers.push(Peer::Previous(previous)),
        Err(why) => missing(super::previous::NAME, &why),
    }
    peers
}

impl Peer {
    /// As it is asked for.
    pub(super) const fn kind(&self) -> PeerKind {
        match self {
            Self::Bare | Self::Front(None, _) => PeerKind::Bare,
            Self::Front(Some(_), _) => PeerKind::BarePerf,
            Self::Spdk(_) => PeerKind::Spdk,
            Self::SpdkByItsInitiator(..) => PeerKind::SpdkPerf,
            Self::Previous(_) => PeerKind::Previous,
            Self::Unpinned => PeerKind::Unpinned,
            Self::Ungathered(_) => PeerKind::Ungathered,
        }
    }

    /// What rows call it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Bare | Self::Front(..) => "a bare responder on the same sockets, which has no work",
            Self::Spdk(spdk) | Self::SpdkByItsInitiator(spdk, _) => &spdk.name,
            Self::Previous(previous) => &previous.name,
            Self::Unpinned => "fastice, with the same blocks of the same device and no pin",
            Self::Ungathered(_) => UNGATHERED,
        }
    }

    /// What stands behind the case in the names of its rows.
    pub(super) const fn place(&self) -> &'static str {
        match self {
            Self::Bare | Self::Front(None, _) | Self::Unpinned => "",
            Self::Front(Some(_), Together::One) => "/spdk-perf/bare",
            Self::Front(Some(_), Together::All) => "/spdk-perf/bare-together",
            Self::Spdk(_) => "/spdk",
            Self::SpdkByItsInitiator(..) => "/spdk-perf",
            Self::Previous(_) => "/previous",
            Self::Ungathered(None) => "/ungathered",
            Self::Ungathered(Some(_)) => "/spdk-perf/ungathered",
        }
    }

    /// Whether it can do this, and is asked to.
    pub(super) fn can(&self, case: &Case) -> bool {
        match self {
            Self::Bare => case.has_ceiling(),
            Self::Front(by, together) => {
                // Of few commands, as each of many connections has them, and of those without response capsules behind data, it makes no
                // difference, or makes it slower.
                let has_many = case.gathers() && case.work.kind != Kind::Write;
                let is_wanted = *together == Together::One || has_many;
                case.has_front() && is_wanted && (by.is_some() || !case.has_ceiling())
            }
            Self::Spdk(_) => matches!(case.served, Served::Null | Served::Memory),
            Self::SpdkByItsInitiator(..) => case.served == Served::Null,
            Self::Previous(_) => case.served == Served::Null && case.work.kind != Kind::Mixed,
            Self::Unpinned => case.is_pinned(),
            Self::Ungathered(_) => case.gathers() && case.work.kind != Kind::Mixed,
        }
    }

    /// What must hold beside it.
    pub(super) fn bars(&self, case: &Case) -> Bars {
        match self {
            Self::Bare => case.bars_of_ceiling(),
            Self::Spdk(_) | Self::SpdkByItsInitiator(..) => case.bars_of_spdk(),
            Self::Front(..) | Self::Previous(_) | Self::Ungathered(_) => Bars::default(),
            Self::Unpinned => Case::bars_of_pin(),
        }
    }

    /// The program that plays the host for both sides; none where the light one does.
    pub(super) const fn initiator(&self) -> Option<&Perf> {
        match self {
            Self::Front(Some(perf), _) | Self::SpdkByItsInitiator(_, perf) | Self::Ungathered(Some(perf)) => {
                Some(perf)
            }
            _ => None,
        }
    }

    /// How many rounds it gets of so many: more where a bar is, or is judged by it, and a round differs from the next by more than what is
    /// missing; fewer where a round takes whole seconds and nothing is demanded.
    pub(super) const fn rounds(&self, case: &Case, rounds: usize) -> usize {
        match self {
            Self::Unpinned if case.file.is_some() => rounds * 3,
            Self::SpdkByItsInitiator(..) | Self::Front(Some(_), _) => rounds + 2,
            Self::Previous(_) | Self::Ungathered(Some(_)) => rounds.div_ceil(2),
            Self::Bare | Self::Front(None, _) | Self::Spdk(_) | Self::Unpinned | Self::Ungathered(None) => {
                rounds
            }
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
    /// What profiles call it.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Ours => OURS,
            Self::Peer(Peer::Bare | Peer::Front(..)) => BARE,
            Self::Peer(Peer::Spdk(_) | Peer::SpdkByItsInitiator(..)) => "SPDK's target",
            Self::Peer(Peer::Previous(_)) => "our previous release",
            Self::Peer(Peer::Unpinned) => UNPINNED,
            Self::Peer(Peer::Ungathered(_)) => UNGATHERED,
        }
    }

    /// Starts it for this case.
    pub(super) fn start(&self, case: &Case) -> Result<Target> {
        let file = case.file.as_deref();
        Ok(match self {
            Self::Ours => Target::Child(TargetProcess::start(case.served, file)?),
            Self::Peer(Peer::Unpinned) => Target::Child(TargetProcess::start(Served::Disk, file)?),
            Self::Peer(Peer::Ungathered(_)) => Target::Child(TargetProcess::start(Served::Ungathered, file)?),
            Self::Peer(Peer::Bare) => {
                let served =
                    if case.work.kind == Kind::Read { Served::BareReads } else { Served::BareWrites };
                Target::Bare(TargetProcess::start(served, None)?)
            }
            Self::Peer(Peer::Front(_, together)) => {
                let served = match together {
                    Together::One => Served::FrontOne,
                    Together::All => Served::FrontAll,
                };
                Target::Front(TargetProcess::start(served, None)?)
            }
            Self::Peer(Peer::Spdk(spdk) | Peer::SpdkByItsInitiator(spdk, _)) => {
                Target::Spdk(spdk.start(case.served)?)
            }
            Self::Peer(Peer::Previous(previous)) => Target::Previous(previous.start(case.served)?),
        })
    }

    /// A light host of what was started.
    pub(super) fn host(&self, target: &Target, case: &Case) -> Result<LightHost> {
        let (Case { work, connections, depth, .. }, address) = (case, target.address());
        let space = match (self, &case.file) {
            (Self::Peer(Peer::Unpinned), Some(file)) => file.space_on_disk(),
            _ => case.space()?,
        };
        let host = match target {
            Target::Bare(_) => LightHost::connect_bare(address, *work, *depth, &space),
            _ => LightHost::join(address, *work, *connections, *depth, &space),
        }?;
        // The kernel works for the loop device on these very processors: one of them must be free for it now and then. So it is with a
        // device in software.
        Ok(if case.has_helpers() { host.sleeping() } else { host })
    }
}

/// One that runs, and ends with this.
#[derive(Debug)]
pub(super) enum Target {
    /// fastice, in this program.
    Child(TargetProcess),
    /// The bare responder, in this program.
    Bare(TargetProcess),
    /// The same, for hosts that join.
    Front(TargetProcess),
    /// SPDK's.
    Spdk(SpdkProcess),
    /// fastice, as it was.
    Previous(PreviousProcess),
}

impl Target {
    /// Where it listens.
    pub(super) const fn address(&self) -> SocketAddr {
        match self {
            Self::Child(process) | Self::Bare(process) | Self::Front(process) => process.address,
            Self::Spdk(process) => process.daemon.address(),
            Self::Previous(process) => process.daemon.address(),
        }
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        match self {
            Self::Child(process) | Self::Bare(process) | Self::Front(process) => process.pid(),
            Self::Spdk(process) => process.daemon.pid(),
            Self::Previous(process) => process.daemon.pid(),
        }
    }

    /// The processor time of all its threads so far.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        cpu_time_of(&self.pid().to_string(), &[""])
    }

    /// Microseconds for which it was busy so far; `None` when it does not tell.
    pub(super) fn busy_us(&mut self) -> Result<Option<f64>> {
        match self {
            Self::Child(process) => process.busy_us().map(Some),
            Self::Bare(_) | Self::Front(_) => Ok(None),
            Self::Spdk(process) => process.busy_us().map(Some),
            Self::Previous(process) => process.busy_us(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::work::Work;
    use super::*;

    /// The places of the rows that a responder without work has for this.
    fn places(case: &Case) -> Vec<String> {
        let perf = Perf { program: "/nowhere".into() };
        let mut peers = vec![Peer::Bare, Peer::Front(None, Together::One)];
        peers.extend([Together::One, Together::All].map(|how| Peer::Front(Some(perf.clone()), how)));
        let can = peers.into_iter().filter(|peer| peer.can(case));
        can.map(|peer| {
            assert!(peer.bars(case).rate.is_none(), "{peer:?}");
            format!("{}{}", case.name(), peer.place())
        })
        .collect()
    }

    #[test]
    fn one_responder_is_beside_each_case_by_either_host_and_many_connections_have_no_bar_there() {
        let reads = Work::small(Kind::Read);
        for (case, load) in [
            (Case::new(Served::Null, reads, 64, 4), "randread/64x4"),
            (Case::new(Served::Null, reads, 256, 4), "randread/256x4"),
            (Case::new(Served::Null, Work::small(Kind::Mixed), 1, 32), "randrw/qd32"),
        ] {
            let name = format!("target/null/{load}");
            let together = Some(format!("{name}/spdk-perf/bare-together")).filter(|_| case.connections == 1);
            let expected = [Some(name.clone()), Some(format!("{name}/spdk-perf/bare")), together];
            assert_eq!(places(&case), expected.into_iter().flatten().collect::<Vec<_>>());
        }
        assert!(places(&Case::new(Served::Memory, reads, 1, 32)).is_empty());
    }
}
