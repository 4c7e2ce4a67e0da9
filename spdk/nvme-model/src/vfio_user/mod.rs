//! The model as a device for other processes: a vfio-user server.
//!
//! ```text
//!   driver in another process --- UNIX socket ---> Server: one thread, one client at a time
//!      |                                             | turn: doorbells, messages, one step of the model
//!      |--- doorbells: shared memory or messages ----|
//!      `--- queues and buffers: the same pages ------' mapped from the files that came with DMA_MAP
//! ```
//!
//! The protocol's messages are those of [`async_nvme::vfio_user`], where is also said why no crate is used for it.
//!
//! The client is not trusted. What it says is checked and refused with an errno; what cannot be understood, stalls, or is
//! not read in time ends its connection, and with it all that it mapped. Only files in memory that can no longer shrink
//! are mapped, so none can be cut off under us. Two things a client that means it can still do to its own server: punch
//! huge pages out of its file on a host that has none left (SIGBUS), and make an eventfd block again after it was
//! attached, and fill it. So run one server a tenant.
//!
//! Doorbells can be shared memory ([`ServerOptions::mapped_doorbells`]): each is a mailbox of four bytes, into which
//! the driver writes as into a register, and from which the server takes what is there, leaving a mark. So no write is
//! seen twice, and none of an earlier life of a queue is left for the next.
//!
//! What it does not do: memory that comes without a file (a client that would serve DMA_READ and DMA_WRITE), INTx,
//! migration, dirty page tracking, ioeventfds.

mod doorbells;
mod function;
mod interrupts;
mod session;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::Model;
use session::Session;

/// How long the server goes on looking for work before it sleeps.
const SPIN_FOR: Duration = Duration::from_micros(100);
/// How long it sleeps at most when doorbells are shared memory, which wakes nobody.
const SLEEP_MAPPED: Duration = Duration::from_micros(100);
/// How long it sleeps at most otherwise: time in the model goes by steps.
const SLEEP: Duration = Duration::from_millis(2);
/// How long it sleeps at most without a client, who wakes it.
const SLEEP_ALONE: Duration = Duration::from_millis(20);
/// Turns in which the end of a client must show before another one is turned away.
const TURNS_BEFORE_REFUSAL: u32 = 64;
/// Turns between looks at the listener, while there is work.
const TURNS_PER_ACCEPT: u32 = 1024;

/// How to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// Whether doorbells are offered as shared memory. Faster by two system calls a doorbell; the server then wakes
    /// every 100 microseconds when idle, and a command after a pause may wait as long.
    pub mapped_doorbells: bool,
    /// How long a client may take to finish a message that it began, or to read what it is sent.
    pub message_deadline: Duration,
}

impl Default for ServerOptions {
    /// Shared memory, two seconds.
    fn default() -> Self {
        Self { mapped_doorbells: true, message_deadline: Duration::from_secs(2) }
    }
}

/// A model behind a socket.
#[derive(Debug)]
pub struct Server {
    model: Arc<Model>,
    options: ServerOptions,
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Listens at `path`. A socket that a server left behind when it died is replaced.
    ///
    /// # Errors
    /// When somebody listens there, or the socket cannot be made.
    pub fn bind(path: &Path, model: Arc<Model>, options: ServerOptions) -> io::Result<Self> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_behind(path) => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            result => result?,
        };
        listener.set_nonblocking(true)?;
        Ok(Self { model, options, listener, path: path.to_owned() })
    }

    /// Serves one client after another until `stop` is set. While one is served others are turned away.
    ///
    /// # Errors
    /// When the listener fails. What a client does is no error here: it ends its connection.
    pub fn run(&self, stop: &AtomicBool) -> io::Result<()> {
        let mut session: Option<Session> = None;
        let mut idle_since: Option<Instant> = None;
        let mut turns: u32 = 0;
        while !stop.load(Ordering::Relaxed) {
            turns = turns.wrapping_add(1);
            let worked = turn(&mut session);
            if worked {
                idle_since = None;
            }
            let idle_for = idle_since.get_or_insert_with(Instant::now).elapsed();
            let sleepy = session.is_none() || idle_for > SPIN_FOR;
            if !worked && sleepy {
                self.sleep(session.as_ref())?;
            } else if !worked {
                std::hint::spin_loop();
            }
            if (!worked && sleepy) || turns.is_multiple_of(TURNS_PER_ACCEPT) {
                self.accept(&mut session)?;
            }
        }
        Ok(())
    }

    /// Serves in a thread of its own until the result is dropped.
    ///
    /// # Errors
    /// When there is no more thread to be had.
    pub fn spawn(self) -> io::Result<ServerThread> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread =
            std::thread::Builder::new().name("vfio-user".to_owned()).spawn(move || self.run(&stopped))?;
        Ok(ServerThread { stop, thread: Some(thread) })
    }

    fn accept(&self, session: &mut Option<Session>) -> io::Result<()> {
        let socket = match self.listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::Interrupted
                    | io::ErrorKind::ConnectionAborted => Ok(()),
                    _ => Err(error),
                };
            }
        };
        // Whoever comes after one that has gone is served, also when its end was not seen yet.
        for _ in 0..TURNS_BEFORE_REFUSAL {
            if !turn(session) {
                break;
            }
        }
        if session.is_none() {
            *session = Session::new(self.model.clone(), socket, self.options.clone()).ok();
        }
        Ok(())
    }

    fn sleep(&self, session: Option<&Session>) -> io::Result<()> {
        let limit = match session {
            None => SLEEP_ALONE,
            Some(session) if session.has_doorbells() => SLEEP_MAPPED,
            Some(_) => SLEEP,
        };
        let timeout = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
        fds.extend(session.map(|session| PollFd::new(session, PollFlags::IN)));
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Somebody may have removed it, which is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One turn of a session, which ends it when its client is gone. Returns whether there was anything to do.
fn turn(session: &mut Option<Session>) -> bool {
    let Some(current) = session else { return false };
    current.turn().unwrap_or_else(|_| {
        *session = None;
        true
    })
}

/// Whether nobody listens at a socket.
fn is_left_behind(path: &Path) -> bool {
    UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// A server that runs by itself; stopped and joined on drop.
#[derive(Debug)]
pub struct ServerThread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Drop for ServerThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
