//! Metrics for Prometheus: `GET /metrics` on an address of the configuration, off by default.
//!
//! ```text
//!   scraper --TCP--> one thread, poll(2) over at most 8 connections --message--> control thread: Status
//!                      | http: what is asked                          plain counters of cores and target
//!                      `-page: the numbers as OpenMetrics text
//! ```
//!
//! Whoever reaches the address is served: there is no authentication, which is why it should be a loopback one. Every connection
//! has deadlines and a bounded buffer, the oldest goes when there are too many, and the page is put together at most every
//! [`PAGE_AGE_MAX`], so whoever floods the port costs the target next to nothing. It runs on no core of the I/O path.
//!
//! What it does not do: TLS, keep-alive, anything but this page.

mod http;
mod page;

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

pub use self::http::fuzz_metrics_request;
use self::http::{Asked, REQUEST_LEN_MAX, Refusal};
use self::page::Numbers;
use super::event::Event;
use super::listen::listen_patiently;
use crate::fabrics::Target;
use crate::reactor::{CoreGauges, Cores};
use crate::stage::Book;
use crate::tcp::TcpCounters;
use crate::tcp::congestion::Congestion;

/// Connections at a time. The oldest goes for one more.
const CLIENTS_MAX: usize = 8;
/// How long a client may take to ask, to take the answer, and to close.
const CLIENT_PATIENCE: Duration = Duration::from_secs(3);
/// How long the control thread may take: it may be pinning or draining.
const CONTROL_PATIENCE: Duration = Duration::from_secs(5);
/// How old a page may be.
const PAGE_AGE_MAX: Duration = Duration::from_millis(250);
/// After accept(2) failed, such as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the numbers come from.
pub(super) struct Source {
    events: Sender<Event>,
    target: Arc<Target>,
    counters: Arc<TcpCounters>,
    stages: Arc<Book>,
    gauges: Vec<Arc<CoreGauges>>,
}

impl Source {
    /// The control thread, and counters that it shares.
    pub(super) fn new(
        events: &Sender<Event>,
        target: &Arc<Target>,
        counters: &Arc<TcpCounters>,
        cores: &Cores,
    ) -> Self {
        let (target, counters) = (Arc::clone(target), Arc::clone(counters));
        Self { events: events.clone(), target, counters, stages: cores.stages(), gauges: cores.gauges() }
    }

    /// The page of this moment; `None` when the control thread is busy or gone.
    fn page(&self) -> Option<String> {
        let (reply, answer) = channel();
        self.events.send(Event::Status { histograms: false, reply }).ok()?;
        let status = *answer.recv_timeout(CONTROL_PATIENCE).ok()?;
        let cores = self.gauges.iter().map(|gauges| (gauges.get(), gauges.activity())).collect();
        let rows = self.stages.rows();
        let (target, tcp) = (self.target.stats(), self.counters.snapshot());
        page::render(Numbers { status, target, tcp, cores, rows }).ok()
    }
}

/// The socket, bound, and the thread that answers. Dropped, both end soon.
pub(super) struct Metrics {
    address: SocketAddr,
    stop: Arc<OwnedFd>,
}

impl Metrics {
    /// Listens on `address`, and answers from `source`. `None` after saying why not: a target without metrics is better than
    /// none.
    pub(super) fn start(address: SocketAddr, source: Source) -> Option<Self> {
        Self::with(address, Box::new(move || source.page()))
            .inspect_err(|error| tracing::error!(%address, %error, "no metrics"))
            .ok()
    }

    /// The same for any page.
    fn with(address: SocketAddr, ask: Box<dyn Fn() -> Option<String> + Send>) -> io::Result<Self> {
        let (socket, address) = listen_patiently(address, &Congestion::default())?;
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "metrics are open to whoever reaches this address: there is no authentication");
        }
        let listener = TcpListener::from(socket);
        listener.set_nonblocking(true)?;
        let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let body = Body {
            listener,
            stop: Arc::clone(&stop),
            ask,
            page: None,
            clients: Vec::new(),
            accept_from: Instant::now(),
        };
        std::thread::Builder::new().name("metrics".to_owned()).spawn(move || body.run())?;
        tracing::info!(%address, "metrics at /metrics");
        Ok(Self { address, stop })
    }

    /// Where it listens.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        // Refused only by a full counter, which wakes as well. Nobody waits for the thread: it may be waiting for an answer
        // of the control thread, which is the one that drops this.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
    }
}

/// How far a client is.
enum Step {
    /// What it asked so far.
    Asks(Vec<u8>),
    /// The answer, and how much of it is sent.
    Takes(Vec<u8>, usize),
    /// It was answered; what else it says is thrown away, for closing on unread bytes would reset the connection.
    Closes,
}

struct Client {
    stream: TcpStream,
    step: Step,
    until: Instant,
}

/// Whether a client is still there.
#[derive(PartialEq, Eq)]
enum Still {
    Here,
    Gone,
}

struct Body {
    listener: TcpListener,
    stop: Arc<OwnedFd>,
    ask: Box<dyn Fn() -> Option<String> + Send>,
    page: Option<(Instant, String)>,
    /// The oldest first.
    clients: Vec<Client>,
    accept_from: Instant,
}

impl Body {
    fn run(mut self) {
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::error!(%error, "no metrics any more");
                    return;
                }
            }
        }
    }

    /// Waits for what comes first, and deals with it. `false` when it is to end.
    fn turn(&mut self) -> io::Result<bool> {
        let now = Instant::now();
        let accepts = now >= self.accept_from;
        let pauses = self.clients.iter().map(|client| client.until);
        let first = pauses.chain((!accepts).then_some(self.accept_from)).min();
        let timeout = first.map(|until| {
            let pause = until.saturating_duration_since(now) + Duration::from_millis(1);
            Timespec { tv_sec: pause.as_secs().try_into().unwrap_or(1), tv_nsec: pause.subsec_nanos().into() }
        });
        let listens = if accepts { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![PollFd::new(&*self.stop, PollFlags::IN), PollFd::new(&self.listener, listens)];
        fds.extend(self.clients.iter().map(|client| {
            let wanted = if matches!(client.step, Step::Takes(..)) { PollFlags::OUT } else { PollFlags::IN };
            PollFd::new(&client.stream, wanted)
        }));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(true),
            result => result?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready.first() == Some(&true) {
            return Ok(false);
        }
        self.serve(ready.get(2..).unwrap_or_default());
        if ready.get(1) == Some(&true) {
            self.accept();
        }
        Ok(true)
    }

    fn accept(&mut self) {
        // One a turn: those that are here are not to wait for those that come.
        match self.listener.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(true).is_err() {
                    return;
                }
                if self.clients.len() >= CLIENTS_MAX {
                    self.clients.remove(0);
                }
                let until = Instant::now() + CLIENT_PATIENCE;
                self.clients.push(Client { stream, step: Step::Asks(Vec::new()), until });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::debug!(%error, "a scraper was not let in");
                self.accept_from = Instant::now() + ACCEPT_PAUSE;
            }
        }
    }

    fn serve(&mut self, ready: &[bool]) {
        let clients = std::mem::take(&mut self.clients);
        for (at, mut client) in clients.into_iter().enumerate() {
            let still = if ready.get(at) == Some(&true) {
                self.serve_one(&mut client).unwrap_or(Still::Gone)
            } else {
                Still::Here
            };
            if still == Still::Here && Instant::now() < client.until {
                self.clients.push(client);
            }
        }
    }

    fn serve_one(&mut self, client: &mut Client) -> io::Result<Still> {
        let mut bytes = [0; 2048];
        match &mut client.step {
            Step::Asks(request) => {
                let len = match client.stream.read(&mut bytes) {
                    Ok(0) => return Ok(Still::Gone),
                    Ok(len) => len,
                    Err(error) if is_for_later(&error) => return Ok(Still::Here),
                    Err(error) => return Err(error),
                };
                let room = REQUEST_LEN_MAX.saturating_sub(request.len()).min(len);
                request.extend_from_slice(bytes.get(..room).unwrap_or_default());
                let asked = http::look(request);
                let answer = match asked {
                    Asked::Unfinished => return Ok(Still::Here),
                    Asked::Metrics => self.answer(),
                    Asked::Refused(refusal) => http::refused(refusal),
                };
                client.until = Instant::now() + CLIENT_PATIENCE;
                client.step = Step::Takes(answer, 0);
                send(client)
            }
            Step::Takes(..) => send(client),
            Step::Closes => match client.stream.read(&mut bytes) {
                Ok(0) => Ok(Still::Gone),
                Ok(_) => Ok(Still::Here),
                Err(error) if is_for_later(&error) => Ok(Still::Here),
                Err(error) => Err(error),
            },
        }
    }

    fn answer(&mut self) -> Vec<u8> {
        let is_fresh = self.page.as_ref().is_some_and(|(at, _)| at.elapsed() < PAGE_AGE_MAX);
        if !is_fresh {
            self.page = (self.ask)().map(|text| (Instant::now(), text));
        }
        match &self.page {
            Some((_, text)) => http::page(text),
            None => http::refused(Refusal::Busy),
        }
    }
}

/// Sends as much of the answer as goes.
fn send(client: &mut Client) -> io::Result<Still> {
    let Step::Takes(answer, sent) = &mut client.step else { return Ok(Still::Here) };
    while let Some(rest) = answer.get(*sent..).filter(|rest| !rest.is_empty()) {
        match client.stream.write(rest) {
            Ok(0) => return Ok(Still::Gone),
            Ok(len) => *sent += len,
            Err(error) if is_for_later(&error) => return Ok(Still::Here),
            Err(error) => return Err(error),
        }
    }
    client.stream.shutdown(std::net::Shutdown::Write)?;
    client.step = Step::Closes;
    Ok(Still::Here)
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests;
