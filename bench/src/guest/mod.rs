//! The target beside the kernel's own, nvmet-tcp, with the kernel's initiator and fio. It takes a machine whose kernel has both, root,
//! and a namespace that is seen through two controllers: the guest of `hw-tests/vfio-test.sh`.
//!
//! ```text
//!                                        .--- controller A --- kernel driver --- nvmet-tcp ---.
//!   fio --- nvme-tcp --- TCP loopback ---+                      (or null_blk)                 +--- the same blocks
//!                                        '--- controller B --- fastice (VFIO)  ---------------'
//!                                                               (or its null device)
//! ```
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `guest/nvme/randread/qd32/iops` | a pinned file of the namespace, by our driver | nvmet-tcp on the namespace, by the kernel's, at that file's place |
//! | `guest/uring/randread/qd32/iops` | the same file, by the kernel's driver | as above |
//! | `guest/null/randread/qd32/iops` | a namespace that stores nothing | nvmet-tcp on null_blk |
//! | `guest/.../cpu` | microseconds that all processors were busy for a command: target, initiator and fio | as above |
//! | `guest/null/.../bare/iops`, `bare-sleeps` | the namespace that stores nothing | a responder that has no work |
//! | `guest/nvme/.../driver/iops` | the pinned file | our driver alone: what the device comes to |
//!
//! Sides ([`sides`]) take turns, each with a target and a connection of its own every round. What it does not do: make the filesystem and the file
//! (`bench/guest.sh`), or tell apart whom the kernel's time belongs to: its target and its initiator share workers.

mod fio;
mod host;
mod nvmet;
mod ours;
mod sides;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

pub use self::ours::serve;
use self::sides::Side;
use crate::report::{Bar, Measurement, Row};

/// What rows call the peer, without the kernel's version; the report names it so where it is absent.
pub const PEER: &str = "nvmet-tcp";
/// What must hold on the namespace.
pub(crate) const RATIO_MIN: f64 = 1.5;
/// Commands in flight.
const DEPTH: u16 = 32;
/// Of the devices that store nothing, in bytes.
const NULL_LEN: u64 = 256 << 20;
/// Before a measurement, with the load of it.
const WARM_UP: Duration = Duration::from_millis(500);

/// What is measured, and where everything runs.
#[derive(Clone, Debug)]
pub struct Plan {
    /// A file on the namespace, to be pinned and served.
    pub file: PathBuf,
    /// Where it begins on the disk, in one piece, in bytes.
    pub offset: u64,
    /// The kernel's disk of the namespace.
    pub disk: PathBuf,
    /// The PCI address of our controller of it.
    pub pci: String,
    /// Where our one core runs. The kernel's target runs where the kernel has it.
    pub core: usize,
    /// Where fio runs.
    pub fio_cpu: usize,
    /// I/O queues of the initiator: it works queue after queue on processor after processor.
    pub io_queues: u16,
    /// Whether our core always polls.
    pub is_polling: bool,
    /// Only cases whose names hold this.
    pub only: Option<String>,
    /// Rounds of each side.
    pub rounds: usize,
    /// How long a round is busy.
    pub time: Duration,
    /// See [`Row::machine`].
    pub machine: String,
    /// Told of each row.
    pub tell: fn(&str),
}

/// What is behind both targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    /// The namespace, ours by our own driver.
    Nvme,
    /// The namespace, ours by the kernel's driver.
    Uring,
    /// Nothing.
    Null,
}

impl Behind {
    const ALL: [Self; 3] = [Self::Nvme, Self::Uring, Self::Null];

    const fn name(self) -> &'static str {
        match self {
            Self::Nvme => "nvme",
            Self::Uring => "uring",
            Self::Null => "null",
        }
    }
}

/// What one round gave.
#[derive(Clone, Copy, Debug)]
struct Round {
    iops: f64,
    cpu_us: f64,
}

/// A target that listens, until it is dropped.
trait Listens {
    fn address(&self) -> SocketAddr;
    fn nqn(&self) -> &str;
}

impl Plan {
    /// All of it.
    ///
    /// # Errors
    /// When something does not work that should.
    pub fn run(&self, rows: &mut Vec<Row>) -> Result<()> {
        ensure!(self.rounds > 0 && !self.time.is_zero(), "there must be rounds, and time for them");
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let peer = format!("{PEER}, Linux {}", kernel.trim());
        let wanted =
            |behind: &Behind| self.only.as_ref().is_none_or(|part| behind.name().contains(part.as_str()));
        for behind in Behind::ALL.into_iter().filter(wanted) {
            let sides = Side::of(behind).iter().filter(|side| side.can(self.io_queues));
            let mut rounds: Vec<_> = sides.map(|side| (*side, Vec::new())).collect();
            for _ in 0..self.rounds {
                for (side, of_it) in &mut rounds {
                    of_it.push(self.round(behind, *side)?);
                }
                // Nobody is always the first.
                rounds.reverse();
            }
            rounds.sort_by_key(|(side, _)| *side != Side::Ours);
            let [(_, ours), others @ ..] = rounds.as_slice() else { continue };
            for (side, theirs) in others {
                let name = if *side == Side::Kernels { &peer } else { side.name() };
                self.sum_up(rows, (behind, *side), (name, &self.method(*side)), (ours, theirs))?;
            }
        }
        ensure!(!rows.is_empty(), "no case has a name like that");
        Ok(())
    }

    /// How many bytes are read from.
    fn len(&self, behind: Behind) -> Result<u64> {
        if behind == Behind::Null {
            return Ok(NULL_LEN);
        }
        let told = std::fs::metadata(&self.file);
        Ok(told.with_context(|| self.file.display().to_string())?.len())
    }

    /// What our target is told, without the place of its records.
    fn configuration(&self, behind: Behind) -> String {
        let poll = if self.is_polling { "always" } else { "adaptive" };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut text =
            format!("cores = [{}]\npoll = \"{poll}\"\n[[listener]]\naddress = \"{address}\"\n", self.core);
        if behind == Behind::Nvme {
            text.push_str(&format!("[[nvme]]\npci = {:?}\n", self.pci));
        }
        let namespace = match behind {
            Behind::Null => format!("null = \"{}MiB\"", NULL_LEN >> 20),
            Behind::Nvme | Behind::Uring => format!("file = {:?}\ndevice = \"{}\"", self.file, behind.name()),
        };
        text.push_str(&format!(
            "[[subsystem]]\nnqn = \"{}\"\nallow_any_host = true\n[[subsystem.namespace]]\nnsid = 1\n{namespace}\n",
            ours::NQN
        ));
        text
    }

    fn method(&self, side: Side) -> String {
        let poll = if self.is_polling { ", always polling" } else { ", polling while there is work" };
        format!(
            "fio (io_uring) on processor {}, nvme-tcp with {} I/O queue(s), our one core on processor {}{poll}, {}; TCP loopback in a \
             guest, emulated down to its processor; sides take turns",
            self.fio_cpu,
            self.io_queues,
            self.core,
            side.whereabouts()
        )
    }

    fn sum_up(
        &self,
        rows: &mut Vec<Row>,
        (behind, side): (Behind, Side),
        (peer, method): (&str, &str),
        (ours, theirs): (&[Round], &[Round]),
    ) -> Result<()> {
        type Number = fn(&Round) -> f64;
        let is_judged = behind == Behind::Nvme && side == Side::Kernels;
        let bar = is_judged.then_some(Bar::RatioAtLeast(RATIO_MIN));
        let iops: Number = |round| round.iops;
        let cpu_us: Number = |round| round.cpu_us;
        let numbers = [("iops", "IOPS", iops, bar), ("cpu", "us of all processors a command", cpu_us, None)];
        let wanted = if side.has_cpu() { 2 } else { 1 };
        for (label, unit, number, bar) in numbers.into_iter().take(wanted) {
            let [ours, theirs] = [ours, theirs].map(|rounds| rounds.iter().map(number).collect::<Vec<_>>());
            let name = format!("guest/{}/randread/qd{DEPTH}/{}{label}", behind.name(), side.place());
            let peer = Some((peer, theirs.as_slice()));
            let measured = Measurement { name, unit, ours: &ours, peer, bar, method };
            let row = Row::new(&measured, &self.machine);
            let row = row.with_context(|| format!("{} was not measured", measured.name))?;
            (self.tell)(&row.to_string());
            rows.push(row);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use fastice::config::Config;

    use super::*;

    fn plan() -> Plan {
        Plan {
            file: "/mnt/a file.img".into(),
            offset: 4096,
            disk: "/dev/nvme0n2".into(),
            pci: "0000:02:00.0".to_owned(),
            core: 0,
            fio_cpu: 0,
            io_queues: 1,
            is_polling: false,
            only: None,
            rounds: 2,
            time: Duration::from_secs(1),
            machine: "here".to_owned(),
            tell: |_| {},
        }
    }

    #[test]
    fn what_our_target_is_told_is_a_configuration() {
        for behind in Behind::ALL {
            let text = format!("state_dir = \"/tmp/x\"\n{}", plan().configuration(behind));
            let config = Config::parse(&text, "bench").unwrap_or_else(|error| panic!("{error}\n{text}"));
            assert_eq!(config.cores, [0]);
            assert_eq!(config.nvme.len(), usize::from(behind == Behind::Nvme), "{behind:?}");
        }
    }

    #[test]
    fn only_the_namespace_is_judged_and_by_the_ratio_of_neighbours() {
        let [ours, theirs] =
            [[30.0, 20.0], [15.0, 15.0]].map(|rates| rates.map(|iops| Round { iops, cpu_us: 1e6 / iops }));
        let mut rows = Vec::new();
        for behind in Behind::ALL {
            for side in &Side::of(behind)[1..] {
                plan().sum_up(&mut rows, (behind, *side), ("peer", "made up"), (&ours, &theirs)).unwrap();
            }
        }
        let barred: Vec<_> = rows.iter().filter(|row| row.bar.is_some()).collect();
        assert_eq!(barred.len(), 1, "{rows:?}");
        assert_eq!(barred[0].name, "guest/nvme/randread/qd32/iops");
        assert_eq!(barred[0].bar.as_deref(), Some("ratio >= 1.5"));
        assert_eq!(barred[0].met, Some(true), "(2 + 1.33) / 2 is more: {:?}", barred[0]);
    }

    #[test]
    fn without_rounds_nothing_is_begun() {
        let mut rows = Vec::new();
        assert!(Plan { rounds: 0, ..plan() }.run(&mut rows).is_err());
        assert!(Plan { only: Some("no such".to_owned()), ..plan() }.run(&mut rows).is_err());
    }
}
