//! What a pin of a file can hold off here: found out by trying, on a scratch file beside it.
//!
//! ```text
//!   FILE ----- outlook: can it be pinned, who is in the way, how often would it be watched
//!     |
//!   its directory --> scratch directory --> scratch file --> pin() with records in a temporary state directory
//!                                               ^
//!          another process (the program itself) |  open, truncate, unlink, rename, link, chmod, setxattr, FICLONE, ...
//!                                               v
//!                      refused by errno  |  waits: delayed  |  goes through: which detector recalls the pin, and when
//! ```
//!
//! Kernels and filesystems differ: `file_setattr(2)` is of Linux 6.17, reflink is a choice of mkfs. What cannot be tried,
//! for want of permission or because it would harm others (umount, kill, writes to the device), is told as it is known,
//! and marked as not probed. The scratch files, their flags and their records are gone afterwards, but for a `kill -9`.
//!
//! Guards of a whole filesystem (read-only, frozen) are tried on a filesystem of the same type, made for it on a loop device: what
//! is held off there until the pin ends waits in a process of its own, and goes on when the scratch file is let go.
//!
//! What it does not do: touch the file itself, which is only opened for reading; freeze or remount the filesystem of the file; swap
//! only where that is the guard that is asked about, and then it ends with the attempts.

mod attempt;
mod filesystem;
mod known;
mod operation;
mod probe;
mod scratch;

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub use attempt::{Attempted, FailedCall, attempt};
pub use operation::Operation;
use probe::Lab;

use super::accept::Violation;
use super::error::{ExtentError, Holder};
use super::facts::mount_options;
use super::guard::{Doubt, RecallReason};
use super::holders;
use super::mode::{GuardMode, obstacle};
use super::readers::LocalReaders;
use super::survey::{Survey, absolute, open_read, survey_file, to_extents};
use super::sys;
use super::watch::{WatchOptions, WatchPlan, cost_of};

const MARK: &str = "open-permission mark";
const SWAP: &str = "swap area";
const FROZEN: &str = "frozen filesystem";
const READ_ONLY: &str = "read-only filesystem";
const FLAG: &str = "immutable flag";
const LEASE_PROOF: &str = "write lease at the pin";
const LEASE: &str = "lease";
const STATX: &str = "statx, every 100 ms";
const SWAPS: &str = "/proc/swaps, at once";
const FREEZE: &str = "FIFREEZE, every 100 ms";
const MOUNTS: &str = "/proc/self/mountinfo, every 100 ms";
const MAP_WATCH: &str = "FIEMAP, at the watch interval";

/// What becomes of an operation on a pinned file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It fails.
    Refused,
    /// It goes through, as was asked for, and changes nothing of the map.
    Allowed,
    /// It waits until fastice has let go, and then goes through.
    Delayed,
    /// It goes through, and is noticed: then the export is fenced.
    Detected,
    /// It went through, and nothing noticed it for as long as was promised.
    Unnoticed,
    /// There is no such thing here.
    Impossible,
    /// No guard of a file can do anything about it.
    OutOfReach,
}

impl Verdict {
    /// The word for it, as in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Allowed => "allowed",
            Self::Delayed => "delayed",
            Self::Detected => "detected",
            Self::Unnoticed => "unnoticed",
            Self::Impossible => "impossible",
            Self::OutOfReach => "out-of-reach",
        }
    }
}

/// What is found, or known, of one operation.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Which.
    pub operation: Operation,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Whether it was tried here and now; else it is told as it is known.
    pub probed: bool,
    /// The call that failed, with its errno.
    pub failed: Option<FailedCall>,
    /// The guard that refuses it, or the detector that noticed it.
    pub by: Option<&'static str>,
    /// How long after its start it was noticed.
    pub noticed_after: Option<Duration>,
    /// More, for people; may be empty.
    pub text: String,
}

impl Finding {
    fn of_knowledge(operation: Operation, kind: (GuardMode, LocalReaders), reflink: Option<bool>) -> Self {
        let known = operation.known(kind);
        let here = match operation {
            Operation::CloneWithin => reflink != Some(false),
            Operation::SetFileAttr => sys::has_file_setattr(),
            _ => true,
        };
        let (verdict, by, text) = if here {
            (known.verdict, known.by, known.text.to_owned())
        } else {
            (Verdict::Impossible, None, String::new())
        };
        Self { operation, verdict, probed: false, failed: None, by, noticed_after: None, text }
    }
}

/// Whether another file can come to share the blocks of a pinned one, which would make the filesystem move them at the
/// next local write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SharedHole {
    /// The filesystem shares no blocks, or is read-only.
    None,
    /// Clones from the file are refused: by the open-permission mark, as the immutable flag allows them.
    Closed,
    /// A clone from the file went through.
    Open,
    /// It was not tried.
    Unknown,
}

/// What was found out about pins in one directory.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The guards that it was asked about.
    pub mode: GuardMode,
    /// Whether the filesystem shares blocks between files.
    pub reflink: Option<bool>,
    /// Of each operation.
    pub findings: Vec<Finding>,
    /// Why not everything was tried that could have been.
    pub not_probed: Option<String>,
}

impl Probe {
    /// Whether the hole of shared blocks is closed.
    #[must_use]
    pub fn shared_hole(&self) -> SharedHole {
        let clone = self.findings.iter().find(|finding| finding.operation == Operation::CloneFrom);
        match (self.reflink, clone) {
            // Nothing can be made there that could share anything.
            _ if self.mode == GuardMode::ReadOnlyMount => SharedHole::None,
            (Some(false), _) => SharedHole::None,
            (Some(true), Some(clone)) if clone.probed && clone.verdict == Verdict::Refused => {
                SharedHole::Closed
            }
            (Some(true), Some(clone)) if clone.probed => SharedHole::Open,
            _ => SharedHole::Unknown,
        }
    }
}

/// Makes the command that runs [`attempt`] with an operation on a path in another process, and prints what became of it as
/// JSON.
pub type Attempts<'a> = dyn Fn(Operation, &Path) -> Command + 'a;

/// Finds out what a pin of this kind does on the filesystem of the file at `path`, on a scratch file beside it, or on a filesystem of
/// the same type where the guard is one of the whole filesystem. `stop` is asked between two attempts. What cannot be tried is told
/// as it is known.
///
/// # Errors
/// [`ExtentError::Io`] when there is no file at the path.
pub fn probe(
    path: &Path,
    kind: (GuardMode, LocalReaders),
    attempts: &Attempts<'_>,
    stop: &dyn Fn() -> bool,
) -> Result<Probe, ExtentError> {
    let path = absolute(path)?;
    let directory = path.parent().unwrap_or(&path);
    let mut reflink = None;
    let (mut lab, mut not_probed) = match Lab::new(directory, kind, attempts, &mut reflink) {
        Ok(lab) => (Some(lab), None),
        Err(why) => (None, Some(why)),
    };
    let mut findings = Vec::new();
    for operation in Operation::all().filter(|operation| operation.is_of(kind.0)) {
        let known = Finding::of_knowledge(operation, kind, reflink);
        if stop() {
            (lab, not_probed) = (None, Some("it was interrupted".to_owned()));
        }
        let tried = match &mut lab {
            Some(lab) => lab.probe(operation, reflink),
            None => Ok(None),
        };
        findings.push(match tried {
            Ok(Some(finding)) => finding,
            Ok(None) => known,
            Err(why) => {
                not_probed.get_or_insert(why);
                known
            }
        });
    }
    Ok(Probe { mode: kind.0, reflink, findings, not_probed })
}

/// What a look at a file says of pinning it.
#[derive(Clone, Debug)]
pub struct Outlook {
    /// What the file is, and every reason not to pin it.
    pub survey: Survey,
    /// Who has it open, as far as can be seen.
    pub holders: Vec<Holder>,
    /// The options that its filesystem is mounted with.
    pub mount_options: Option<String>,
    /// Why it cannot have the guards that are asked about, and the remedy.
    pub refused: Option<(String, String)>,
    /// How it would be watched if it were the only one, by the default options; `None` when it can have no map.
    pub watch: Option<WatchPlan>,
}

/// Looks at the file at `path`, which is opened for reading and not changed. `state` is where its record would be.
///
/// # Errors
/// [`ExtentError::Io`] when it cannot be opened, as when it is guarded; [`ExtentError::NotAccepted`] when it is no file.
pub fn outlook(path: &Path, kind: (GuardMode, LocalReaders), state: &Path) -> Result<Outlook, ExtentError> {
    let path = absolute(path)?;
    let file = open_read(&path)?;
    refuse_irregular(&file, &path)?;
    let survey = survey_file(&file, &path)?;
    let facts = &survey.facts;
    let holders = holders::find(facts.inode, facts.device, facts.swap);
    let mount_options =
        mount_options(facts.device).map_err(|error| ExtentError::io("find the mount of", &path, error))?;
    let watch = match facts.identity() {
        Ok(identity) => {
            let extents = to_extents(&survey.records, identity.disk.partition_start, identity.size);
            Some(WatchOptions::default().alone(cost_of(&file, &path, &identity, &extents)?))
        }
        Err(_) => None,
    };
    let refused = obstacle(kind, &file, facts, Some(state), false);
    let refused = refused.map(|refused| (refused.to_string(), refused.remedy()));
    Ok(Outlook { refused, survey, holders, mount_options, watch })
}

/// A directory has no map that could be told of.
fn refuse_irregular(file: &File, path: &Path) -> Result<(), ExtentError> {
    let meta = file.metadata().map_err(|error| ExtentError::io("stat", path, error))?;
    if meta.is_file() {
        return Ok(());
    }
    let what = if meta.is_dir() { "a directory" } else { "a block device" };
    let (path, first) = (path.to_path_buf(), Box::new(Violation::NotRegular { what }));
    Err(ExtentError::NotAccepted { path, first, count: 1 })
}

/// What noticed it.
const fn detector(reason: RecallReason) -> &'static str {
    match reason {
        RecallReason::LeaseBreak => LEASE,
        RecallReason::GuardFailed => "guard thread",
        RecallReason::Doubt(Doubt::MapMoved) => MAP_WATCH,
        RecallReason::Doubt(
            Doubt::Resized | Doubt::FlagCleared | Doubt::Touched | Doubt::OtherGeneration | Doubt::LeaseLost,
        ) => STATX,
        RecallReason::Doubt(Doubt::SwapOff) => SWAPS,
        RecallReason::Doubt(Doubt::Writable) => MOUNTS,
        RecallReason::Doubt(Doubt::Thawed) => FREEZE,
        RecallReason::Doubt(Doubt::DiskChanged | Doubt::NotReadable | Doubt::WatchLate) => "watch",
    }
}
