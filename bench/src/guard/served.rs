//! The counted process: a core of the target and its host on one thread, so that the same I/Os take the same turns each time.
//!
//! ```text
//!   Host                                               Core (the target's own, always polling)
//!     depth capsules, at random places --loopback TCP--> turn: ring, connection, session, engine, lookup, device
//!     responses, all of them           <---------------- turn, turn ...           counted: TURN, and what it calls
//! ```
//!
//! No device moves data, for what does is the kernel or the hardware. Socket buffers have a fixed
//! size: what the kernel would tune depends on time.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fastice::block::{BlockDevice, NullDevice};
use fastice::config::DEFAULT_GATHER;
use fastice::extent::FrozenMap;
use fastice::fabrics::{
    FencePolicy, HostPolicy, Identity, NamespaceSpec, PortId, PortSpec, SubsystemSpec, Target, TargetOptions,
};
use fastice::reactor::{Accepted, Core, CoreOptions, IdlePolicy, Letter, Mailbox};
use fastice::tcp::{TcpCounters, TcpFactory, TcpTimeouts};
use fastice::units::{BlockSize, ByteLen, Lba};
use nvme_spec::Nsid;
use rustix::net::sockopt;

use super::device::DoneAtOnce;
use super::host::Host;
use crate::scale::lookup::{BLOCK, Random, maps};
use crate::target::NQN;
use crate::target::work::{Kind, Work};

/// The functions before and in which to count, as valgrind sees them.
pub const CONVERSE: &str = "fastice_bench::guard::served::converse*";
/// See [`CONVERSE`].
pub const TURN: &str = "fastice_bench::guard::served::turn*";
/// Extents of the map of which the first or the second form is served.
const EXTENTS: u64 = 10_000;
/// Of each socket, in bytes: 32 writes with their data fit.
const SOCKET_BUFFER_LEN: usize = 1 << 20;
/// For the connection to stand.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Served {
    /// A null device, which does all at once
    Null,
    /// A pinned file of one extent, on a device whose ends are found later
    #[value(name = "1-extent")]
    OneExtent,
    /// A pinned file of 10,000 extents on it
    #[value(name = "10000-extents")]
    ManyExtents,
}

impl Served {
    /// The name on the command line and in rows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::OneExtent => "1-extent",
            Self::ManyExtents => "10000-extents",
        }
    }
}

/// What the host does, 4 KiB at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Direction {
    /// Random reads
    #[value(name = "randread")]
    Read,
    /// Random writes, their data in the capsule
    #[value(name = "randwrite")]
    Write,
}

impl Direction {
    const fn kind(self) -> Kind {
        match self {
            Self::Read => Kind::Read,
            Self::Write => Kind::Write,
        }
    }

    /// The name on the command line and in rows.
    pub fn name(self) -> String {
        Work::small(self.kind()).name()
    }
}

/// What is counted: a turn of the core.
#[inline(never)]
fn turn(core: &mut Core) -> Result<()> {
    core.step()?;
    Ok(())
}

/// What a run did.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Turns of the core in which it was counted.
    pub turns: usize,
    /// System calls of the host meanwhile, which valgrind counts wherever they are made.
    pub host_calls: u64,
}

/// Serves `rounds` times `depth` I/Os.
///
/// # Errors
/// When something does not work.
pub fn run(served: Served, direction: Direction, depth: u16, rounds: usize) -> Result<Done> {
    let (many, one) = maps(EXTENTS)?;
    let blocks = many.len().get() / BLOCK;
    let map = match served {
        Served::Null => None,
        Served::OneExtent => Some(one),
        Served::ManyExtents => Some(many),
    };
    let mut serving = Serving::start(map, blocks)?;
    let mut host = serving.join(direction.kind(), depth, blocks)?;
    converse(&mut serving.core, &mut host, blocks, rounds)
}

/// All that is counted happens in here. What was counted before is forgotten: how often a core looks for a host that is about to join
/// depends on time.
#[inline(never)]
fn converse(core: &mut Core, host: &mut Host, blocks: u64, rounds: usize) -> Result<Done> {
    let (mut random, mut done) = (Random::new(), Done { turns: 0, host_calls: 0 });
    for _ in 0..rounds {
        let place = || Lba(random.below(blocks));
        let serve = || {
            done.turns += 1;
            turn(core)
        };
        done.host_calls += host.exchange(place, serve)?;
    }
    Ok(done)
}

/// A core that listens.
struct Serving {
    core: Core,
    mailbox: Mailbox,
    listener: TcpListener,
}

impl Serving {
    fn start(map: Option<FrozenMap>, blocks: u64) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // Accepted sockets have the same.
        fix_buffers(&listener)?;
        listener.set_nonblocking(true)?;
        let target = Target::new(TargetOptions::default());
        let listen = listener.local_addr()?;
        let port = PortSpec { id: PortId(1), listen, advertise: None, discovery_only: false };
        let exports = target.publish(vec![subsystem(map, blocks)?], vec![port])?.added;
        let mailbox = Mailbox::new()?;
        let factory = TcpFactory::new(target, Arc::new(TcpCounters::default()), TcpTimeouts::default());
        let options = CoreOptions {
            buffer_memory: ByteLen(16 << 20),
            share_buffers: false,
            idle: IdlePolicy::AlwaysPoll,
            linger: Duration::ZERO,
            gather: DEFAULT_GATHER,
            connections_max: 4,
            hold: None,
            oversight: None,
            stages: Arc::default(),
        };
        let mut core = Core::alone(&options, &mailbox, Arc::new(factory))?;
        let (reply, opened) = mpsc::channel();
        mailbox.post(Letter::Open { exports, reply });
        let deadline = Instant::now() + PATIENCE;
        let opened = loop {
            core.step()?;
            if let Ok(opened) = opened.try_recv() {
                break opened;
            }
            ensure!(Instant::now() < deadline, "the device is not opened");
        };
        opened.map_err(|error| anyhow!(error))?;
        Ok(Self { core, mailbox, listener })
    }

    /// A host of one I/O queue. It waits for answers on a thread of its own until it has joined.
    fn join(&mut self, kind: Kind, depth: u16, blocks: u64) -> Result<Host> {
        let address = self.listener.local_addr()?;
        let joining = std::thread::spawn(move || Host::join(address, Work::small(kind), depth, blocks));
        let deadline = Instant::now() + PATIENCE;
        while !joining.is_finished() {
            ensure!(Instant::now() < deadline, "the host does not join");
            if let Ok((socket, peer)) = self.listener.accept() {
                let accepted = Accepted { socket: socket.into(), peer, local: address, port: PortId(1) };
                self.mailbox.post(Letter::Adopt(accepted));
            }
            self.core.step()?;
        }
        let host =
            joining.join().map_err(|_| anyhow!("the host panicked"))?.context("the host cannot join")?;
        fix_buffers(host.socket())?;
        Ok(host)
    }
}

fn fix_buffers(socket: impl std::os::fd::AsFd) -> Result<()> {
    // The kernel takes as much as its limit allows.
    sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_LEN)?;
    Ok(sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_LEN)?)
}

fn subsystem(map: Option<FrozenMap>, blocks: u64) -> Result<SubsystemSpec> {
    let len = ByteLen(blocks * BLOCK);
    let device_len = map.as_ref().map_or(len, |map| map.identity().disk.size);
    let device: Arc<dyn BlockDevice> = match map {
        Some(_) => Arc::new(DoneAtOnce::new(device_len)),
        None => Arc::new(NullDevice::new(len, BlockSize::B4096)?),
    };
    let namespace = NamespaceSpec {
        nsid: Nsid(1),
        map: map.map(Arc::new),
        device,
        read_only: false,
        on_fence: FencePolicy::Ana,
        block_size: BlockSize::B4096,
        len,
        identity: Identity::named("guard"),
    };
    Ok(SubsystemSpec {
        nqn: NQN.to_owned(),
        serial: "1".to_owned(),
        model: "guard".to_owned(),
        hosts: HostPolicy::Any,
        namespaces: vec![namespace],
    })
}
