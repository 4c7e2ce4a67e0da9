//! The body of the connection's fuzz target: a real core, session and memory device behind a socket pair, and a host
//! that does what the input says.
//!
//! ```text
//!   input: knobs, then actions          Host (fuzz/host.rs)            Core + TcpConnection
//!     knobs   digests, queue, manners     commands, answers to R2Ts      socket pair, one step at a time
//!     action  what, with two arguments    checks what comes back
//! ```
//!
//! Most actions are what a good host does; some are rude, and from the first rude one on less is asked of the answers.
//! What is checked: no panic; what the target sends are PDUs; no command is completed twice; reads carry what was
//! written there, or zeros; a good host gets every answer; and when all is over nothing is held: no connection, no
//! command, no buffer.

mod host;

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use self::host::Host;
use super::{TcpConnection, TcpCounters, TcpTimeouts};
use crate::block::{BlockDevice, MemDevice, MemOptions};
use crate::fabrics::{
    Arrival, FencePolicy, HostPolicy, Identity, NamespaceSpec, PortId, PortSpec, QueueSession, SubsystemSpec,
    Target, TargetOptions,
};
use crate::reactor::{
    Accepted, Connection, ConnectionFactory, Core, CoreContext, CoreOptions, CoreStats, IdlePolicy, Letter,
    Mailbox,
};
use crate::ring::Socket;
use crate::units::{BlockSize, ByteLen};

/// The subsystem.
const NQN: &str = "nqn.2026-11.io.fastice:fuzz";
/// Blocks of each namespace, and their size.
const BLOCKS: u64 = 512;
const BLOCK_BYTES: usize = 4096;
/// Entries of the queue that is fuzzed.
const ENTRIES: u16 = 96;
/// Longest time in which something that must come has to come. Far more than it takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time-outs short enough to pass within a run.
const TIMEOUTS: TcpTimeouts = TcpTimeouts {
    handshake: Duration::from_secs(5),
    transfer: Duration::from_secs(5),
    ending: Duration::from_millis(200),
    closing: Duration::from_millis(50),
};

/// Runs a connection by what `data` says; an empty input does nothing.
///
/// # Panics
/// When a promise of the connection is broken, see the module; or where the machine has no io_uring or no memory.
pub fn fuzz_connection(data: &[u8]) {
    let Some((&knobs, actions)) = data.split_first() else { return };
    let mut world = World::new(TIMEOUTS);
    let mut admin = Host::new(world.connection(), 0);
    let mut host = Host::new(world.connection(), knobs);
    if knobs & host::knob::UNINTRODUCED == 0 {
        admin.become_admin(&mut world);
        if knobs & host::knob::ADMIN == 0 {
            host.become_io(&mut world, admin.cntlid());
        } else {
            host.become_admin(&mut world);
        }
    }
    for action in actions.chunks(3) {
        host.act(&mut world, action);
    }
    host.finish(&mut world);
    drop((host, admin));
    world.expect_empty();
}

/// A core with its target.
struct World {
    core: Core,
    mailbox: Mailbox,
}

impl World {
    fn new(timeouts: TcpTimeouts) -> Self {
        let target = Target::new(TargetOptions::default());
        let published = target.publish(vec![subsystem()], vec![port()]).expect("a good specification");
        let mailbox = Mailbox::new().expect("an eventfd");
        let counters = Arc::new(TcpCounters::default());
        let factory = Factory { target, counters, timeouts };
        let options = CoreOptions {
            oversight: None,
            share_buffers: false,
            buffer_memory: ByteLen(6 << 20),
            idle: IdlePolicy::AlwaysPoll,
            linger: Duration::ZERO,
            gather: Duration::from_micros(100),
            connections_max: 4,
            hold: None,
            stages: Arc::default(),
        };
        let core = Core::alone(&options, &mailbox, Arc::new(factory)).expect("a ring and buffers");
        let mut world = Self { core, mailbox };
        let (reply, opened) = mpsc::channel();
        world.mailbox.post(Letter::Open { exports: published.added, reply });
        world.until("the device is open", || opened.try_recv().ok()).expect("a queue of the device");
        world
    }

    /// A new connection: the host's end of it.
    fn connection(&mut self) -> UnixStream {
        let (host, controller) = UnixStream::pair().expect("a socket pair");
        host.set_nonblocking(true).expect("a socket without blocking");
        let (peer, local) = (address(1), address(4420));
        let accepted = Accepted { socket: controller.into(), peer, local, port: PortId(1) };
        self.mailbox.post(Letter::Adopt(accepted));
        host
    }

    fn step(&mut self) {
        self.core.step().expect("a ring that works");
    }

    fn stats(&self) -> CoreStats {
        self.core.stats()
    }

    /// Steps until `done` gives something.
    fn until<T>(&mut self, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = done() {
                return value;
            }
            assert!(Instant::now() < deadline, "never came: {what}");
            self.step();
        }
    }

    /// Steps until the core holds nothing any more.
    fn expect_empty(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.stats() != CoreStats::default() {
            assert!(Instant::now() < deadline, "still held when all is over: {:?}", self.stats());
            self.step();
        }
    }
}

/// As the factory for TCP, for sockets that have no TCP_NODELAY.
struct Factory {
    target: Arc<Target>,
    counters: Arc<TcpCounters>,
    timeouts: TcpTimeouts,
}

impl ConnectionFactory for Factory {
    fn adopt(&self, cx: &mut CoreContext, accepted: Accepted) -> Option<Box<dyn Connection>> {
        let Accepted { socket, peer, local, port } = accepted;
        let waker = Arc::new(cx.mailbox.clone());
        let session = QueueSession::new(Arc::clone(&self.target), Arrival { port, peer, local }, waker);
        let counters = Arc::clone(&self.counters);
        Some(Box::new(TcpConnection::new(
            Socket::new(socket),
            peer,
            session,
            counters,
            self.timeouts,
            cx.now,
        )))
    }
}

fn address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn port() -> PortSpec {
    PortSpec { id: PortId(1), listen: address(4420), advertise: None, discovery_only: false }
}

/// One namespace that may be written, and one that may not. The first is of a device that is asked for what has ended, in the same turn;
/// the other's does all at once.
fn subsystem() -> SubsystemSpec {
    let len = ByteLen(BLOCKS * BLOCK_BYTES as u64);
    let namespace = |nsid: u32, read_only: bool| {
        let latency = (!read_only).then_some(Duration::ZERO);
        let options = MemOptions { latency, ..MemOptions::new(len, BlockSize::B4096) };
        let device = MemDevice::new(options).expect("some memory");
        NamespaceSpec {
            nsid: nvme_spec::Nsid(nsid),
            map: None,
            device: Arc::new(device) as Arc<dyn BlockDevice>,
            read_only,
            on_fence: FencePolicy::Ana,
            block_size: BlockSize::B4096,
            len,
            identity: Identity::named("memory"),
        }
    };
    SubsystemSpec {
        nqn: NQN.to_owned(),
        serial: "1".to_owned(),
        model: "fuzz".to_owned(),
        hosts: HostPolicy::Any,
        namespaces: vec![namespace(1, false), namespace(2, true)],
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::host::{action, knob};
    use super::*;

    #[test]
    fn the_corpus_breaks_no_promise() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/connection");
        let mut count = 0;
        for entry in std::fs::read_dir(&dir).expect("the corpus is part of the repository") {
            let path = entry.expect("a directory entry").path();
            println!("{}", path.display());
            fuzz_connection(&std::fs::read(&path).expect("a corpus file"));
            count += 1;
        }
        assert!(count >= 12, "{count} files in {}", dir.display());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 200, ..ProptestConfig::default() })]

        #[test]
        fn random_hosts_break_no_promise(data in prop::collection::vec(any::<u8>(), 1..300)) {
            fuzz_connection(&data);
        }

        #[test]
        fn good_hosts_get_every_answer(
            knobs in any::<u8>(),
            actions in prop::collection::vec((0..action::RUDE, any::<u8>(), any::<u8>()), 1..100),
        ) {
            let mut data = vec![knobs & !(knob::UNINTRODUCED | knob::ADMIN)];
            actions.iter().for_each(|&(what, a, b)| data.extend([what, a, b]));
            fuzz_connection(&data);
        }
    }

    fn hanging(what: u8) {
        let mut world = World::new(TcpTimeouts { transfer: Duration::from_millis(300), ..TIMEOUTS });
        let mut admin = Host::new(world.connection(), 0);
        admin.become_admin(&mut world);
        let mut host = Host::new(world.connection(), 0);
        host.become_io(&mut world, admin.cntlid());
        host.act(&mut world, &[action::PAUSE, 0, 0]);
        for at in 0..40 {
            host.act(&mut world, &[what, at, 7]);
        }
        host.act(&mut world, &[action::DELIVER, 0, 0]);
        let deadline = Instant::now() + PATIENCE;
        while world.stats().connections > 1 {
            assert!(Instant::now() < deadline, "the connection hangs for ever: {:?}", world.stats());
            world.step();
        }
        assert_eq!(world.stats().buffer_bytes, 0);
        drop((host, admin));
        world.expect_empty();
    }

    #[test]
    fn who_never_sends_its_data_is_let_go() {
        hanging(action::WRITE);
    }

    #[test]
    fn who_never_takes_its_data_is_let_go() {
        hanging(action::READ);
    }
}
