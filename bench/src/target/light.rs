//! A host that does next to nothing, so that the target is what is measured: commands are made before, responses are counted.
//!
//! ```text
//!   depth capsules a connection out | whole responses in, each with its CID | as many capsules out again
//! ```
//!
//! Each command gets a random place as it is sent. Data that comes is passed over, data that goes is always the same; of digests only
//! those that are sent are right. One thread does it for all connections, by epoll when there are several, or when it sleeps. Against
//! the [bare responder](super::bare) nobody joins.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::inbound::{Event, Inbound};
use super::join::{Association, PATIENCE, QUEUES_MAX, join_alive};
use super::places::{Places, Space};
use super::work::{Asked, BLOCK_LEN, Work};

/// What is read at a time.
const PIECE_LEN: usize = 1 << 20;
/// Longer ones count as so long.
const LATENCY_MAX_NS: u64 = 20_000_000_000;
/// The longest sleep of a host that sleeps.
const NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// Where a capsule has the namespace identifier: dword 1 of the command, behind the common header.
const NSID_AT: usize = 8 + 4;
/// Connections that are looked at after one look at epoll.
const EVENTS_MAX: usize = 256;

/// What a run gave.
#[derive(Clone, Debug)]
pub struct Run {
    /// Commands, of all connections.
    pub count: u64,
    /// How long it took until the last was answered.
    pub time: Duration,
    /// Commands a second.
    pub iops: f64,
    /// How long commands took, in nanoseconds.
    pub latencies_ns: Histogram<u64>,
    /// The connection with the fewest commands: its part of the mean.
    pub least_share: f64,
    /// Connections whose commands were answered.
    pub served: usize,
}

impl Run {
    /// Of no commands yet.
    ///
    /// # Errors
    /// None that is known of.
    pub(super) fn no_latencies() -> Result<Histogram<u64>> {
        Ok(Histogram::new_with_max(LATENCY_MAX_NS, 3)?)
    }

    /// The latency that this part of the commands does not exceed, in microseconds.
    pub fn percentile_us(&self, part: f64) -> f64 {
        self.latencies_ns.value_at_quantile(part) as f64 / 1e3
    }
}

/// One connection with commands in flight.
struct Queue {
    stream: TcpStream,
    /// Most data of one H2CData.
    h2c_data_max: u32,
    places: Places,
    /// One a CID.
    capsules: Vec<Vec<u8>>,
    sent_at: Vec<Instant>,
    inbound: Inbound,
    out: Vec<u8>,
    count: u64,
    in_flight: usize,
}

/// A host with its connections.
pub struct LightHost {
    queues: Vec<Queue>,
    associations: Vec<Association>,
    work: Work,
    space: Vec<u8>,
    /// How long it sleeps at most while nothing comes; not at all where it is none.
    naps: Option<Timespec>,
}

impl LightHost {
    /// Joins a subsystem with so many connections, each of this depth.
    ///
    /// # Errors
    /// When the target does not let it.
    pub fn join(
        address: SocketAddr,
        work: Work,
        connections: u16,
        depth: u16,
        space: &Space,
    ) -> Result<Self> {
        let hosts = (0..connections).step_by(usize::from(QUEUES_MAX));
        let hosts = hosts.map(|before| (connections - before).min(QUEUES_MAX)).collect::<Vec<_>>();
        Self::join_as(address, work, &hosts, depth, space, Duration::ZERO)
    }

    /// Joins as several hosts, each with so many I/O queues and one admin queue more, and a keep alive timer unless it is zero.
    ///
    /// # Errors
    /// When the target does not let them.
    pub fn join_as(
        address: SocketAddr,
        work: Work,
        hosts: &[u16],
        depth: u16,
        space: &Space,
        keep_alive: Duration,
    ) -> Result<Self> {
        let (mut queues, mut associations) = (Vec::new(), Vec::new());
        for &count in hosts {
            let mut association = join_alive(address, count, depth, work.wanted(), keep_alive)?;
            for (stream, h2c_data_max) in association.queues.drain(..) {
                let seed = u16::try_from(queues.len()).unwrap_or_default();
                queues.push(Queue::new(stream, h2c_data_max, work, (depth, seed), space)?);
            }
            associations.push(association);
        }
        Ok(Self { queues, associations, work, space: vec![0; PIECE_LEN], naps: None })
    }

    /// Connects to the bare responder.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect_bare(address: SocketAddr, work: Work, depth: u16, space: &Space) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let queue = Queue::new(stream, work.len, work, (depth, 0), space)?;
        Ok(Self {
            queues: vec![queue],
            associations: Vec::new(),
            work,
            space: vec![0; PIECE_LEN],
            naps: None,
        })
    }

    /// Sleeps while nothing comes, and leaves the processor to whoever else needs it, such as the kernel's threads of a device.
    #[must_use]
    pub fn sleeping(self) -> Self {
        Self { naps: Some(NAP), ..self }
    }

    /// Has each command ask for a namespace of its own, of so many, as far as there are commands.
    ///
    /// # Errors
    /// When commands have digests: they would have to be made anew.
    pub fn spread_over(&mut self, namespaces: u32) -> Result<()> {
        ensure!(namespaces > 0, "commands need a namespace");
        self.ask_by_number(|number| number % namespaces + 1)
    }

    /// Has all commands ask for one namespace.
    ///
    /// # Errors
    /// As [`LightHost::spread_over`].
    pub fn ask_for(&mut self, nsid: u32) -> Result<()> {
        self.ask_by_number(|_| nsid)
    }

    fn ask_by_number(&mut self, nsid: impl Fn(u32) -> u32) -> Result<()> {
        ensure!(!self.work.digests, "commands with digests stay as they are");
        for (number, capsule) in (0u32..).zip(self.queues.iter_mut().flat_map(|queue| &mut queue.capsules)) {
            let nsid = nsid(number).to_le_bytes();
            capsule.get_mut(NSID_AT..NSID_AT + 4).context("a short capsule")?.copy_from_slice(&nsid);
        }
        Ok(())
    }

    /// Leaves an Asynchronous Event Request with the target for each host.
    ///
    /// # Errors
    /// When a connection broke.
    pub fn await_events(&mut self) -> Result<()> {
        self.associations.iter_mut().try_for_each(Association::await_event)
    }

    /// A Keep Alive of one host, answered.
    ///
    /// # Errors
    /// When it is not answered well.
    pub fn keep_alive(&mut self, host: usize) -> Result<()> {
        self.associations.get_mut(host).context("no such host")?.keep_alive()
    }

    /// One command after the other on the first connection, each begun when it is due: `pauses` after the one before was
    /// begun. Spins meanwhile: no wait of this host is measured. How long they took, in nanoseconds.
    ///
    /// # Errors
    /// As [`LightHost::measure`].
    pub fn measure_paced(&mut self, pauses: impl Iterator<Item = Duration>) -> Result<Histogram<u64>> {
        let mut latencies = Run::no_latencies()?;
        let queue = self.queues.first_mut().context("no connection")?;
        let mut due = Instant::now();
        for pause in pauses {
            due += pause;
            while Instant::now() < due {
                std::hint::spin_loop();
            }
            due = Instant::now();
            queue.begin_one(self.work, due)?;
            while queue.in_flight > 0 {
                queue.serve(self.work, &mut self.space, (due, Duration::ZERO), &mut latencies)?;
                ensure!(due.elapsed() < PATIENCE, "the target does not answer");
            }
        }
        Ok(latencies)
    }

    /// Keeps all commands in flight for so long.
    ///
    /// # Errors
    /// When the target answers otherwise than well, or not at all.
    pub fn measure(&mut self, time: Duration) -> Result<Run> {
        let mut latencies = Run::no_latencies()?;
        let watch = self.watch()?;
        let mut ready = Vec::with_capacity(EVENTS_MAX);
        let begun = Instant::now();
        let mut heard_at = begun;
        for queue in &mut self.queues {
            queue.begin(self.work)?;
        }
        while self.queues.iter().any(|queue| queue.in_flight > 0) {
            self.look(watch.as_ref(), &mut ready)?;
            for at in ready.drain(..) {
                let Some(queue) = self.queues.get_mut(at) else { continue };
                if queue.serve(self.work, &mut self.space, (begun, time), &mut latencies)? {
                    heard_at = Instant::now();
                }
            }
            ensure!(heard_at.elapsed() < PATIENCE, "the target does not answer");
        }
        let time = begun.elapsed();
        let counts: Vec<_> = self.queues.iter().map(|queue| queue.count).collect();
        let (all, least) = (counts.iter().sum::<u64>(), counts.iter().min().copied().unwrap_or_default());
        let mean = all as f64 / counts.len() as f64;
        Ok(Run {
            count: all,
            time,
            iops: all as f64 / time.as_secs_f64(),
            latencies_ns: latencies,
            least_share: least as f64 / mean,
            served: counts.iter().filter(|count| **count > 0).count(),
        })
    }

    /// Watches all sockets, when there are several, or it sleeps.
    fn watch(&self) -> Result<Option<Watch>> {
        let is_alone = self.queues.len() == 1 && self.naps.is_none();
        let watch = || Watch::over(self.queues.iter().map(|queue| &queue.stream));
        (!is_alone).then(watch).transpose()
    }

    /// Which connections may have something.
    fn look(&self, watch: Option<&Watch>, ready: &mut Vec<usize>) -> Result<()> {
        let Some(watch) = watch else {
            ready.push(0);
            return Ok(());
        };
        watch.look(&self.naps.unwrap_or_default(), ready)
    }
}

/// Sockets that are looked at together.
pub(super) struct Watch(rustix::fd::OwnedFd);

impl Watch {
    /// Of what is to be read from these.
    ///
    /// # Errors
    /// When the kernel has no room for it.
    pub(super) fn over<'s>(streams: impl Iterator<Item = &'s TcpStream>) -> Result<Self> {
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (at, stream) in streams.enumerate() {
            epoll::add(&watch, stream, epoll::EventData::new_u64(at as u64), epoll::EventFlags::IN)?;
        }
        Ok(Self(watch))
    }

    /// Which of them have something, by their numbers: [`EVENTS_MAX`] at the most, and in turn where more have. Waits no longer than this
    /// for the first one.
    ///
    /// # Errors
    /// None that is known of.
    pub(super) fn look(&self, patience: &Timespec, ready: &mut Vec<usize>) -> Result<()> {
        let mut events = [std::mem::MaybeUninit::uninit(); EVENTS_MAX];
        let events = match epoll::wait(&self.0, &mut events, Some(patience)) {
            Ok((events, _)) => events,
            // A signal, which is not for here.
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for event in events {
            ready.push(usize::try_from(event.data.u64())?);
        }
        Ok(())
    }
}

impl Queue {
    fn new(
        stream: TcpStream,
        h2c_data_max: u32,
        work: Work,
        (depth, seed): (u16, u16),
        space: &Space,
    ) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let blocks = space.len / u64::from(BLOCK_LEN);
        let places = Places::new(space, work, seed);
        let capsules = (0..depth).map(|cid| work.capsule(cid, seed, blocks)).collect::<Result<Vec<_>>>()?;
        let sent_at = vec![Instant::now(); capsules.len()];
        let (inbound, out) = (Inbound::default(), Vec::new());
        Ok(Self { stream, h2c_data_max, places, capsules, sent_at, inbound, out, count: 0, in_flight: 0 })
    }

    /// Sends all commands.
    fn begin(&mut self, work: Work) -> Result<()> {
        self.count = 0;
        for capsule in &mut self.capsules {
            work.move_to(capsule, self.places.next());
        }
        self.in_flight = self.capsules.len();
        self.sent_at.fill(Instant::now());
        send_all(&mut self.stream, &self.capsules.concat())
    }

    /// Sends the first command.
    fn begin_one(&mut self, work: Work, now: Instant) -> Result<()> {
        let (capsule, sent_at) =
            self.capsules.first_mut().zip(self.sent_at.first_mut()).context("no command")?;
        work.move_to(capsule, self.places.next());
        (self.in_flight, *sent_at) = (1, now);
        send_all(&mut self.stream, capsule)
    }

    /// Reads once, and sends the commands that are answered again as long as the time runs. Whether something came.
    fn serve(
        &mut self,
        work: Work,
        space: &mut [u8],
        (begun, time): (Instant, Duration),
        latencies: &mut Histogram<u64>,
    ) -> Result<bool> {
        let len = match self.stream.read(space) {
            Ok(0) => bail!("the target closed the connection"),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let now = Instant::now();
        let goes_on = now.duration_since(begun) < time;
        let Self { inbound, out, places, capsules, sent_at, count, in_flight, h2c_data_max, .. } = self;
        out.clear();
        inbound.take(space.get(..len).unwrap_or_default(), |event| {
            match event {
                Event::Done { cid } => {
                    let at = usize::from(cid);
                    let (capsule, sent_at) =
                        capsules.get(at).zip(sent_at.get_mut(at)).context("a CID that was not sent")?;
                    latencies.saturating_record(
                        u64::try_from(now.duration_since(*sent_at).as_nanos()).unwrap_or(u64::MAX),
                    );
                    *count += 1;
                    if goes_on {
                        let from = out.len();
                        out.extend_from_slice(capsule);
                        work.move_to(out.get_mut(from..).unwrap_or_default(), places.next());
                        *sent_at = now;
                    } else {
                        *in_flight -= 1;
                    }
                }
                Event::Wanted(asked) => answer(work, asked, *h2c_data_max, out),
                Event::More => {}
            }
            Ok(())
        })?;
        if !self.out.is_empty() {
            send_all(&mut self.stream, &self.out)?;
        }
        Ok(true)
    }
}

/// Puts the data that is wanted into `out`, in PDUs that are not too long.
fn answer(work: Work, asked: Asked, h2c_data_max: u32, out: &mut Vec<u8>) {
    let end = asked.offset.saturating_add(asked.len);
    let mut at = asked.offset;
    while at < end {
        let len = (end - at).min(h2c_data_max.max(1));
        out.extend_from_slice(&work.data(asked, at, len));
        at += len;
    }
}

/// Spins until all is sent: what is waited for is the target.
fn send_all(stream: &mut TcpStream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
