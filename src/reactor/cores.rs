//! All cores: starting their threads, reaching them, and stopping them.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hugepage_alloc::AllocError;

use super::core::Spread;
use super::gauges::CoreGauges;
use super::mailbox::{Accepted, Letter, Mailbox};
use super::pause::CoreFailure;
use super::{ConnectionFactory, Core, IdlePolicy};
use crate::extent::Oversight;
use crate::fabrics::{Export, ExportSlot, PortId};
use crate::ring::RingError;
use crate::stage::{Book, TraceCopy};
use crate::units::ByteLen;

/// How long a core may take to set itself up, or to open a device queue.
const PATIENCE: Duration = Duration::from_secs(30);

/// What each core gets.
#[derive(Clone, Debug)]
pub struct CoreOptions {
    /// Buffer memory of one core.
    pub buffer_memory: ByteLen,
    /// Whether another process may be given the buffers, as the device that it is.
    pub share_buffers: bool,
    /// What a core does without work.
    pub idle: IdlePolicy,
    /// A core that sleeps polls on between commands that are no further apart than this.
    pub linger: Duration,
    /// Sockets of hosts that are slower than the core are left alone for so long at the most: see [`Gather`](super::Gather).
    pub gather: Duration,
    /// Connections one core serves at the most.
    pub connections_max: usize,
    /// A file of which each core's ring keeps a copy open: the kernel closes it, also after SIGKILL, only when all
    /// commands of the core are done.
    pub hold: Option<Arc<OwnedFd>>,
    /// Whom a core asks, when it was away for a while, whether the files under the exports are what they were.
    pub oversight: Option<Arc<Oversight>>,
    /// Where cores tell how long the stages of commands took.
    pub stages: Arc<Book>,
}

/// Why the cores cannot run, or cannot do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoresError {
    /// The thread or its mailbox could not be made.
    #[error("could not start the thread of core {cpu}")]
    Thread {
        /// Which CPU.
        cpu: usize,
        /// Why.
        source: std::io::Error,
    },
    /// The core may not run where it was told to.
    #[error("could not bind to CPU {cpu}; is it online and allowed by cpuset?")]
    Affinity {
        /// Which CPU.
        cpu: usize,
        /// Why.
        source: std::io::Error,
    },
    /// No buffer memory.
    #[error("could not get buffer memory for core {cpu}")]
    Buffers {
        /// Which CPU.
        cpu: usize,
        /// Why.
        source: AllocError,
    },
    /// No io_uring.
    #[error("could not set up io_uring for core {cpu}")]
    Ring {
        /// Which CPU.
        cpu: usize,
        /// Why.
        source: RingError,
    },
    /// A device gave a core no queue.
    #[error("could not open a device queue: {0}")]
    Open(String),
    /// A core has ended or hangs.
    #[error("core {cpu} does not answer")]
    Silent {
        /// Which CPU.
        cpu: usize,
    },
}

struct CoreHandle {
    cpu: usize,
    mailbox: Mailbox,
    gauges: Arc<CoreGauges>,
    thread: JoinHandle<Result<bool, CoreFailure>>,
}

/// The running cores.
pub struct Cores {
    cores: Vec<CoreHandle>,
    stages: Arc<Book>,
}

impl Cores {
    /// Starts one core on each of `cpus`.
    ///
    /// # Errors
    /// When a core cannot be set up; those that were are stopped again.
    pub fn start(
        cpus: &[usize],
        options: &CoreOptions,
        factory: &Arc<dyn ConnectionFactory>,
    ) -> Result<Self, CoresError> {
        let mut mailboxes = Vec::with_capacity(cpus.len());
        for &cpu in cpus {
            mailboxes.push(Mailbox::new().map_err(|source| CoresError::Thread { cpu, source })?);
        }
        let spread = to_the_emptiest(mailboxes.clone());
        let mut started = Self { cores: Vec::with_capacity(cpus.len()), stages: Arc::clone(&options.stages) };
        for (&cpu, mailbox) in cpus.iter().zip(mailboxes) {
            let up = start_core(cpu, options, Arc::clone(factory), Arc::clone(&spread), mailbox);
            match up {
                Ok(core) => started.cores.push(core),
                Err(error) => {
                    started.stop(Instant::now());
                    return Err(error);
                }
            }
        }
        Ok(started)
    }

    /// Opens queues for `exports` on every core, before any host may send commands for them.
    ///
    /// # Errors
    /// The first core's refusal; no core has any of them then.
    pub fn open(&self, exports: &[Arc<Export>]) -> Result<(), CoresError> {
        let opened = self.open_each(exports);
        if opened.is_err() {
            for export in exports {
                self.close(export.slot);
            }
        }
        opened
    }

    /// Forgets an export that every core has drained, or that no host has seen.
    pub fn close(&self, slot: ExportSlot) {
        self.cores.iter().for_each(|core| core.mailbox.post(Letter::Close(slot)));
    }

    fn open_each(&self, exports: &[Arc<Export>]) -> Result<(), CoresError> {
        for core in &self.cores {
            let (reply, answer) = mpsc::channel();
            core.mailbox.post(Letter::Open { exports: exports.to_vec(), reply });
            let answer = answer.recv_timeout(PATIENCE).map_err(|_| CoresError::Silent { cpu: core.cpu })?;
            answer.map_err(CoresError::Open)?;
        }
        Ok(())
    }

    /// Asks each core to call `answer` as soon as it has no command of a fenced export in flight; how many were asked. Nobody
    /// waits here: commands that a device keeps hold up no other export. A core that has ended never answers, for what it left
    /// on a device may still be there.
    pub fn drain(&self, slot: ExportSlot, answer: &(impl Fn() + Clone + Send + 'static)) -> usize {
        for core in &self.cores {
            core.mailbox.post(Letter::Drain { slot, answer: Box::new(answer.clone()) });
        }
        self.cores.len()
    }

    /// Asks each core for its last commands; how many were asked. Nobody waits here.
    pub fn trace(&self, reply: &mpsc::Sender<TraceCopy>) -> usize {
        for core in &self.cores {
            core.mailbox.post(Letter::Trace { reply: reply.clone() });
        }
        self.cores.len()
    }

    /// Accepts connections on a listening socket; the core that accepts spreads them over all.
    pub fn listen(&self, listener: OwnedFd, port: PortId) {
        if let Some(core) = self.cores.get(port.0 as usize % self.cores.len().max(1)) {
            core.mailbox.post(Letter::Listen { listener, port });
        }
    }

    /// Stops accepting on a port.
    pub fn unlisten(&self, port: PortId) {
        self.cores.iter().for_each(|core| core.mailbox.post(Letter::Unlisten(port)));
    }

    /// What each core says of itself; see [`CoreGauges`].
    #[must_use]
    pub fn gauges(&self) -> Vec<Arc<CoreGauges>> {
        self.cores.iter().map(|core| Arc::clone(&core.gauges)).collect()
    }

    /// How long the stages of their commands took.
    #[must_use]
    pub fn stages(&self) -> Arc<Book> {
        Arc::clone(&self.stages)
    }

    /// Whether every core still runs. One that does not has logged why.
    #[must_use]
    pub fn healthy(&self) -> bool {
        self.cores.iter().all(|core| !core.thread.is_finished())
    }

    /// Ends all connections after their commands, at `deadline` at the latest, and joins the threads. True when no
    /// command was left on a device: what lies under the exports will not change any more.
    pub fn stop(self, deadline: Instant) -> bool {
        for core in &self.cores {
            core.mailbox.post(Letter::Stop { deadline });
        }
        let mut clean = true;
        for core in self.cores {
            clean &= match core.thread.join() {
                Ok(Ok(clean)) => clean,
                Ok(Err(error)) => {
                    tracing::error!(cpu = core.cpu, %error, "core ended with an error");
                    false
                }
                Err(_) => {
                    tracing::error!(cpu = core.cpu, "core panicked; this is a defect, please report it");
                    false
                }
            };
        }
        clean
    }
}

/// To the core with the fewest connections that carry I/O, by turns where several have as few: however hosts come and go, no core has many
/// more than another, and that each host has an admin queue too puts no core at a disadvantage. Two cores that accept at the same moment may choose the same one.
fn to_the_emptiest(mailboxes: Vec<Mailbox>) -> Spread {
    let next = AtomicUsize::new(0);
    Arc::new(move |accepted: Accepted| {
        let first = next.fetch_add(1, Ordering::Relaxed) % mailboxes.len().max(1);
        let (before, from) = mailboxes.split_at(first);
        if let Some(mailbox) = from.iter().chain(before).min_by_key(|mailbox| mailbox.connections()) {
            mailbox.post(Letter::Adopt(accepted));
        }
    })
}

fn start_core(
    cpu: usize,
    options: &CoreOptions,
    factory: Arc<dyn ConnectionFactory>,
    spread: Spread,
    mailbox: Mailbox,
) -> Result<CoreHandle, CoresError> {
    let (up, is_up) = mpsc::channel();
    let letters = mailbox.clone();
    let options = options.clone();
    let gauges = Arc::new(CoreGauges::new(cpu));
    let told = Arc::clone(&gauges);
    let body = move || {
        let core = match set_up(cpu, &options, letters, factory, spread, told) {
            Ok(core) => core,
            Err(error) => {
                // The starter waits for exactly one message.
                let _ = up.send(Err(error));
                return Ok(true);
            }
        };
        let _ = up.send(Ok(()));
        let ended = core.run();
        if let Err(error) = &ended {
            tracing::error!(cpu, %error, "core stopped serving");
        }
        ended
    };
    let thread = std::thread::Builder::new().name(format!("core-{cpu}")).spawn(body);
    let thread = thread.map_err(|source| CoresError::Thread { cpu, source })?;
    is_up.recv_timeout(PATIENCE).map_err(|_| CoresError::Silent { cpu })??;
    Ok(CoreHandle { cpu, mailbox, thread, gauges })
}

fn set_up(
    cpu: usize,
    options: &CoreOptions,
    mailbox: Mailbox,
    factory: Arc<dyn ConnectionFactory>,
    spread: Spread,
    gauges: Arc<CoreGauges>,
) -> Result<Core, CoresError> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|errno| CoresError::Affinity { cpu, source: errno.into() })?;
    Core::new(cpu, options, mailbox, factory, spread, gauges)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::fabrics::PortId;

    #[test]
    fn a_connection_goes_to_the_core_that_has_the_fewest() {
        let mailboxes: Vec<_> = (0..3).map(|_| Mailbox::new().expect("eventfd")).collect();
        let spread = to_the_emptiest(mailboxes.clone());
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let local = listener.local_addr().expect("an address");
        let accept = || {
            let socket = TcpStream::connect(local).expect("loopback");
            spread(Accepted { socket: socket.into(), peer: local, local, port: PortId(1) });
        };
        let counts = || mailboxes.iter().map(Mailbox::connections).collect::<Vec<_>>();
        (0..7).for_each(|_| accept());
        assert_eq!(counts().iter().sum::<usize>(), 7);
        assert!(counts().iter().all(|count| (2..=3).contains(count)), "{:?}", counts());
        // All of one end: its place is filled first.
        (0..mailboxes[1].connections()).for_each(|_| mailboxes[1].let_go());
        accept();
        accept();
        assert_eq!(mailboxes[1].connections(), 2, "{:?}", counts());
        // A host of an admin queue, which carries nothing, and an I/O queue, again and again.
        let mailboxes: Vec<_> = (0..2).map(|_| Mailbox::new().expect("eventfd")).collect();
        let spread = to_the_emptiest(mailboxes.clone());
        let accept = || {
            let socket = TcpStream::connect(local).expect("loopback");
            spread(Accepted { socket: socket.into(), peer: local, local, port: PortId(1) });
        };
        for _ in 0..8 {
            let before: Vec<_> = mailboxes.iter().map(Mailbox::connections).collect();
            accept();
            let admin =
                mailboxes.iter().zip(before).find(|(mailbox, before)| mailbox.connections() > *before);
            admin.expect("one has it").0.let_go();
            accept();
        }
        assert_eq!(mailboxes.iter().map(Mailbox::connections).collect::<Vec<_>>(), [4, 4]);
    }
}
