//! What a target costs that has little or nothing to do, what it loses by going to sleep, and how its costs grow.
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `idle/100-connections/cpu` | per cent of a core, with 100 connections open and keep-alives answered | |
//! | `idle/100-connections/keep-alives` | the part of the keep-alives that was answered | |
//! | `idle/light/p50`, `p99` | microseconds of a 4 KiB read, 100 a second | the same target, polling always |
//! | `idle/light/cpu` | per cent of a core meanwhile | as above |
//! | `idle/asleep/p50`, `p99`, `cpu` | the same with `linger_us = 0`: each command wakes the core | as above |
//! | `idle/light/bare/p50`, `p99` | the same read of a bare responder that sleeps in recv: what a sleep and a wake cost without a target | one that polls |
//! | `idle/full/iops` | 4 KiB reads a second at depth 32 | as above |
//!
//! [`growth`] has the rows of start, memory and growth. The target is as it is installed, but for its one core: the first
//! processor. The host has the last one, and spins wherever a latency is measured.

pub mod growth;
mod memory;
mod process;

use std::iter;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::calm::{Calm, Looks};
use super::light::{LightHost, Run};
use super::process::{Served, TargetProcess};
use super::round::{Round, WARM_UP};
use super::work::{Kind, Work};
use super::{LEN, Space};
use crate::clock::Stopwatch;
use crate::ending::Ending;
use crate::profiles::windows::{Begun, OURS};
use crate::report::{Bar, Measurement, Row};
use crate::threads::cpu_time_of;
use process::IdleTarget;
pub use process::{Poll, Wanted, serve};

/// Hosts as they come: an admin queue and four I/O queues, 100 connections in all.
const HOSTS: [u16; 20] = [4; 20];
const CONNECTIONS: usize = HOSTS.len() * 5;
/// Their keep alive timer, and how often they send a Keep Alive: Linux does at half of it.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const KEEP_ALIVE_EVERY: Duration = Duration::from_millis(2500);
const HOST_DEPTH: u16 = 32;
/// How long a host that was busy is left alone before it counts as idle.
const SETTLE: Duration = Duration::from_secs(2);
/// Most of a core, in per cent.
const IDLE_CPU_MAX: f64 = 0.5;
/// Between two commands of a light load on average. They come at random: in step with nothing, and with long pauses now and then.
const LIGHT_PAUSE: Duration = Duration::from_millis(10);
const LIGHT_RATIO_MAX: f64 = 1.5;
const FULL_DEPTH: u16 = 32;
const FULL_RATIO_MIN: f64 = 0.99;
/// Rounds of full load for one of the others: one per cent wants more of them.
const FULL_ROUNDS: usize = 3;
const PEER: &str = "the same target, polling always";
const BARE_PEER: &str = "the bare responder, polling";

/// One that makes some rows.
type Part = fn(&Plan, &mut Vec<Row>) -> Result<()>;

/// How long, how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Only parts whose name holds this.
    pub only: Option<String>,
    /// Rounds of each side.
    pub rounds: usize,
    /// How long a round of idling, and of light load.
    pub idle: Duration,
    /// How long a round of full load.
    pub time: Duration,
    /// How much longer pairs of rounds of one part may take when the machine is not calm.
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
        let row = Row::new(measured, &self.machine);
        let row = row.with_context(|| format!("{} was not measured", measured.name))?;
        (self.tell)(&row.to_string());
        rows.push(row);
        Ok(())
    }

    /// One number that stands for itself.
    fn number(
        &self,
        rows: &mut Vec<Row>,
        name: &str,
        unit: &str,
        ours: &[f64],
        bar: Option<Bar>,
        method: &str,
    ) -> Result<()> {
        self.row(rows, &Measurement { name: name.to_owned(), unit, ours, peer: None, bar, method })
    }

    /// All but what [`growth`] measures.
    ///
    /// # Errors
    /// When something does not work that should.
    pub fn run(&self, rows: &mut Vec<Row>) -> Result<()> {
        ensure!(self.rounds > 0, "there must be rounds");
        self.parts(
            rows,
            &[
                ("idle/connections", Self::nothing),
                ("idle/light", Self::light),
                ("idle/asleep", Self::asleep),
                ("idle/light/bare", Self::light_bare),
                ("idle/full", Self::full),
            ],
        )
    }

    /// Those parts that are wanted.
    fn parts(&self, rows: &mut Vec<Row>, parts: &[(&str, Part)]) -> Result<()> {
        let wanted = |name: &str| self.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
        let mut wanted = parts.iter().filter(|(name, _)| wanted(name)).peekable();
        ensure!(
            wanted.peek().is_some(),
            "no part has a name like that: {:?}",
            parts.iter().map(|part| part.0).collect::<Vec<_>>()
        );
        wanted.try_for_each(|(_, part)| {
            self.ending.look()?;
            part(self, rows)
        })
    }

    /// Connections, keep-alives, and nothing else.
    fn nothing(&self, rows: &mut Vec<Row>) -> Result<()> {
        let target = IdleTarget::start(Wanted::plain(Poll::Adaptive))?;
        let mut hosts = join(target.address, &HOSTS, HOST_DEPTH)?;
        hosts.await_events()?;
        serve_all(&mut hosts, CONNECTIONS - HOSTS.len())?;
        std::thread::sleep(SETTLE.min(self.idle));
        let (mut cpu, mut answered) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            self.ending.look()?;
            let round = idle_round(&target, &mut hosts, HOSTS.len(), self.idle)?;
            cpu.push(round.cpu_percent);
            answered.push(round.answered_part);
        }
        serve_all(&mut hosts, CONNECTIONS - HOSTS.len())?;
        let method = "20 hosts with an admin and 4 I/O queues each, KATO 5 s, a Keep Alive of each every 2.5 s, and an \
                      Asynchronous Event Request; each connection has served I/O before and does so after; processor time of all \
                      threads of the target, by schedstat";
        let name = |what| format!("idle/{CONNECTIONS}-connections/{what}");
        let bar = Some(Bar::OursAtMost(IDLE_CPU_MAX));
        self.number(rows, &name("cpu"), "% of a core", &cpu, bar, method)?;
        let method = "the target ends a controller that it has not heard of for KATO, and an answer that fails ends the bench";
        let bar = Some(Bar::OursAtLeast(1.0));
        self.number(rows, &name("keep-alives"), "of those sent", &answered, bar, method)
    }

    /// A hundred commands a second.
    fn light(&self, rows: &mut Vec<Row>) -> Result<()> {
        self.lightly(rows, "idle/light", Poll::Adaptive, Some(Bar::RatioAtMost(LIGHT_RATIO_MAX)))
    }

    /// The same, and each of them wakes the core.
    fn asleep(&self, rows: &mut Vec<Row>) -> Result<()> {
        self.lightly(rows, "idle/asleep", Poll::Asleep, None)
    }

    fn lightly(&self, rows: &mut Vec<Row>, place: &str, ours: Poll, bar: Option<Bar>) -> Result<()> {
        let of = |poll| if poll == Poll::Adaptive { ours } else { poll };
        let (best, what) = self.pairs(self.rounds, |poll| self.light_round(of(poll)))?;
        let method = format!(
            "4 KiB reads on one connection, one at a time, begun at random by a host that spins, 100 a second (exponential pauses); null device; {what}"
        );
        let place = (place, PEER);
        self.beside(rows, (place, "p50", "us"), &best, None, &method, |round| round.p50_us)?;
        self.beside(rows, (place, "p99", "us"), &best, bar, &method, |round| round.p99_us)?;
        self.beside(rows, (place, "cpu", "% of a core"), &best, None, &method, |round| {
            round.cpu_us.unwrap_or(f64::NAN)
        })
    }

    /// The same of the bare responder, asleep between commands or not: no target that sleeps can lose less.
    fn light_bare(&self, rows: &mut Vec<Row>) -> Result<()> {
        let (best, what) = self.pairs(self.rounds, |poll| self.light_bare_round(poll))?;
        let method =
            format!("as idle/light, of a bare responder that sleeps in recv and is no target; {what}");
        let place = ("idle/light/bare", BARE_PEER);
        self.beside(rows, (place, "p50", "us"), &best, None, &method, |round| round.p50_us)?;
        self.beside(rows, (place, "p99", "us"), &best, None, &method, |round| round.p99_us)
    }

    fn light_round(&self, poll: Poll) -> Result<Round> {
        let target = IdleTarget::start(Wanted::plain(poll))?;
        let host = join(target.address, &[1], 1)?;
        self.paced_round(host, &format!("{OURS}, {}", side_of(poll)), || target.processor_time())
    }

    fn light_bare_round(&self, poll: Poll) -> Result<Round> {
        let (served, side) = match poll {
            Poll::Adaptive | Poll::Asleep => (Served::BareSleeps, "the bare responder, asleep in recv"),
            Poll::Always => (Served::BareReads, BARE_PEER),
        };
        let target = TargetProcess::start(served, None)?;
        let host = LightHost::connect_bare(target.address, Work::small(Kind::Read), 1, &Space::whole(LEN))?;
        self.paced_round(host, side, || cpu_time_of(&target.pid().to_string(), &[""]))
    }

    /// Rounds have the part of a core, in per cent, in place of microseconds a command.
    fn paced_round(
        &self,
        mut host: LightHost,
        side: &str,
        processor_time: impl Fn() -> Result<Duration>,
    ) -> Result<Round> {
        host.measure_paced(pauses(WARM_UP.min(self.idle)))?;
        let begun = Begun::now();
        let (had, watch) = (processor_time()?, Stopwatch::start());
        let latencies_ns = host.measure_paced(pauses(self.idle))?;
        let (wall_ns, host_ns) = (watch.wall_ns(), watch.cpu_ns());
        let target_ns = processor_time()?.saturating_sub(had).as_nanos() as f64;
        let iops = latencies_ns.len() as f64 / wall_ns * 1e9;
        begun.end(side, iops, None)?;
        let us = |part| latencies_ns.value_at_quantile(part) as f64 / 1e3;
        Ok(Round {
            iops,
            p50_us: us(0.5),
            p99_us: us(0.99),
            cpu_us: Some(target_ns / wall_ns * 100.0),
            processor_share: host_ns / wall_ns,
            least_share: Some(1.0),
        })
    }

    /// As many commands as there can be.
    fn full(&self, rows: &mut Vec<Row>) -> Result<()> {
        let (best, what) = self.pairs(self.rounds * FULL_ROUNDS, |poll| self.full_round(poll))?;
        let method =
            format!("4 KiB reads on one connection, 32 in flight, by a host that spins; null device; {what}");
        let bar = Some(Bar::RatioAtLeast(FULL_RATIO_MIN));
        self.beside(rows, (("idle/full", PEER), "iops", "IOPS"), &best, bar, &method, |round| round.iops)
    }

    fn full_round(&self, poll: Poll) -> Result<Round> {
        let target = IdleTarget::start(Wanted::plain(poll))?;
        let mut host = join(target.address, &[1], FULL_DEPTH)?;
        host.measure(WARM_UP.min(self.time))?;
        let begun = Begun::now();
        let (had, watch) = (target.processor_time()?, Stopwatch::start());
        let run = host.measure(self.time)?;
        begun.end(&format!("{OURS}, {}", side_of(poll)), run.iops, None)?;
        let (wall_ns, host_ns) = (watch.wall_ns(), watch.cpu_ns());
        let target_ns = target.processor_time()?.saturating_sub(had).as_nanos() as f64;
        Ok(Round {
            iops: run.iops,
            p50_us: run.percentile_us(0.5),
            p99_us: run.percentile_us(0.99),
            cpu_us: None,
            processor_share: host_ns.min(target_ns) / wall_ns,
            least_share: Some(run.least_share),
        })
    }

    /// Pairs of rounds, that of the target as it is installed first in each, whichever ran first.
    fn pairs(
        &self,
        wanted: usize,
        round: impl Fn(Poll) -> Result<Round>,
    ) -> Result<(Vec<[Round; 2]>, String)> {
        let collected =
            Calm::new(self.spare, self.ending.clone()).collect(wanted, |number, looks: &mut Looks| {
                let mut order = [Poll::Adaptive, Poll::Always];
                if number % 2 == 1 {
                    order.reverse();
                }
                let first = round(order[0])?;
                looks.take()?;
                let mut pair = [first, round(order[1])?];
                if number % 2 == 1 {
                    pair.reverse();
                }
                let share = pair.iter().map(|round| round.processor_share).fold(1.0, f64::min);
                Ok((pair, share))
            })?;
        Ok(collected.best())
    }

    fn beside(
        &self,
        rows: &mut Vec<Row>,
        ((place, peer), label, unit): ((&str, &str), &str, &str),
        pairs: &[[Round; 2]],
        bar: Option<Bar>,
        method: &str,
        number: fn(&Round) -> f64,
    ) -> Result<()> {
        let [ours, theirs]: [Vec<f64>; 2] =
            [0, 1].map(|side| pairs.iter().map(|pair| number(&pair[side])).collect());
        let (name, peer) = (format!("{place}/{label}"), Some((peer, theirs.as_slice())));
        self.row(rows, &Measurement { name, unit, ours: &ours, peer, bar, method })
    }
}

/// What profiles call it.
const fn side_of(poll: Poll) -> &'static str {
    match poll {
        Poll::Adaptive => "as installed",
        Poll::Asleep => "asleep between commands",
        Poll::Always => "always polling",
    }
}

/// Reads of 4 KiB, on as many hosts and connections.
fn join(address: SocketAddr, hosts: &[u16], depth: u16) -> Result<LightHost> {
    LightHost::join_as(address, Work::small(Kind::Read), hosts, depth, &Space::whole(LEN), KEEP_ALIVE)
}

/// Has every connection answer some commands.
fn serve_all(hosts: &mut LightHost, connections: usize) -> Result<Run> {
    let run = hosts.measure(Duration::ZERO)?;
    ensure!(run.served == connections, "{} of {connections} connections are served", run.served);
    Ok(run)
}

/// What a while without load cost.
struct IdleRound {
    cpu_percent: f64,
    answered_part: f64,
}

/// Leaves the target alone but for keep-alives, which the hosts send one after the other.
fn idle_round(target: &IdleTarget, hosts: &mut LightHost, count: usize, time: Duration) -> Result<IdleRound> {
    let (begun, had) = (Instant::now(), target.processor_time()?);
    let pause = KEEP_ALIVE_EVERY / u32::try_from(count)?;
    let (mut sent, mut answered) = (0u32, 0u32);
    for host in (0..count).cycle() {
        let due = pause * (sent + 1);
        if due >= time && sent > 0 {
            break;
        }
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
        sent += 1;
        hosts.keep_alive(host).with_context(|| format!("the keep-alive of host {host}"))?;
        answered += 1;
    }
    std::thread::sleep(time.saturating_sub(begun.elapsed()));
    let wall = begun.elapsed().as_secs_f64();
    let took = target.processor_time()?.saturating_sub(had).as_secs_f64();
    Ok(IdleRound { cpu_percent: took / wall * 100.0, answered_part: f64::from(answered) / f64::from(sent) })
}

/// Pauses of a light load, for so long, at least one.
fn pauses(time: Duration) -> impl Iterator<Item = Duration> {
    let count = (time.as_nanos() / LIGHT_PAUSE.as_nanos()).max(1);
    let mut word = 0x2545_F491_4F6C_DD1Du64;
    iter::repeat_with(move || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        let part = (word >> 11) as f64 / (1u64 << 53) as f64;
        // Below 1, so that its logarithm is a number.
        LIGHT_PAUSE.mul_f64(-(1.0 - part).ln())
    })
    .take(usize::try_from(count).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_light_load_is_a_hundred_commands_a_second_in_no_step() {
        let all: Vec<_> = pauses(Duration::from_secs(10)).collect();
        assert_eq!(all.len(), 1000);
        let sum: Duration = all.iter().sum();
        assert!(sum.abs_diff(Duration::from_secs(10)) < Duration::from_secs(1), "{sum:?}");
        // Of a thousand some 135 are longer than twice the mean, and some 100 shorter than a tenth of it.
        let longer = all.iter().filter(|pause| **pause > 2 * LIGHT_PAUSE).count();
        let shorter = all.iter().filter(|pause| **pause < LIGHT_PAUSE / 10).count();
        assert!((90..180).contains(&longer) && (60..140).contains(&shorter), "{longer} {shorter}");
        assert!(all.windows(2).filter(|pair| pair[0] == pair[1]).count() < 10);
        assert_eq!(pauses(Duration::ZERO).count(), 1);
    }

    #[test]
    fn parts_are_run_by_name_and_a_name_of_none_is_refused() {
        let plan = |only: Option<&str>| Plan {
            only: only.map(str::to_owned),
            rounds: 1,
            idle: Duration::ZERO,
            time: Duration::ZERO,
            spare: Duration::ZERO,
            machine: "here".to_owned(),
            tell: |_| {},
            ending: Ending::default(),
        };
        let made = |only| {
            let mut rows = Vec::new();
            let one: Part = |plan, rows| plan.number(rows, "one", "ms", &[1.0], None, "made up");
            let two: Part = |plan, rows| plan.number(rows, "two", "ms", &[1.0], None, "made up");
            plan(only).parts(&mut rows, &[("a/one", one), ("a/two", two)])?;
            Ok::<_, anyhow::Error>(rows.into_iter().map(|row| row.name).collect::<Vec<_>>())
        };
        assert_eq!(made(None).unwrap(), ["one", "two"]);
        assert_eq!(made(Some("two")).unwrap(), ["two"]);
        assert!(made(Some("three")).is_err());
    }

    #[test]
    fn hosts_are_as_many_connections_as_rows_say() {
        assert_eq!(HOSTS.iter().map(|queues| usize::from(*queues) + 1).sum::<usize>(), 100);
        assert_eq!(CONNECTIONS, 100);
    }
}
