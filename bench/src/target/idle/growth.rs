//! How soon a target serves, what it has in memory, and how its costs grow.
//!
//! | row | what |
//! |---|---|
//! | `scale/start/first-io` | from the start of the process to the first read that is answered, with a host that keeps trying |
//! | `scale/memory/resident`, `buffers` | of a target without hosts: all that is resident but the buffers of its core, and those |
//! | `scale/connection/memory`, `memory-after-load` | what a connection adds that has served one round of reads, and many writes |
//! | `scale/connection/kernel-memory` | what the kernel has for it on this side |
//! | `scale/connections/served`, `scale/namespaces/readable` | how many of 1,000 |
//! | `growth/connections/N/cpu`, `memory`, `idle-cpu` | a command and a target with N connections, busy or not |
//! | `growth/namespaces/N/cpu`, `memory`, `start` | the same with N namespaces |
//! | `growth/extents/N/lookup`, `memory` | a lookup in a map of N extents, and the map |
//! | `growth/cores/N/cpu`, `memory` | a command and a target with N cores |
//!
//! What lies beyond this machine is told by the report, which fits a line to these points.

use std::iter;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::super::light::LightHost;
use super::super::round::WARM_UP;
use super::super::work::{Kind, Work};
use super::super::{LEN, Space};
use super::memory::kernel_kib;
use super::process::{IdleTarget, Poll, Wanted};
use super::{KEEP_ALIVE, Plan, SETTLE, idle_round, serve_all};
use crate::report::{Bar, Row};
use crate::scale::lookup;

const START_MAX_MS: f64 = 200.0;
const RESIDENT_MAX_MIB: f64 = 32.0;
const CONNECTION_MAX_KIB: f64 = 64.0;
/// What must be had at once, of connections and of namespaces.
const MANY: usize = 1000;
/// For a target to answer for the first time.
const START_PATIENCE: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_micros(200);
/// After much work, until a connection is idle.
const LEFT_ALONE: Duration = Duration::from_secs(5);
/// Hosts with an admin and 24 I/O queues: 25 connections each.
const QUEUES_EACH: u16 = 24;
/// Commands in flight on each connection: of few on each of many, and of many on one.
const FEW: u16 = 4;
const DEEP: u16 = 32;
const KIB: f64 = 1024.0;

impl Plan {
    /// A round as often as is wanted, as long as nobody has the run end.
    fn repeat<T>(&self, mut round: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
        let one = || {
            self.ending.look()?;
            round()
        };
        iter::repeat_with(one).take(self.rounds).collect()
    }

    /// All rows of this module.
    ///
    /// # Errors
    /// When something does not work that should.
    pub fn growth(&self, rows: &mut Vec<Row>) -> Result<()> {
        ensure!(self.rounds > 0, "there must be rounds");
        self.parts(
            rows,
            &[
                ("scale/start", Self::start),
                ("scale/memory", Self::memory),
                ("scale/connections", Self::connections),
                ("growth/connections/busy", Self::busy),
                ("growth/connections/idle", Self::idle),
                ("growth/namespaces", Self::namespaces),
                ("growth/extents", Self::extents),
                ("growth/cores", Self::cores),
            ],
        )
    }

    fn start(&self, rows: &mut Vec<Row>) -> Result<()> {
        let ours = self.repeat(|| first_io_ms(1))?;
        let method = "from before the fork to the first 4 KiB read answered: a host that tries to connect every 0.2 ms, and then \
                      joins by the book; null device, one core, 64 MiB of buffers";
        let bar = Some(Bar::OursAtMost(START_MAX_MS));
        self.number(rows, "scale/start/first-io", "ms", &ours, bar, method)
    }

    fn memory(&self, rows: &mut Vec<Row>) -> Result<()> {
        let resident = self.repeat(|| IdleTarget::start(Wanted::plain(Poll::Adaptive))?.resident())?;
        let beside: Vec<_> = resident.iter().map(|resident| resident.beside_buffers_kib() / KIB).collect();
        let method = "Rss of smaps_rollup less what is locked; one core, a null device, no host yet; text of the program included";
        let bar = Some(Bar::OursAtMost(RESIDENT_MAX_MIB));
        self.number(rows, "scale/memory/resident", "MiB", &beside, bar, method)?;
        let buffers: Vec<_> = resident.iter().map(|resident| resident.locked_kib as f64 / KIB).collect();
        let method = "Locked of smaps_rollup: the buffers of the one core, as configured (buffer_memory); 0 where they are huge \
                      pages, which are resident nowhere";
        self.number(rows, "scale/memory/buffers", "MiB", &buffers, None, method)
    }

    /// Memory of connections that do nothing, before and after they had much to do.
    fn connections(&self, rows: &mut Vec<Row>) -> Result<()> {
        let (mut fresh, mut after, mut kernel, mut served) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            self.ending.look()?;
            let grown = self.grown(Kind::Read)?;
            fresh.push(grown.target_kib);
            kernel.push(grown.kernel_kib);
            served.push(grown.served as f64);
            after.push(self.grown(Kind::Write)?.target_kib);
        }
        let method = "growth of Rss less buffers from 100 to 1,000 connections, of which 960 are I/O queues of 32 entries, each of \
                      which has served reads; divided by 900";
        let bar = Some(Bar::OursAtMost(CONNECTION_MAX_KIB));
        self.number(rows, "scale/connection/memory", "KiB", &fresh, bar, method)?;
        let method = "the same after a load of 4 KiB writes in capsules, 32 at a time on each, and then 5 s of nothing";
        self.number(rows, "scale/connection/memory-after-load", "KiB", &after, bar, method)?;
        let method = "growth of Slab and of TCP's pages of the whole machine from 100 to 1,000 connections, divided by 900 and by \
                      two, for both ends are on it";
        self.number(rows, "scale/connection/kernel-memory", "KiB", &kernel, None, method)?;
        let method =
            "connections open at once on one core whose commands were answered, admin queues included";
        let bar = Some(Bar::OursAtLeast(MANY as f64));
        self.number(rows, "scale/connections/served", "connections", &served, bar, method)?;
        Ok(())
    }

    fn busy(&self, rows: &mut Vec<Row>) -> Result<()> {
        [1, 4, 16, 64, 256, 960].into_iter().try_for_each(|count| self.busy_connections(rows, count))
    }

    fn idle(&self, rows: &mut Vec<Row>) -> Result<()> {
        for count in [25, 100, 300, MANY] {
            let target = IdleTarget::start(Wanted::plain(Poll::Adaptive))?;
            let mut hosts = idle_hosts(&target, count, Kind::Read, KEEP_ALIVE)?;
            std::thread::sleep(SETTLE.min(self.idle));
            let round = || {
                Ok(idle_round(&target, &mut hosts, count / usize::from(QUEUES_EACH + 1), self.idle)?
                    .cpu_percent)
            };
            let cpu = self.repeat(round)?;
            let method = "as idle/100-connections/cpu, with hosts of 24 I/O queues";
            self.number(
                rows,
                &format!("growth/connections/{count}/idle-cpu"),
                "% of a core",
                &cpu,
                None,
                method,
            )?;
        }
        Ok(())
    }

    /// What the connections beyond a tenth of them add. Those that write are busy before.
    fn grown(&self, kind: Kind) -> Result<Grown> {
        let few = MANY / 10;
        let added = (MANY - few) as f64;
        let target = IdleTarget::start(Wanted::plain(Poll::Adaptive))?;
        let mut first = idle_hosts(&target, few, kind, Duration::ZERO)?;
        self.exert(&mut first, kind)?;
        let (had, kernel_had) = (target.resident()?.beside_buffers_kib(), kernel_kib()?);
        let mut others = idle_hosts(&target, MANY - few, kind, Duration::ZERO)?;
        self.exert(&mut others, kind)?;
        let target_kib = (target.resident()?.beside_buffers_kib() - had) / added;
        // Both ends are here, and alike.
        let kernel_kib = (kernel_kib()? - kernel_had) / added / 2.0;
        let queues = first.measure(self.time)?.served + others.measure(self.time)?.served;
        Ok(Grown { target_kib, kernel_kib, served: queues + MANY / usize::from(QUEUES_EACH + 1) })
    }

    fn exert(&self, hosts: &mut LightHost, kind: Kind) -> Result<()> {
        if kind == Kind::Write {
            hosts.measure(self.time)?;
        }
        std::thread::sleep(LEFT_ALONE.min(self.idle));
        Ok(())
    }

    fn busy_connections(&self, rows: &mut Vec<Row>, count: u16) -> Result<()> {
        let (mut cpu, mut memory) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            self.ending.look()?;
            let mut target = IdleTarget::start(Wanted::plain(Poll::Adaptive))?;
            let mut host =
                LightHost::join(target.address, Work::small(Kind::Read), count, FEW, &Space::whole(LEN))?;
            cpu.push(self.cpu_us(&mut target, &mut host)?);
            memory.push(target.resident()?.beside_buffers_kib() / KIB);
        }
        let name = |what| format!("growth/connections/{count}/{what}");
        let method =
            "4 KiB reads, 4 in flight on each I/O connection; processor time without what was polled in vain";
        self.number(rows, &name("cpu"), "us a command", &cpu, None, method)?;
        self.number(rows, &name("memory"), "MiB", &memory, None, "Rss less buffers, while it is busy")
    }

    fn namespaces(&self, rows: &mut Vec<Row>) -> Result<()> {
        for count in [1, 10, 100, MANY] {
            let (mut cpu, mut memory, mut readable) = (Vec::new(), Vec::new(), Vec::new());
            let namespaces = u32::try_from(count)?;
            for _ in 0..self.rounds {
                self.ending.look()?;
                let wanted = Wanted { namespaces, ..Wanted::plain(Poll::Adaptive) };
                let mut target = IdleTarget::start(wanted)?;
                // 32 connections of depth 32: a command for each namespace.
                let mut host =
                    LightHost::join(target.address, Work::small(Kind::Read), DEEP, DEEP, &Space::whole(LEN))?;
                host.spread_over(namespaces)?;
                let run = host.measure(Duration::ZERO)?;
                // Each command was answered well, or it had been an error.
                readable.push((run.count as f64).min(count as f64));
                cpu.push(self.cpu_us(&mut target, &mut host)?);
                memory.push(target.resident()?.beside_buffers_kib() / KIB);
            }
            let start = self.repeat(|| first_io_ms(namespaces))?;
            let name = |what| format!("growth/namespaces/{count}/{what}");
            let method = "4 KiB reads, 32 in flight on each of 32 connections, each command for the next namespace; processor time \
                          without what was polled in vain";
            self.number(rows, &name("cpu"), "us a command", &cpu, None, method)?;
            self.number(rows, &name("memory"), "MiB", &memory, None, "Rss less buffers, while it is busy")?;
            self.number(rows, &name("start"), "ms", &start, None, "as scale/start/first-io")?;
            if count == MANY {
                let method =
                    "null devices of one subsystem on one target; a 4 KiB read of each was answered well";
                let bar = Some(Bar::OursAtLeast(MANY as f64));
                self.number(rows, "scale/namespaces/readable", "namespaces", &readable, bar, method)?;
            }
        }
        Ok(())
    }

    fn extents(&self, rows: &mut Vec<Row>) -> Result<()> {
        let mut data = vec![0; 64 * lookup::TURN_BYTES];
        for count in iter::successors(Some(1), |count| Some(count * 10)).take(7) {
            let (map, _) = lookup::maps(count)?;
            let ns = self.repeat(|| lookup::in_turns(&map, &mut data))?;
            let name = |what| format!("growth/extents/{count}/{what}");
            self.number(rows, &name("lookup"), "ns", &ns, None, "as scale/lookup/N-extents/turn")?;
            let kib = [map.resident_len().get() as f64 / KIB];
            self.number(
                rows,
                &name("memory"),
                "KiB",
                &kib,
                None,
                "the sealed map and where lookups begin in it",
            )?;
        }
        Ok(())
    }

    fn cores(&self, rows: &mut Vec<Row>) -> Result<()> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        for cores in (1..=2).filter(|cores| *cores <= processors) {
            let (mut cpu, mut memory) = (Vec::new(), Vec::new());
            for _ in 0..self.rounds {
                self.ending.look()?;
                let mut target = IdleTarget::start(Wanted { cores, ..Wanted::plain(Poll::Adaptive) })?;
                let mut host =
                    LightHost::join(target.address, Work::small(Kind::Read), 16, FEW, &Space::whole(LEN))?;
                cpu.push(self.cpu_us(&mut target, &mut host)?);
                memory.push(target.resident()?.beside_buffers_kib() / KIB);
            }
            let name = |what| format!("growth/cores/{cores}/{what}");
            let method = "4 KiB reads, 4 in flight on each of 16 connections; the second core shares its processor with the host; \
                          processor time without what was polled in vain";
            self.number(rows, &name("cpu"), "us a command", &cpu, None, method)?;
            self.number(rows, &name("memory"), "MiB", &memory, None, "Rss less buffers, while it is busy")?;
        }
        Ok(())
    }

    /// Microseconds of the target's processor time a command, after a warming up.
    fn cpu_us(&self, target: &mut IdleTarget, host: &mut LightHost) -> Result<f64> {
        host.measure(WARM_UP.min(self.time))?;
        let before = target.used()?;
        let run = host.measure(self.time)?;
        Ok(target.used()?.us_a_command(&before, run.count))
    }
}

/// What one more connection has, in KiB, and how many were served in the end.
struct Grown {
    target_kib: f64,
    kernel_kib: f64,
    served: usize,
}

/// So many connections that have served some commands each, in hosts of 25.
fn idle_hosts(
    target: &IdleTarget,
    connections: usize,
    kind: Kind,
    keep_alive: Duration,
) -> Result<LightHost> {
    let each = usize::from(QUEUES_EACH) + 1;
    let hosts = vec![QUEUES_EACH; connections / each];
    let mut host =
        LightHost::join_as(target.address, Work::small(kind), &hosts, DEEP, &Space::whole(LEN), keep_alive)?;
    host.await_events()?;
    serve_all(&mut host, hosts.len() * usize::from(QUEUES_EACH))?;
    Ok(host)
}

/// Milliseconds from the start of a process to the first answer.
fn first_io_ms(namespaces: u32) -> Result<f64> {
    // One that nobody listens at, at this moment.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let begun = Instant::now();
    let mut target = IdleTarget::spawn(Wanted { namespaces, port, ..Wanted::plain(Poll::Adaptive) })?;
    let mut host = loop {
        match LightHost::join_as(
            target.address,
            Work::small(Kind::Read),
            &[1],
            1,
            &Space::whole(LEN),
            KEEP_ALIVE,
        ) {
            Ok(host) => break host,
            Err(error) => ensure!(begun.elapsed() < START_PATIENCE, "no answer: {error:#}"),
        }
        std::thread::sleep(RETRY);
    };
    host.measure_paced(iter::once(Duration::ZERO))?;
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    target.await_listening()?;
    Ok(ms)
}
