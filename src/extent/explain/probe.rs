//! The scratch file, its pin, and the attempts on it.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::operation::{Attempted, FailedCall, Operation, clone_from};
use super::scratch::Scratch;
use super::{Attempts, Finding, Verdict, detector, lease_break_time};
use crate::chain::Chain;
use crate::extent::error::ExtentError;
use crate::extent::guard::{Incident, RecallReason, RecallWatch, Warden};
use crate::extent::mode::GuardMode;
use crate::extent::pin::{PinOptions, pin};
use crate::extent::pinned::PinnedFile;
use crate::extent::progress::NoProgress;
use crate::extent::state::StateDir;
use crate::extent::undo::change_flag;
use crate::extent::watch::WatchOptions;

/// How long an attempt may take before it is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Whoever waits for a broken lease so long does wait.
const WAIT_SHOWN: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(2);

/// Why something could not be tried.
type Why = String;

/// A place for scratch files on the filesystem that is asked about.
pub(super) struct Lab<'a> {
    attempts: &'a Attempts<'a>,
    mode: GuardMode,
    warden: Arc<Warden>,
    /// The file that attempts are made on, until one goes through.
    pinned: Option<PinnedFile>,
    files: u32,
    state: StateDir,
    /// Where `state` is.
    _records: Scratch,
    scratch: Scratch,
}

impl<'a> Lab<'a> {
    /// Makes one in `directory`, and finds out whether there are shared blocks, which needs no privilege.
    pub(super) fn new(
        directory: &Path,
        mode: GuardMode,
        attempts: &'a Attempts<'a>,
        reflink: &mut Option<bool>,
    ) -> Result<Self, Why> {
        let scratch = Scratch::in_directory(directory, ".fastice-explain-").map_err(why)?;
        *reflink = shares_blocks(&scratch)?;
        let records = Scratch::in_directory(&std::env::temp_dir(), "fastice-explain-").map_err(why)?;
        let state = StateDir::open(records.path()).map_err(why)?;
        let warden = Warden::start(WatchOptions::default())
            .map_err(|error| format!("the guards need root (CAP_SYS_ADMIN for fanotify): {error}"))?;
        let mut lab =
            Self { attempts, mode, warden, pinned: None, files: 0, state, _records: records, scratch };
        // Whatever is in the way of a pin here is so for all attempts.
        lab.pin()?;
        Ok(lab)
    }

    /// Tries an operation; `None` when it is none to be tried here.
    pub(super) fn probe(
        &mut self,
        operation: Operation,
        reflink: Option<bool>,
    ) -> Result<Option<Finding>, Why> {
        match operation {
            _ if operation.is_tried_by_path() => self.by_path(operation).map(Some),
            Operation::TruncateUnflagged => {
                let pinned = self.pin()?;
                change_flag(pinned.file(), false).map_err(|error| format!("clearing the flag: {error}"))?;
                self.by_path(operation).map(Some)
            }
            Operation::OpenedBefore => self.opened_before().map(Some),
            Operation::CloneWithin if reflink == Some(true) => self.clone_within().map(Some),
            _ => Ok(None),
        }
    }

    /// The pinned scratch file; a new one when there is none.
    fn pin(&mut self) -> Result<&PinnedFile, Why> {
        let pinned = match self.pinned.take() {
            Some(pinned) => pinned,
            None => {
                let path = self.file()?;
                self.pin_file(&path).map_err(why)?
            }
        };
        Ok(self.pinned.insert(pinned))
    }

    fn file(&mut self) -> Result<PathBuf, Why> {
        self.files += 1;
        self.scratch.file(&format!("file-{}", self.files)).map_err(why)
    }

    fn pin_file(&self, path: &Path) -> Result<PinnedFile, ExtentError> {
        // Scratch files hold nothing that a guard may not destroy.
        let (warden, guard) = (Some(Arc::clone(&self.warden)), Some(self.mode));
        let options = PinOptions { warden, guard, prepare: true, ..PinOptions::default() };
        pin(path, &options, &self.state, &mut NoProgress)
    }

    /// Unpins and removes the scratch file.
    fn let_go(&mut self) {
        if let Some(Err(error)) = self.pinned.take().map(PinnedFile::release) {
            // The flag goes with the scratch directory all the same.
            tracing::warn!(error = %Chain(&error), "cannot release a scratch file");
        }
        if let Err(error) = self.scratch.clear() {
            tracing::warn!(%error, "cannot remove a scratch file yet");
        }
    }

    /// Another process tries it on the path of the pinned file.
    fn by_path(&mut self, operation: Operation) -> Result<Finding, Why> {
        let pinned = self.pin()?;
        let recall = pinned.recall().ok_or("the scratch file lost its guard")?;
        let bound = pinned.watched().map_or(PATIENCE, |report| report.bound);
        let path = pinned.path().to_path_buf();
        let begun = Instant::now();
        let mut attempt = Attempt::start(self.attempts, operation, &path)?;
        match attempt.watch(Some(&recall))? {
            Outcome::Ended(Attempted { failed: Some(failed) }) => {
                if recall.incident().is_some() || operation == Operation::TruncateUnflagged {
                    self.let_go();
                }
                Ok(self.refused(operation, failed))
            }
            Outcome::Ended(Attempted { failed: None }) => {
                let noticed = await_recall(&recall, bound);
                self.let_go();
                Ok(self.went_through(operation, begun, noticed, bound))
            }
            Outcome::Waits(incident) => {
                self.let_go();
                let Outcome::Ended(Attempted { failed }) = attempt.watch(None)? else {
                    return Err("an attempt waits for nobody".to_owned());
                };
                Ok(self.delayed(operation, begun, &incident, failed))
            }
        }
    }

    /// A pin while there is a descriptor open for writing.
    fn opened_before(&mut self) -> Result<Finding, Why> {
        self.let_go();
        let path = self.file()?;
        let writer = std::fs::File::options().write(true).open(&path).map_err(|error| error.to_string())?;
        let pinned = self.pin_file(&path);
        if self.mode == GuardMode::SwapFile && pinned.is_ok() {
            self.pinned = pinned.ok();
            let finding = match writer.set_len(0) {
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or_default();
                    self.refused(Operation::OpenedBefore, FailedCall { call: "ftruncate".to_owned(), errno })
                }
                Ok(()) => finding(Operation::OpenedBefore, Verdict::Unnoticed),
            };
            drop(writer);
            self.let_go();
            return Ok(finding);
        }
        drop(writer);
        let mut finding =
            Finding { probed: true, ..Finding::of_knowledge(Operation::OpenedBefore, self.mode, None) };
        match pinned {
            Err(ExtentError::InUse { .. }) => {}
            Err(error) => return Err(why(error)),
            Ok(pinned) => {
                self.pinned = Some(pinned);
                finding = Finding { verdict: Verdict::Unnoticed, by: None, text: String::new(), ..finding };
            }
        }
        self.let_go();
        Ok(finding)
    }

    /// A clone from the file by a descriptor of this process, which the mark lets pass.
    fn clone_within(&mut self) -> Result<Finding, Why> {
        let operation = Operation::CloneWithin;
        let target = self.scratch.path().join("clone");
        let pinned = self.pin()?;
        let recall = pinned.recall().ok_or("the scratch file lost its guard")?;
        let bound = pinned.watched().map_or(PATIENCE, |report| report.bound);
        let begun = Instant::now();
        let cloned = clone_from(pinned.file(), &target);
        let finding = match cloned {
            Err((call, error)) => {
                let errno = error.raw_os_error().unwrap_or_default();
                self.refused(operation, FailedCall { call: call.to_owned(), errno })
            }
            Ok(()) => self.went_through(operation, begun, await_recall(&recall, bound), bound),
        };
        self.let_go();
        Ok(finding)
    }

    /// By which guard is not told by the kernel: it is the one that is known to, when the error is the one that it gives.
    fn refused(&self, operation: Operation, failed: FailedCall) -> Finding {
        let known = operation.known(self.mode);
        if matches!(failed.errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) {
            return Finding { failed: Some(failed), ..finding(operation, Verdict::Impossible) };
        }
        let expected =
            matches!(failed.errno, libc::EPERM | libc::ETXTBSY) && known.verdict == Verdict::Refused;
        let by = known.by.filter(|_| expected);
        let text = if expected { known.text.to_owned() } else { String::new() };
        Finding { failed: Some(failed), by, text, ..finding(operation, Verdict::Refused) }
    }

    fn went_through(
        &self,
        operation: Operation,
        begun: Instant,
        noticed: Option<Incident>,
        bound: Duration,
    ) -> Finding {
        match noticed {
            Some(incident) => Finding {
                by: Some(detector(incident.reason)),
                noticed_after: Some(incident.noticed.saturating_duration_since(begun)),
                text: operation.known(self.mode).text.to_owned(),
                ..finding(operation, Verdict::Detected)
            },
            None => Finding {
                text: format!("it went through, and {} ms later nobody had noticed", bound.as_millis()),
                ..finding(operation, Verdict::Unnoticed)
            },
        }
    }

    fn delayed(
        &self,
        operation: Operation,
        begun: Instant,
        incident: &Incident,
        failed: Option<FailedCall>,
    ) -> Finding {
        let limit = lease_break_time().map_or_else(String::new, |seconds| format!(", at most {seconds} s"));
        let text = match &failed {
            None => format!("{}{limit}", operation.known(self.mode).text),
            Some(failed) => format!("it waits until fastice lets go{limit}; then {} failed", failed.call),
        };
        Finding {
            by: Some(detector(incident.reason)),
            noticed_after: Some(incident.noticed.saturating_duration_since(begun)),
            text,
            failed,
            ..finding(operation, Verdict::Delayed)
        }
    }
}

impl Drop for Lab<'_> {
    fn drop(&mut self) {
        self.let_go();
    }
}

fn why(error: ExtentError) -> Why {
    Chain(&error).to_string()
}

/// Whether a file can share the blocks of another here.
fn shares_blocks(scratch: &Scratch) -> Result<Option<bool>, Why> {
    let source = scratch.file("source").map_err(why)?;
    let source = std::fs::File::open(source).map_err(|error| error.to_string())?;
    let shares = match clone_from(&source, &scratch.path().join("clone")) {
        Ok(()) => Some(true),
        Err(("FICLONE", error))
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL)) =>
        {
            Some(false)
        }
        Err(_) => None,
    };
    drop(source);
    scratch.clear().map_err(|error| error.to_string())?;
    Ok(shares)
}

fn finding(operation: Operation, verdict: Verdict) -> Finding {
    Finding {
        operation,
        verdict,
        probed: true,
        failed: None,
        by: None,
        noticed_after: None,
        text: String::new(),
    }
}

fn await_recall(recall: &RecallWatch, patience: Duration) -> Option<Incident> {
    let begun = Instant::now();
    loop {
        if let Some(incident) = recall.incident() {
            return Some(incident);
        }
        if begun.elapsed() >= patience {
            return None;
        }
        thread::sleep(PAUSE);
    }
}

/// What an attempt came to.
enum Outcome {
    Ended(Attempted),
    /// It has broken the lease, and waits.
    Waits(Incident),
}

/// Another process that tries an operation. Dropped, it is ended.
struct Attempt(Child);

impl Attempt {
    fn start(attempts: &Attempts<'_>, operation: Operation, path: &Path) -> Result<Self, Why> {
        let mut command = attempts(operation, path);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().map(Self).map_err(|error| format!("starting another process: {error}"))
    }

    /// Waits until it ends, or is seen to wait for the lease of the file that `recall` is of.
    fn watch(&mut self, recall: Option<&RecallWatch>) -> Result<Outcome, Why> {
        let begun = Instant::now();
        loop {
            let ended = self.0.try_wait().map_err(|error| error.to_string())?;
            if ended.is_some() {
                return self.answer().map(Outcome::Ended);
            }
            let broken = recall.and_then(RecallWatch::incident);
            let broken = broken.filter(|incident| incident.reason == RecallReason::LeaseBreak);
            if let Some(incident) = broken.filter(|incident| incident.noticed.elapsed() >= WAIT_SHOWN) {
                return Ok(Outcome::Waits(incident));
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("an attempt did not end in {} s", PATIENCE.as_secs()));
            }
            thread::sleep(PAUSE);
        }
    }

    fn answer(&mut self) -> Result<Attempted, Why> {
        let mut answer = String::new();
        let mut stdout = self.0.stdout.take().ok_or("an attempt without an answer")?;
        stdout.read_to_string(&mut answer).map_err(|error| error.to_string())?;
        serde_json::from_str(&answer).map_err(|_| "an attempt ended without an answer".to_owned())
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // Already gone when all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
