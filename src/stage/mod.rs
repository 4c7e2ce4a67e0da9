//! Where the time of a command goes: the stages it passes, as histograms per export, host and core, always on; and the last
//! commands of each core, one by one (`trace`).
//!
//! ```text
//!   arrived    begun      parsed     looked up  handed     done       sent
//!      |--receive--|--parse---|--lookup--|--queue---|--device--|---send---|
//!      '------------------------------- total ----------------------------'
//! ```
//!
//! | stage | from, to |
//! |---|---|
//! | receive | the capsule was received; all its data is there, it has a buffer, and its connection has its turn |
//! | parse | until all commands that are taken up in that turn of the core are validated |
//! | lookup | until all of them are looked up in their maps and given to their queues; of one or two, and without a [large](crate::extent::FrozenMap::is_large) map, it is in parse |
//! | queue | until the device was told: by a doorbell, or by the system call that submits; waiting for room included |
//! | device | until a turn of the core found it complete |
//! | send | until the kernel took the last byte of the answer |
//!
//! **Resolution.** Commands are taken up, looked up, completed and sent in batches, and a batch has one stamp for each
//! boundary: a command's stage is what it waited, its neighbours' share included. Most stamps are the times at which a turn
//! of the core looks at the clock anyway, so whatever happens within one turn on one side of its system call is 0. What a
//! capsule waited in the kernel before the core received it is in no stage, also where the core left its socket alone on purpose.
//!
//! **Memory.** A connection finds the [`Cell`] of its host and an export by the export's slot. There are at most
//! [`CELLS_MAX`] cells on a core; those of hosts that are gone are used again, and what finds none counts in the cell
//! of the core for all others.
//!
//! Not here: where stamps are taken (`reactor`, `tcp`), who shows what they add up to (`control`).

mod book;
mod clock;
mod histogram;
mod trace;

use std::sync::Arc;

pub use self::book::{Book, CELLS_MAX, Key, Row};
pub use self::clock::Stamp;
pub use self::histogram::{BUCKETS, Counts, Histogram, bucket_end_ns};
pub use self::trace::{GroupNumber, TRACED_MAX, Trace, TraceCopy, Traced, TracedCommand, Who};

/// A stage of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From the capsule to its data, a buffer, and a turn.
    Receive,
    /// Parsing and validating.
    Parse,
    /// From bytes of the namespace to blocks of the device.
    Lookup,
    /// On the way to the device.
    Queue,
    /// On the device.
    Device,
    /// From the device to the host's socket.
    Send,
}

impl Stage {
    /// All, in their order.
    pub const ALL: [Self; 6] =
        [Self::Receive, Self::Parse, Self::Lookup, Self::Queue, Self::Device, Self::Send];

    /// A stable word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Receive => "receive",
            Self::Parse => "parse",
            Self::Lookup => "lookup",
            Self::Queue => "queue",
            Self::Device => "device",
            Self::Send => "send",
        }
    }
}

/// When a command passed the boundaries between its stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamps {
    /// Its capsule was received.
    pub arrived: Stamp,
    /// It was taken up, with all its data.
    pub begun: Stamp,
    /// It and its neighbours were validated.
    pub parsed: Stamp,
    /// Their blocks were looked up.
    pub looked_up: Stamp,
    /// The device was told of the last of it.
    pub handed: Stamp,
    /// It was found complete.
    pub done: Stamp,
}

impl Stamps {
    /// Of a command that passed none.
    pub const NONE: Self = Self {
        arrived: Stamp::NONE,
        begun: Stamp::NONE,
        parsed: Stamp::NONE,
        looked_up: Stamp::NONE,
        handed: Stamp::NONE,
        done: Stamp::NONE,
    };

    /// How long each stage of [`Stage::ALL`] took, in nanoseconds, when the answer was sent at `sent`.
    #[must_use]
    pub const fn stages_ns(&self, sent: Stamp) -> [u64; Stage::ALL.len()] {
        [
            self.begun.ns_since(self.arrived),
            self.parsed.ns_since(self.begun),
            self.looked_up.ns_since(self.parsed),
            self.handed.ns_since(self.looked_up),
            self.done.ns_since(self.handed),
            sent.ns_since(self.done),
        ]
    }
}

/// The histograms of one host's commands to one export on one core. Written by that core only.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Cell {
    stages: [Histogram; Stage::ALL.len()],
    total: Histogram,
}

impl Cell {
    /// Counts `count` commands that share all their stamps. Only the core's own thread may: concurrent counts get lost.
    pub fn record(&self, stamps: &Stamps, sent: Stamp, count: u64) {
        for (stage, ns) in self.stages.iter().zip(stamps.stages_ns(sent)) {
            stage.record(ns, count);
        }
        self.total.record(sent.ns_since(stamps.arrived), count);
    }

    /// Adds what another cell counted.
    fn absorb(&self, other: &Self) {
        for (mine, theirs) in self.stages.iter().zip(&other.stages) {
            mine.absorb(theirs);
        }
        self.total.absorb(&other.total);
    }

    /// What was counted so far.
    #[must_use]
    pub fn times(&self) -> Times {
        Times { stages: std::array::from_fn(|at| self.stages[at].counts()), total: self.total.counts() }
    }
}

/// What a cell counted, or several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Of each stage of [`Stage::ALL`].
    pub stages: [Counts; Stage::ALL.len()],
    /// From the capsule to the sent answer.
    pub total: Counts,
}

impl Times {
    /// Adds what others counted.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.stages.iter_mut().zip(&other.stages) {
            mine.add(theirs);
        }
        self.total.add(&other.total);
    }
}

/// A core's side: the stamps of its turn, and where its cells come from.
#[derive(Debug)]
pub struct CoreStages {
    book: Arc<Book>,
    /// Its number, in the order in which cores came.
    core: usize,
    others: Arc<Cell>,
    /// When this turn began.
    now: Stamp,
}

impl CoreStages {
    /// Of one more core.
    #[must_use]
    pub fn new(book: Arc<Book>) -> Self {
        let (core, others) = book.new_core();
        Self { book, core, others, now: Stamp::now() }
    }

    /// A turn begins.
    #[inline]
    pub const fn turn(&mut self, now: Stamp) {
        self.now = now;
    }

    /// When this turn began.
    #[must_use]
    #[inline]
    pub const fn now(&self) -> Stamp {
        self.now
    }

    /// Where commands of a host to a namespace are counted. Takes a lock: to be asked once for each by a connection.
    #[cold]
    #[must_use]
    pub fn cell(&self, host: &str, subsystem: &str, nsid: u32) -> Arc<Cell> {
        self.book.cell(self.core, &self.others, Key::new(host, subsystem, nsid))
    }

    /// Where commands are counted whose host or namespace nobody can name.
    #[must_use]
    pub fn others(&self) -> Arc<Cell> {
        Arc::clone(&self.others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stages_of_a_command_add_up_to_its_total() {
        let at = |ns: u64| Stamp::from_ns(1_000 + ns);
        let stamps = Stamps {
            arrived: at(0),
            begun: at(100),
            parsed: at(300),
            looked_up: at(600),
            handed: at(1_000),
            done: at(91_000),
        };
        let stages = stamps.stages_ns(at(96_000));
        assert_eq!(stages, [100, 200, 300, 400, 90_000, 5_000]);
        let cell = Cell::default();
        cell.record(&stamps, at(96_000), 3);
        let times = cell.times();
        assert_eq!(times.total.sum_ns(), 3 * 96_000);
        assert_eq!(times.stages.iter().map(Counts::sum_ns).sum::<u64>(), times.total.sum_ns());
        assert!(times.stages.iter().chain([&times.total]).all(|counts| counts.count() == 3));
        let mut twice = times.clone();
        twice.add(&times);
        assert_eq!(twice.total.count(), 6);
    }

    #[test]
    fn stages_have_words_of_their_own() {
        let words: std::collections::BTreeSet<_> = Stage::ALL.iter().map(|stage| stage.word()).collect();
        assert_eq!(words.len(), Stage::ALL.len());
    }
}
