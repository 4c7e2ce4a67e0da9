//! One thread that answers all I/O queues there are, whoever they are of.
//!
//! ```text
//!   none      waits until one has joined
//!   one       reads it again and again
//!   several   a look at all of them (epoll, which does not wait) | one read, one write of each that has something
//! ```
//!
//! A look costs less than a read in vain of each, and finds more, the more has come meanwhile. One queue alone is in no epoll: data that
//! arrives would have to be noted there. Bytes are read to one place for all, where they are warm, so that of a queue only a PDU that is
//! cut is kept. What it does not do: answer others while a host does not read what it has asked for, and more of it than its socket holds;
//! or spare a call where several queues have something, as a target with a ring can.

use std::io::{ErrorKind, IoSlice, Read as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use anyhow::{Context, Error, Result};
use rustix::event::Timespec;

use super::super::bare::{PARTS_MAX, PIECE_LEN, is_end, write_all};
use super::super::light::Watch;
use super::super::sealed::{OfZeroes, Sealed};
use super::Together;
use super::commands::{Commands, Reply, arrange};
use super::joining::Agreed;

/// An I/O queue that has joined.
struct Queue {
    stream: TcpStream,
    agreed: Agreed,
    commands: Commands,
    /// What came of a PDU that was cut.
    kept: Vec<u8>,
    /// Empty where no digests are agreed to.
    trailer: OfZeroes,
}

impl Queue {
    fn new(stream: TcpStream, agreed: Agreed) -> Self {
        let commands = Commands::new(agreed.responds, agreed.digests);
        Self { stream, agreed, commands, kept: Vec::new(), trailer: OfZeroes::default() }
    }
}

/// Where queues are let in.
#[derive(Clone)]
pub(super) struct Door {
    queues: Sender<Result<Queue>>,
    is_knocked_at: Arc<AtomicBool>,
}

/// The same from within.
pub(super) struct Arrivals {
    queues: Receiver<Result<Queue>>,
    /// What the thread looks at before each read: a channel would cost more.
    is_knocked_at: Arc<AtomicBool>,
}

/// Both sides of a door.
pub(super) fn arrivals() -> (Door, Arrivals) {
    let (sender, receiver) = mpsc::channel();
    let is_knocked_at = Arc::new(AtomicBool::new(false));
    let door = Door { queues: sender, is_knocked_at: Arc::clone(&is_knocked_at) };
    (door, Arrivals { queues: receiver, is_knocked_at })
}

impl Door {
    /// Hands over a queue whose socket does not block.
    pub(super) fn let_in(&self, stream: TcpStream, agreed: Agreed) {
        self.send(Ok(Queue::new(stream, agreed)));
    }

    /// Has the answering end with this.
    pub(super) fn fail(&self, error: Error) {
        self.send(Err(error));
    }

    fn send(&self, queue: Result<Queue>) {
        // Where nobody answers any more, nobody is to be told.
        let _ = self.queues.send(queue);
        // After it: whoever sees this finds it.
        self.is_knocked_at.store(true, Ordering::Release);
    }
}

impl Arrivals {
    /// Whether some may be there.
    fn are_there(&self) -> bool {
        self.is_knocked_at.load(Ordering::Relaxed)
    }

    /// Waits for one.
    fn wait(&self) -> Result<Queue> {
        self.queues.recv().context("nobody accepts connections any more")?
    }

    /// Those that are there.
    fn take(&self, queues: &mut Vec<Queue>) -> Result<()> {
        // Before it looks: what comes later is found by the next look.
        if self.is_knocked_at.swap(false, Ordering::Acquire) {
            for queue in self.queues.try_iter() {
                queues.push(queue?);
            }
        }
        Ok(())
    }
}

/// What a read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Nothing,
    Something,
    /// The end of the connection.
    End,
}

/// What is used for one queue after the other.
pub(super) struct Answering {
    together: Together,
    /// What is sent as data.
    nothing: Vec<u8>,
    space: Vec<u8>,
    replies: Vec<Reply>,
    headers: Vec<Sealed>,
}

impl Answering {
    /// One that has no queue yet.
    pub(super) fn new(together: Together) -> Self {
        let (nothing, space) = (vec![0; PIECE_LEN], vec![0; PIECE_LEN]);
        let (replies, headers) = (Vec::new(), Vec::new());
        Self { together, nothing, space, replies, headers }
    }

    /// Answers a single queue until it ends.
    ///
    /// # Errors
    /// When it says what no host says.
    pub(super) fn one(&mut self, stream: TcpStream, agreed: Agreed) -> Result<()> {
        let mut queue = Queue::new(stream, agreed);
        while self.turn(&mut queue)? != Heard::End {}
        Ok(())
    }

    /// Answers all that arrive. Those that end are dropped.
    ///
    /// # Errors
    /// When one says what no host says, or joined like that.
    pub(super) fn all(&mut self, arrivals: &Arrivals) -> Result<()> {
        let mut queues = Vec::new();
        loop {
            match queues.as_mut_slice() {
                [] => queues.push(arrivals.wait()?),
                [queue] => {
                    if self.alone(queue, arrivals)? == Heard::End {
                        queues.clear();
                    }
                }
                _ => self.several(&mut queues, arrivals)?,
            }
            arrivals.take(&mut queues)?;
        }
    }

    /// Until it ends, or another one is there.
    fn alone(&mut self, queue: &mut Queue, arrivals: &Arrivals) -> Result<Heard> {
        loop {
            let heard = self.turn(queue)?;
            if heard == Heard::End || arrivals.are_there() {
                return Ok(heard);
            }
        }
    }

    /// Until one or more of them end, or others are there: then others are to be watched, which is rare.
    fn several(&mut self, queues: &mut Vec<Queue>, arrivals: &Arrivals) -> Result<()> {
        let watch = Watch::over(queues.iter().map(|queue| &queue.stream))?;
        let (mut ready, mut ended) = (Vec::new(), Vec::new());
        while ended.is_empty() && !arrivals.are_there() {
            watch.look(&Timespec::default(), &mut ready)?;
            for at in ready.drain(..) {
                let Some(queue) = queues.get_mut(at) else { continue };
                if self.turn(queue)? == Heard::End {
                    ended.push(at);
                }
            }
        }
        // The last one first: what takes the place of one is no other that has ended.
        ended.sort_unstable();
        for at in ended.into_iter().rev() {
            queues.swap_remove(at);
        }
        Ok(())
    }

    /// Reads once, and answers what came.
    fn turn(&mut self, queue: &mut Queue) -> Result<Heard> {
        match self.read_and_answer(queue) {
            Err(error) if is_end(&error) => Ok(Heard::End),
            result => result,
        }
    }

    fn read_and_answer(&mut self, queue: &mut Queue) -> Result<Heard> {
        let Self { together, nothing, space, replies, headers } = self;
        let Queue { stream, agreed: Agreed { responds, digests }, commands, kept, trailer } = queue;
        let filled = kept.len();
        let len = match stream.read(space.get_mut(filled..).unwrap_or_default()) {
            Ok(0) => return Ok(Heard::End),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Heard::Nothing),
            Err(error) => return Err(error.into()),
        };
        space.get_mut(..filled).unwrap_or_default().copy_from_slice(kept);
        let bytes = space.get(..filled + len).unwrap_or_default();
        let taken = commands.take(bytes, replies)?;
        kept.clear();
        kept.extend_from_slice(bytes.get(taken..).unwrap_or_default());
        arrange(replies, (responds.then_some(*together), *digests), headers);
        if digests.data {
            headers.iter().for_each(|header| trailer.take_note(nothing, header.data_len));
        }
        for headers in headers.chunks(PARTS_MAX / 3) {
            // A plain loop: of an iterator over them the compiler made a call a part, which was 1.3 % of the samples.
            let mut parts = Vec::with_capacity(headers.len() * 3);
            for header in headers {
                let data = nothing.get(..header.data_len).unwrap_or_default();
                for part in [header.bytes(), data, trailer.behind(header.data_len)] {
                    if !part.is_empty() {
                        parts.push(IoSlice::new(part));
                    }
                }
            }
            write_all(stream, &mut parts)?;
        }
        Ok(Heard::Something)
    }
}
