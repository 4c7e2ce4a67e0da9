//! Who takes turns in the guest: ours, the kernel's target, and what neither can get beyond.
//!
//! ```text
//!   fio --- nvme-tcp --- TCP loopback --- a responder that has no work     what initiator and network come to
//!   the driver alone, as the core that serves would call it ---------- the same blocks     what the device comes to
//! ```
//!
//! The responder is that of `src/target/front/`, once polling and once asleep until commands come: it shares a processor with the
//! initiator, and no rule tells which of both is quicker there. The driver alone reads anywhere in the namespace, also where nothing was
//! ever written, which costs the emulated device no more than a written block, and rather less.

use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::thread::sched_setaffinity;

use super::{Behind, Listens, PEER, Plan, Round, fio, host, nvmet, ours};
use crate::chosen::{Chosen, Outside};
use crate::load::Buffers;
use crate::profiles::windows::OURS;
use crate::run;
use crate::server::{both_ends, stay_on};
use crate::target::{NQN, Served, TargetProcess};

/// What one round is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// fastice.
    Ours,
    /// The kernel's target.
    Kernels,
    /// The bare responder, which polls, or sleeps until commands come.
    Responder {
        /// Whether it sleeps.
        sleeps: bool,
    },
    /// Our driver, and no target.
    Driver,
}

impl Side {
    /// All that is measured with this behind it; ours is the first.
    pub(super) const fn of(behind: Behind) -> &'static [Self] {
        match behind {
            Behind::Nvme => &[Self::Ours, Self::Kernels, Self::Driver],
            Behind::Uring => &[Self::Ours, Self::Kernels],
            Behind::Null => &[
                Self::Ours,
                Self::Kernels,
                Self::Responder { sleeps: false },
                Self::Responder { sleeps: true },
            ],
        }
    }

    /// In names of rows that set ours beside it, before what was measured.
    pub(super) const fn place(self) -> &'static str {
        match self {
            Self::Ours | Self::Kernels => "",
            Self::Responder { sleeps: false } => "bare/",
            Self::Responder { sleeps: true } => "bare-sleeps/",
            Self::Driver => "driver/",
        }
    }

    /// What it is called, without its version.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ours => OURS,
            Self::Kernels => PEER,
            Self::Responder { sleeps: false } => "a bare responder",
            Self::Responder { sleeps: true } => "a bare responder that sleeps",
            Self::Driver => "our driver, and no target",
        }
    }

    /// Where it runs, for the method of its rows.
    pub(super) const fn whereabouts(self) -> &'static str {
        match self {
            Self::Ours | Self::Kernels => "nvmet-tcp where the kernel has it: beside the initiator's queue",
            Self::Responder { .. } => "the responder on the first processor, with the same initiator and fio",
            Self::Driver => {
                "the driver in one thread there, anywhere in the namespace, with neither network nor fio"
            }
        }
    }

    /// Whether it can be measured with so many I/O queues: the responder answers one.
    pub(super) const fn can(self, io_queues: u16) -> bool {
        io_queues == 1 || !matches!(self, Self::Responder { .. })
    }

    /// Whether processor time a command is asked of it as well.
    pub(super) const fn has_cpu(self) -> bool {
        !matches!(self, Self::Driver)
    }
}

impl Listens for TargetProcess {
    fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    fn nqn(&self) -> &str {
        NQN
    }
}

impl Plan {
    /// One round of one side.
    pub(super) fn round(&self, behind: Behind, side: Side) -> Result<Round> {
        let whole = (0, self.len(behind)?);
        let (target, part): (Box<dyn Listens>, _) = match (side, behind) {
            (Side::Driver, _) => return self.driver_alone(),
            (Side::Ours, _) => (Box::new(ours::Ours::start(&self.configuration(behind))?), whole),
            (Side::Kernels, Behind::Null) => (Box::new(nvmet::Nvmet::on_null()?), whole),
            (Side::Kernels, _) => (Box::new(nvmet::Nvmet::on(&self.disk)?), (self.offset, whole.1)),
            (Side::Responder { sleeps }, _) => {
                let served = if sleeps { Served::FrontSleeps } else { Served::FrontOne };
                (Box::new(TargetProcess::start(served, None)?), whole)
            }
        };
        let host = host::Connected::to(target.address(), target.nqn(), self.io_queues)?;
        let (disk, cpu) = (host.disk(), self.fio_cpu);
        let job = fio::Job { side: side.name(), disk, part, depth: super::DEPTH, cpu, time: self.time };
        let round = job.run().with_context(|| format!("fio beside {} on {}", side.name(), behind.name()))?;
        self.told(behind, side, round)
    }

    /// The driver in this thread, on the processor of our core.
    fn driver_alone(&self) -> Result<Round> {
        let nsid = nsid_of(Path::new("/sys/class/block"), &self.disk)?;
        let device: Chosen = format!("vfio:{}", self.pci).parse()?;
        let (allowed, _) = both_ends()?;
        stay_on(self.core)?;
        let opened = device.open_outside(nsid);
        let read =
            |mut opened: Outside| run::ours(&mut opened.device, super::DEPTH, Buffers::Pooled, self.time);
        let round = opened.and_then(read);
        sched_setaffinity(None, &allowed)?;
        let round = round.context("the driver alone")?;
        self.told(Behind::Nvme, Side::Driver, Round { iops: 1e9 / round.ns, cpu_us: f64::NAN })
    }

    fn told(&self, behind: Behind, side: Side, round: Round) -> Result<Round> {
        let cpu = if side.has_cpu() { format!(", {:.1} us", round.cpu_us) } else { String::new() };
        (self.tell)(&format!("{} {}: {:.0} IOPS{cpu}", behind.name(), side.name(), round.iops));
        Ok(round)
    }
}

/// The namespace that a disk of the kernel's is, in its controller.
fn nsid_of(class: &Path, disk: &Path) -> Result<u32> {
    let path = class.join(disk.file_name().context("the disk has no name")?).join("nsid");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    text.trim().parse().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_the_first_and_each_other_has_a_place_of_its_own() {
        for behind in Behind::ALL {
            let [first, others @ ..] = Side::of(behind) else { panic!("{behind:?} has nobody") };
            assert_eq!(*first, Side::Ours);
            let places: std::collections::HashSet<_> = others.iter().map(|side| side.place()).collect();
            assert_eq!(places.len(), others.len(), "{behind:?}");
            assert!(others.contains(&Side::Kernels));
        }
    }

    #[test]
    fn a_disk_tells_which_namespace_it_is() {
        let class = tempfile::tempdir().unwrap();
        std::fs::create_dir(class.path().join("nvme0n2")).unwrap();
        assert!(nsid_of(class.path(), Path::new("/dev/nvme0n2")).is_err());
        std::fs::write(class.path().join("nvme0n2/nsid"), "2\n").unwrap();
        assert_eq!(nsid_of(class.path(), Path::new("/dev/nvme0n2")).unwrap(), 2);
    }
}
