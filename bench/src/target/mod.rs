//! The whole target over TCP on loopback, beside each peer that there is.
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `target/DEVICE/WORK/qdN/iops` | commands a second of one connection | the bare responder: the ceiling of the kernel's TCP |
//! | `.../spdk-perf/bare/iops`, `bare-together` | the same by SPDK's initiator | the same, for a host that joins ([`front`]) |
//! | `target/DEVICE/WORK/CxN/iops` | of C connections, each of depth N | the bare responder, for a host that joins |
//! | `.../p50`, `p99` | microseconds of a command | as above |
//! | `.../PEER/iops`, `p50`, `p99`, `cpu` | the same, and microseconds of the target's processor a command | that peer |
//! | `.../CxN/share` | the slowest connection's part of the mean | |
//! | `target/file-N-extents/...`, `map-N-extents/...` | a pinned file, or a map on the null device | the same blocks without a pin |
//! | `target/curve/...` | rate and latency at many depths, within one short time ([`curve`]) | bare responder, SPDK's target |
//! | `target/cost/...` | where the time of the target's core goes ([`cost`]) | SPDK's target |
//! | `idle/...`, `growth/...` | of a target that sleeps, and as it grows ([`idle`]) | |
//! | `target/round-trip` | nanoseconds of a cache line between the two processors | |
//!
//! Targets have the first processor, the host the last. The host is a light one: see [`light`]; in rows of `spdk-perf` it is
//! SPDK's. Sides take turns, each with a process and connections of its own every round.

pub mod bare;
pub mod calm;
mod cases;
pub mod cost;
mod curve;
mod daemon;
mod file;
mod front;
pub mod idle;
pub(crate) mod inbound;
pub(crate) mod join;
pub mod light;
mod neighbours;
mod peers;
mod perf;
mod places;
mod previous;
mod process;
mod profile;
mod round;
mod round_trip;
mod sealed;
mod slices;
mod spdk;
mod speed;
mod whole;
pub mod work;

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::ending::Ending;
use crate::report::{Bar, Measurement, Row};
use crate::server::both_ends;
use crate::spread::Spread;
use calm::Calm;
pub(crate) use cases::OF_BARE_MIN;
use cases::{Bars, Case};
use file::Ground;
pub use peers::PeerKind;
use peers::{Peer, Side};
pub use places::Space;
pub(crate) use process::TargetProcess;
pub use process::{Served, serve};
use round::Round;
pub use round_trip::round_trip_ns;

pub(crate) const NQN: &str = "nqn.2026-11.io.fastice:bench";
/// The host of most rows.
const LIGHT_HOST: &str = "a light host, polling,";
/// That of rows whose device needs a processor too.
const SLEEPING_HOST: &str = "a light host that sleeps while it waits";
/// Of the namespaces, in bytes.
const LEN: u64 = 256 << 20;
/// A target's core that had work for less of the time waited for its host.
const BUSY_MIN: f64 = 0.9;

/// How long, how deep, how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Queue depths.
    pub depths: Vec<u16>,
    /// Only cases whose name holds this.
    pub only: Option<String>,
    /// Only these peers; all where it is none.
    pub peers: Option<Vec<PeerKind>>,
    /// Rounds of each side.
    pub rounds: usize,
    /// How long a round is busy.
    pub time: Duration,
    /// How much longer all may take together when the machine is not calm.
    pub spare: Duration,
    /// See [`Row::machine`].
    pub machine: String,
    /// Told of each row.
    pub tell: fn(&str),
    /// Asked before each round.
    pub ending: Ending,
}

impl Plan {
    fn row(&self, rows: &mut Vec<Row>, measured: &Measurement<'_>) -> Result<()> {
        self.row_of_window(rows, measured, None)
    }

    fn row_of_window(
        &self,
        rows: &mut Vec<Row>,
        measured: &Measurement<'_>,
        window: Option<&str>,
    ) -> Result<()> {
        let row = Row::new(measured, &self.machine);
        let mut row = row.with_context(|| format!("{} was not measured", measured.name))?;
        row.window = window.map(str::to_owned);
        (self.tell)(&row.to_string());
        rows.push(row);
        Ok(())
    }

    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|part| name.contains(part.as_str()))
    }

    /// All of it. Peers that are not here are named in `absent`.
    ///
    /// # Errors
    /// When something does not work that should.
    pub fn run(&self, rows: &mut Vec<Row>, absent: &mut Vec<String>) -> Result<()> {
        ensure!(
            self.rounds > 0 && self.depths.iter().all(|depth| *depth > 0),
            "there must be rounds and depths"
        );
        let mut peers = peers::found(absent);
        if let Some(wanted) = &self.peers {
            peers.retain(|peer| wanted.contains(&peer.kind()));
        }
        let ground = self.ground(absent);
        absent.iter().for_each(|absent| (self.tell)(&format!("ABSENT: {absent}")));
        let mut calm = Calm::new(self.spare, self.ending.clone());
        let files = ground.as_ref().map_or(&[][..], |ground| &ground.files);
        let is_wanted = |case: &Case| match case.is_for_practice() {
            true => self.only.as_ref().is_some_and(|part| part.contains("model")) && self.wants(&case.name()),
            false => self.wants(&case.name()),
        };
        for case in cases::all(&self.depths, files).into_iter().filter(is_wanted) {
            let (mut share, mut is_alone) = (Vec::new(), self.peers.is_none());
            for peer in peers.iter().filter(|peer| peer.can(&case)) {
                is_alone = false;
                share.extend(self.pair(rows, &case, peer, &mut calm)?);
            }
            if is_alone {
                share = self.alone(rows, &case, &mut calm)?;
            }
            // SPDK's initiator does not tell of single ones, and may be the only one that is wanted.
            if case.connections > 1 && (self.peers.is_none() || !share.is_empty()) {
                self.share(rows, &case, &share)?;
            }
        }
        drop(ground);
        curve::rows(self, rows, &peers, &mut calm)?;
        cost::rows(self, rows, &peers, &mut calm)?;
        ensure!(!calm.trips_ns.is_empty(), "no case has a name like that{}", known(&self.depths));
        let method = "a cache line from one processor to the other and back, before and after every round";
        let name = "target/round-trip".to_owned();
        self.row(rows, &Measurement { name, unit: "ns", ours: &calm.trips_ns, peer: None, bar: None, method })
    }

    /// Files to serve pinned, where they are asked for and can be made.
    fn ground(&self, absent: &mut Vec<String>) -> Option<Ground> {
        let names = ["1-extent", "10000-extents"].map(|file| format!("target/file-{file}/randread/qd"));
        if !names.iter().any(|name| self.wants(&format!("{name}1")) || self.wants(&format!("{name}32"))) {
            return None;
        }
        let why = match Ground::make() {
            Ok(ground) => return Some(ground),
            Err(why) => format!("{why:#}"),
        };
        skipped("pinned files", &why);
        absent.push(format!("pinned files: {why}"));
        None
    }

    /// Ours beside one peer; gives our rounds' shares of the slowest connection, where the host tells them.
    fn pair(&self, rows: &mut Vec<Row>, case: &Case, peer: &Peer, calm: &mut Calm) -> Result<Vec<f64>> {
        let collected = calm.collect(peer.rounds(case, self.rounds), |number, looks| {
            if case.is_map() {
                let (ours, theirs) = slices::round(case, self.time)?;
                return Ok(((ours, theirs), attention(case, &[ours, theirs])));
            }
            let one = |side: Side<'_>| round::round(case, &side, peer.initiator(), self.time);
            let (ours, theirs) = if number % 2 == 1 {
                let ours = one(Side::Ours)?;
                looks.take()?;
                (ours, one(Side::Peer(peer))?)
            } else {
                let theirs = one(Side::Peer(peer))?;
                looks.take()?;
                (one(Side::Ours)?, theirs)
            };
            Ok(((ours, theirs), attention(case, &[ours, theirs])))
        })?;
        let (best, what) = collected.best();
        let (ours, theirs): (Vec<_>, Vec<_>) = best.into_iter().unzip();
        let method = self.method(peer, case, &what, (&ours, &theirs))?;
        let place = format!("{}{}", case.name(), peer.place());
        self.numbers(rows, (&place, &method), case, (peer, peer.bars(case)), (&ours, &theirs))?;
        Ok(ours.iter().filter_map(|round| round.least_share).collect())
    }

    /// How it was measured: what was where, how often, and who was waited for.
    fn method(
        &self,
        peer: &Peer,
        case: &Case,
        what: &str,
        (ours, theirs): (&[Round], &[Round]),
    ) -> Result<String> {
        let (host, mut time) = match peer.initiator() {
            Some(_) => (perf::NAME, perf::Perf::time(self.time)),
            None if case.has_helpers() => (SLEEPING_HOST, self.time),
            None => (LIGHT_HOST, self.time),
        };
        time = time.max(Duration::from_millis(1));
        let mut method = format!("{}; {} ms a round; {what}", placing(host)?, time.as_millis());
        if peer.initiator().is_some() && case.connections > 1 {
            method += "; commands go to the connections in turn, so that each has its depth on average";
        }
        let busy = [ours, theirs].map(|rounds| {
            let shares: Vec<_> = rounds.iter().filter_map(Round::busy_share).collect();
            Spread::of(&shares).map(|spread| spread.median.min(1.0))
        });
        if let [Some(ours), Some(theirs)] = busy {
            method += &format!(
                "; the target's core had work for {:.0} % of the time, the peer's for {:.0} %",
                ours * 100.0,
                theirs * 100.0
            );
            method += waited_for(case, ours);
        }
        if case.is_map() {
            method += slices::METHOD;
        }
        if let Some(file) = &case.file {
            method += &format!(
                "; {} extents, XFS on a loop device in memory by io_uring, whose threads need a processor too; the peer serves that device \
                 and is asked for the file's blocks",
                file.extents
            );
        }
        Ok(method)
    }

    /// Ours, where no peer that is here can do the same.
    fn alone(&self, rows: &mut Vec<Row>, case: &Case, calm: &mut Calm) -> Result<Vec<f64>> {
        let collected = calm.collect(self.rounds, |_, _| {
            let round = round::round(case, &Side::Ours, None, self.time)?;
            Ok((round, attention(case, &[round])))
        })?;
        let (rounds, what) = collected.best();
        let (name, unit) = (format!("{}/iops", case.name()), "IOPS");
        let ours: Vec<_> = rounds.iter().map(|round| round.iops).collect();
        let host = if case.has_helpers() { SLEEPING_HOST } else { LIGHT_HOST };
        let method = format!("{}; {what}", placing(host)?);
        self.row(rows, &Measurement { name, unit, ours: &ours, peer: None, bar: None, method: &method })?;
        Ok(rounds.iter().filter_map(|round| round.least_share).collect())
    }

    fn numbers(
        &self,
        rows: &mut Vec<Row>,
        (place, method): (&str, &str),
        case: &Case,
        (peer, bars): (&Peer, Bars),
        (ours, theirs): (&[Round], &[Round]),
    ) -> Result<()> {
        type Number = fn(&Round) -> Option<f64>;
        const MIB: f64 = (1 << 20) as f64;
        let mut wanted: Vec<(&str, &str, Number, Option<Bar>)> =
            vec![("iops", "IOPS", |round| Some(round.iops), bars.rate)];
        wanted.push(("p50", "us", |round| Some(round.p50_us), bars.latency));
        wanted.push(("p99", "us", |round| Some(round.p99_us), bars.latency));
        wanted.push(("cpu", "us a command", |round| round.cpu_us, bars.cpu));
        for (label, unit, number, bar) in wanted {
            // Neighbours stay neighbours: of a pair both count, or none.
            let pairs =
                ours.iter().zip(theirs).filter_map(|(ours, theirs)| Some((number(ours)?, number(theirs)?)));
            let (mut ours, mut theirs): (Vec<_>, Vec<_>) = pairs.unzip();
            let mut unit = unit;
            if ours.is_empty() {
                continue;
            }
            let is_large = label == "iops" && case.work.len > 4096;
            if is_large {
                let scale = f64::from(case.work.len) / MIB;
                ours.iter_mut().chain(&mut theirs).for_each(|rate| *rate *= scale);
                unit = "MiB/s";
            }
            let label = if is_large { "rate" } else { label };
            let name = format!("{place}/{label}");
            let peer = Some((peer.name(), theirs.as_slice()));
            self.row(rows, &Measurement { name, unit, ours: &ours, peer, bar, method })?;
        }
        Ok(())
    }

    fn share(&self, rows: &mut Vec<Row>, case: &Case, share: &[f64]) -> Result<()> {
        let name = format!("{}/share", case.name());
        let method = "commands of the slowest connection, in parts of the mean of all";
        let bar = case.bar_of_share();
        self.row(rows, &Measurement { name, unit: "of the mean", ours: share, peer: None, bar, method })
    }
}

/// Names that there are, by these depths.
fn known(depths: &[u16]) -> String {
    let names: Vec<_> = cases::all(depths, &[]).iter().map(Case::name).collect();
    format!(", or no peer can do it. Beside files and curves there are: {}", names.join(", "))
}

/// Whether a whole run makes rows of this kind: what it does not make any more is of another time.
#[must_use]
pub fn is_made_here(name: &str) -> bool {
    // Also what is for practice only, and was measured by name: no whole run makes it.
    const KINDS: [&str; 7] = ["null/", "memory/", "model/", "file-", "map-", "curve/", "cost/"];
    name.strip_prefix("target/").is_some_and(|rest| KINDS.iter().any(|kind| rest.starts_with(kind)))
}

/// The least part of their processors that who polls had. Where the kernel works for the device, on these very processors, that is
/// no disturbance.
fn attention(case: &Case, rounds: &[Round]) -> f64 {
    if case.has_helpers() {
        return 1.0;
    }
    rounds.iter().map(|round| round.processor_share).fold(1.0, f64::min)
}

/// Says on standard error what is not measured.
fn skipped(what: &str, why: &str) {
    // Nobody who reads it is no reason to stop.
    let _ = writeln!(std::io::stderr().lock(), "SKIPPED: {what}: {why}");
}

/// What the rest of the time of our core was, where that is much.
fn waited_for(case: &Case, busy: f64) -> &'static str {
    if busy >= BUSY_MIN || case.depth == 1 || case.file.is_some() {
        return "";
    }
    // Longer commands are not gathered.
    if case.work.len > 4096 {
        return ": for the rest ours waited for its host";
    }
    ": for the rest ours waited for its host, or left its socket alone for up to 32 us so that commands gather (rows that end in \
     /ungathered tell what that costs); processor time a command decides"
}

/// Who was pinned where.
fn placing(host: &str) -> Result<String> {
    let (_, [first, last]) = both_ends()?;
    Ok(format!(
        "target on processor {first}, polling, and {host} on processor {last}; loopback; sides take turns"
    ))
}
