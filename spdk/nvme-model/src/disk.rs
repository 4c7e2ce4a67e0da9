//! Reads, writes and flushes that wait for a disk, on threads of their own: so many at a time as a disk likes.
//!
//! ```text
//!   controller --- Task: data of a write, room for that of a read ---> worker --- pread, pwrite, fdatasync
//!              <-- Ended: the same, and how it went ----------------- -'          then wakes whoever steps the model
//! ```
//!
//! Without them ([`crate::ControllerOptions::disk_threads`] is 0) every command is executed when it is fetched, so that a
//! test is the same in each run. With them commands end in any order, as on a real controller. A reset of any kind waits
//! until the last of them is back: nothing is written after it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};

use nvme_spec::{Status, SubmissionQueueEntry};

use crate::namespace::Namespace;
use crate::store::Bounce;

/// What is to be done with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    /// With whether it has to be durable.
    Write(bool),
    Flush,
}

/// A command on its way to the disk.
pub(crate) struct Task {
    pub(crate) sqid: u16,
    pub(crate) sqe: SubmissionQueueEntry,
    pub(crate) namespace: Arc<Namespace>,
    pub(crate) work: Work,
    pub(crate) lba: u64,
    pub(crate) data: Bounce,
}

/// A command that is back from it.
pub(crate) struct Ended {
    pub(crate) sqid: u16,
    pub(crate) sqe: SubmissionQueueEntry,
    pub(crate) work: Work,
    pub(crate) data: Bounce,
    pub(crate) result: Result<(), Status>,
}

impl Task {
    fn run(mut self) -> Ended {
        let Self { namespace, work, lba, data, .. } = &mut self;
        let result = match *work {
            Work::Read => namespace.read(*lba, data).map_err(|_| Status::UNRECOVERED_READ_ERROR),
            Work::Write(durable) => namespace
                .write(*lba, data)
                .and_then(|()| if durable { namespace.flush() } else { Ok(()) })
                .map_err(|_| Status::WRITE_FAULT),
            Work::Flush => namespace.flush().map_err(|_| Status::WRITE_FAULT),
        };
        let Self { sqid, sqe, work, data, .. } = self;
        Ended { sqid, sqe, work, data, result }
    }
}

/// What the workers share.
#[derive(Default)]
struct Desk {
    tasks: Mutex<Tasks>,
    filled: Condvar,
    /// Whoever steps the model, to be woken when a command is back.
    sleeper: Mutex<Option<Thread>>,
}

#[derive(Default)]
struct Tasks {
    waiting: VecDeque<Task>,
    closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Desk {
    fn work(&self, ended: &Sender<Ended>) {
        loop {
            let mut tasks = lock(&self.tasks);
            let task = loop {
                if let Some(task) = tasks.waiting.pop_front() {
                    break task;
                }
                if tasks.closed {
                    return;
                }
                tasks = self.filled.wait(tasks).unwrap_or_else(PoisonError::into_inner);
            };
            drop(tasks);
            // The controller is there as long as its workers are.
            let _ = ended.send(task.run());
            if let Some(sleeper) = &*lock(&self.sleeper) {
                sleeper.unpark();
            }
        }
    }
}

/// The threads, and what they have.
pub(crate) struct Disk {
    desk: Arc<Desk>,
    ended: Receiver<Ended>,
    workers: Vec<JoinHandle<()>>,
    /// Commands at the disk.
    under_way: Vec<(u16, SubmissionQueueEntry)>,
    /// Memory for the next ones.
    spare: Vec<Bounce>,
}

impl Disk {
    pub(crate) fn start(threads: u16) -> io::Result<Self> {
        let desk = Arc::<Desk>::default();
        let (send, ended) = channel();
        let mut disk = Self { desk, ended, workers: Vec::new(), under_way: Vec::new(), spare: Vec::new() };
        for number in 0..threads {
            let (desk, send) = (Arc::clone(&disk.desk), send.clone());
            let name = format!("nvme-disk-{number}");
            disk.workers.push(std::thread::Builder::new().name(name).spawn(move || desk.work(&send))?);
        }
        Ok(disk)
    }

    /// Whom to wake from now on when a command is back.
    pub(crate) fn set_sleeper(&self, sleeper: Option<Thread>) {
        *lock(&self.desk.sleeper) = sleeper;
    }

    /// Memory of a length, with nothing certain in it.
    pub(crate) fn memory(&mut self, len: usize) -> Bounce {
        let mut memory = self.spare.pop().unwrap_or_default();
        memory.resize(len);
        memory
    }

    pub(crate) fn take_back(&mut self, memory: Bounce) {
        self.spare.push(memory);
    }

    pub(crate) fn send(&mut self, task: Task) {
        self.under_way.push((task.sqid, task.sqe));
        lock(&self.desk.tasks).waiting.push_back(task);
        self.desk.filled.notify_one();
    }

    /// The next command that is back.
    pub(crate) fn next_ended(&mut self) -> Option<Ended> {
        let ended = self.ended.try_recv().ok()?;
        self.forget(&ended);
        Some(ended)
    }

    /// The next command that is back, waited for; `None` when none is at the disk.
    pub(crate) fn await_ended(&mut self) -> Option<Ended> {
        if self.under_way.is_empty() {
            return None;
        }
        let ended = self.ended.recv().ok()?;
        self.forget(&ended);
        Some(ended)
    }

    /// Waits until all are back, and throws away what they bring. As long as the kernel takes: nothing else could say that
    /// nothing is written any more.
    pub(crate) fn drain(&mut self) {
        while let Some(ended) = self.await_ended() {
            self.spare.push(ended.data);
        }
    }

    fn forget(&mut self, ended: &Ended) {
        let is_it =
            |(sqid, sqe): &(u16, SubmissionQueueEntry)| *sqid == ended.sqid && sqe.cid == ended.sqe.cid;
        if let Some(at) = self.under_way.iter().position(is_it) {
            self.under_way.swap_remove(at);
        }
    }

    /// The commands at the disk.
    pub(crate) fn under_way(&self) -> impl Iterator<Item = SubmissionQueueEntry> {
        self.under_way.iter().map(|(_, sqe)| *sqe)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.drain();
        lock(&self.desk.tasks).closed = true;
        self.desk.filled.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("workers", &self.workers.len())
            .field("under_way", &self.under_way.len())
            .finish_non_exhaustive()
    }
}
