//! The scratch file, its pin, and the attempts on it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::attempt::{Attempted, FailedCall, Tried, clone_from};
use super::filesystem::LoopFs;
use super::operation::Operation;
use super::scratch::Scratch;
use super::{Attempts, FROZEN, Finding, Verdict, detector};
use crate::chain::Chain;
use crate::extent::error::ExtentError;
use crate::extent::facts::FileFacts;
use crate::extent::guard::{Incident, RecallReason, RecallWatch, Warden, lease_break_limit};
use crate::extent::identity::FilesystemKind;
use crate::extent::mode::GuardMode;
use crate::extent::pin::{PinOptions, pin};
use crate::extent::pinned::PinnedFile;
use crate::extent::progress::NoProgress;
use crate::extent::readers::LocalReaders;
use crate::extent::state::StateDir;
use crate::extent::sys;
use crate::extent::undo::change_flag;
use crate::extent::watch::WatchOptions;

/// How long an attempt may take before it is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Whoever waits for a broken lease so long does wait.
const WAIT_SHOWN: Duration = Duration::from_millis(200);
/// Whoever sleeps uninterruptibly for so long on a frozen filesystem is held off by that.
const HOLD_SHOWN: Duration = Duration::from_millis(400);
const PAUSE: Duration = Duration::from_millis(2);

/// Why something could not be tried.
type Why = String;

/// A place for scratch files on the filesystem that is asked about, or on one like it.
pub(super) struct Lab<'a> {
    attempts: &'a Attempts<'a>,
    kind: (GuardMode, LocalReaders),
    warden: Arc<Warden>,
    /// The file that attempts are made on, until one goes through.
    pinned: Option<PinnedFile>,
    files: u32,
    state: StateDir,
    /// Where `state` is.
    _records: Scratch,
    scratch: Scratch,
    /// Where `scratch` is, when the guard is one of the whole filesystem.
    filesystem: Option<LoopFs>,
}

impl<'a> Lab<'a> {
    /// Makes one in `directory`, and finds out whether there are shared blocks, which needs no privilege; or, for guards of
    /// whole filesystems, on a filesystem like that of `directory`.
    pub(super) fn new(
        directory: &Path,
        kind: (GuardMode, LocalReaders),
        attempts: &'a Attempts<'a>,
        reflink: &mut Option<bool>,
    ) -> Result<Self, Why> {
        let filesystem = match kind.0 {
            GuardMode::Default | GuardMode::SwapFile => None,
            GuardMode::ReadOnlyMount | GuardMode::FrozenFilesystem => Some(like_that_of(directory, reflink)?),
        };
        let directory = filesystem.as_ref().map_or(directory, LoopFs::path);
        let scratch = Scratch::in_directory(directory, ".fastice-explain-").map_err(why)?;
        *reflink = shares_blocks(&scratch)?;
        let records = Scratch::in_directory(&std::env::temp_dir(), "fastice-explain-").map_err(why)?;
        let state = StateDir::open(records.path()).map_err(why)?;
        let warden = Warden::start(WatchOptions::default())
            .map_err(|error| format!("the guards need root (CAP_SYS_ADMIN for fanotify): {error}"))?;
        let (pinned, files) = (None, 0);
        let _records = records;
        let mut lab = Self { attempts, kind, warden, pinned, files, state, _records, scratch, filesystem };
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
            _ if operation.is_tried_on_mount() && self.filesystem.is_some() => {
                self.by_path(operation).map(Some)
            }
            Operation::TruncateUnflagged => self.truncate_unflagged().map(Some),
            Operation::OpenedBefore if self.kind.0 == GuardMode::ReadOnlyMount => {
                self.opened_before_read_only().map(Some)
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
                if let (GuardMode::ReadOnlyMount, Some(filesystem)) = (self.kind.0, &self.filesystem) {
                    filesystem.remount(true).map_err(|error| format!("mounting read-only: {error}"))?;
                }
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
        let (warden, (guard, readers)) = (Some(Arc::clone(&self.warden)), self.kind);
        // Scratch files hold nothing that a guard may not destroy.
        let prepare = guard == GuardMode::SwapFile;
        let (guard, local_readers) = (Some(guard), Some(readers));
        let options = PinOptions { warden, guard, local_readers, prepare, ..PinOptions::default() };
        pin(path, &options, &self.state, &mut NoProgress)
    }

    /// Unpins the scratch file, and makes its filesystem one that can be written.
    fn release(&mut self) {
        if let Some(Err(error)) = self.pinned.take().map(PinnedFile::release) {
            // The flag goes with the scratch directory all the same.
            tracing::warn!(error = %Chain(&error), "cannot release a scratch file");
        }
        if let (GuardMode::ReadOnlyMount, Some(filesystem)) = (self.kind.0, &self.filesystem)
            && let Err(error) = filesystem.remount(false)
        {
            tracing::warn!(%error, "cannot remount a scratch filesystem read-write");
        }
    }

    /// Unpins and removes the scratch file.
    fn let_go(&mut self) {
        self.release();
        if let Err(error) = self.scratch.clear() {
            tracing::warn!(%error, "cannot remove a scratch file yet");
        }
    }

    /// The pinned file: its path, what sees its recall, and how long a change may go unnoticed.
    fn subject(&mut self) -> Result<(PathBuf, RecallWatch, Duration), Why> {
        let pinned = self.pin()?;
        let recall = pinned.recall().ok_or("the scratch file lost its guard")?;
        let bound = pinned.watched().map_or(PATIENCE, |report| report.bound);
        Ok((pinned.path().to_path_buf(), recall, bound))
    }

    /// Another process tries it on the path of the pinned file, or on its filesystem.
    fn by_path(&mut self, operation: Operation) -> Result<Finding, Why> {
        let (file, recall, bound) = self.subject()?;
        let path = match &self.filesystem {
            Some(filesystem) if operation.is_tried_on_mount() => filesystem.path().to_path_buf(),
            _ => file,
        };
        let begun = Instant::now();
        let mut attempt = Attempt::start(self.attempts, operation, &path)?;
        let is_frozen = self.kind.0 == GuardMode::FrozenFilesystem;
        match attempt.watch(Some(&recall), is_frozen)? {
            Outcome::Ended(Attempted { failed: Some(failed) }) => {
                if recall.incident().is_some() || operation == Operation::TruncateUnflagged {
                    self.let_go();
                }
                Ok(self.refused(operation, failed))
            }
            Outcome::Ended(Attempted { failed: None }) if operation.is_let_through(self.kind.1) => {
                Ok(self.allowed(operation, &recall))
            }
            Outcome::Ended(Attempted { failed: None }) => {
                let noticed = await_recall(&recall, bound);
                self.let_go();
                Ok(self.went_through(operation, begun, noticed, bound))
            }
            Outcome::Waits(incident) => {
                self.let_go();
                let failed = attempt.end()?;
                Ok(self.delayed(operation, begun, &incident, failed))
            }
            Outcome::IsHeldOff => {
                self.release();
                let failed = attempt.end();
                self.let_go();
                failed.map(|failed| self.held_off(operation, failed))
            }
        }
    }

    /// The flag is cleared by a descriptor of this process, and then another process truncates the file.
    fn truncate_unflagged(&mut self) -> Result<Finding, Why> {
        let operation = Operation::TruncateUnflagged;
        let file = self.own_descriptor()?;
        let cleared =
            self.on_a_thread(move || change_flag(&file, false).map_err(|error| ("FS_IOC_SETFLAGS", error)))?;
        match cleared {
            Within::Ended(Ok(())) => self.by_path(operation),
            Within::Ended(Err((call, error))) => Err(format!("clearing the flag: {call}: {error}")),
            Within::HeldOff(failed) => Ok(self.held_off(operation, failed)),
        }
    }

    /// A pin while there is a descriptor open for writing.
    fn opened_before(&mut self) -> Result<Finding, Why> {
        self.let_go();
        let path = self.file()?;
        let writer = File::options().write(true).open(&path).map_err(|error| error.to_string())?;
        let finding = match self.kind.0 {
            GuardMode::SwapFile => self.pinned_beside(&writer, &path),
            _ => self.not_pinned_beside(writer, &path),
        };
        self.let_go();
        finding
    }

    /// The pin is made, and the kernel refuses what is tried through `writer`.
    fn pinned_beside(&mut self, writer: &File, path: &Path) -> Result<Finding, Why> {
        self.pinned = Some(self.pin_file(path).map_err(why)?);
        Ok(match writer.set_len(0) {
            Err(error) => self.refused(Operation::OpenedBefore, failed_call("ftruncate", &error)),
            Ok(()) => finding(Operation::OpenedBefore, Verdict::Unnoticed),
        })
    }

    /// The pin is refused. Another process has `writer`, for this one must not write to a filesystem that it is to freeze.
    fn not_pinned_beside(&mut self, writer: File, path: &Path) -> Result<Finding, Why> {
        let mut command = Command::new("sleep");
        let holder = command.arg(PATIENCE.as_secs().to_string()).stdin(writer).spawn();
        // It still has the descriptor, to be handed to others.
        drop(command);
        let _holder = Attempt(holder.map_err(|error| format!("starting another process: {error}"))?);
        let finding =
            Finding { probed: true, ..Finding::of_knowledge(Operation::OpenedBefore, self.kind, None) };
        match self.pin_file(path) {
            Err(ExtentError::InUse { .. }) => Ok(finding),
            Err(error) => Err(why(error)),
            Ok(pinned) => {
                self.pinned = Some(pinned);
                Ok(Finding { verdict: Verdict::Unnoticed, by: None, text: String::new(), ..finding })
            }
        }
    }

    /// The filesystem cannot even become what the guard asks for.
    fn opened_before_read_only(&mut self) -> Result<Finding, Why> {
        self.let_go();
        let path = self.file()?;
        let writer = File::options().write(true).open(&path).map_err(|error| error.to_string())?;
        let remounted = self.filesystem.as_ref().map_or(Ok(()), |filesystem| filesystem.remount(true));
        drop(writer);
        let finding = match remounted {
            Err(error) => self.refused(Operation::OpenedBefore, failed_call("mount", &error)),
            Ok(()) => finding(Operation::OpenedBefore, Verdict::Unnoticed),
        };
        self.let_go();
        Ok(finding)
    }

    /// A clone from the file by a descriptor of this process, which the mark lets pass.
    fn clone_within(&mut self) -> Result<Finding, Why> {
        let operation = Operation::CloneWithin;
        let target = self.scratch.path().join("clone");
        let (_, recall, bound) = self.subject()?;
        let file = self.own_descriptor()?;
        let begun = Instant::now();
        let finding = match self.on_a_thread(move || clone_from(&file, &target))? {
            Within::Ended(Err((call, error))) => self.refused(operation, failed_call(call, &error)),
            Within::Ended(Ok(())) => self.went_through(operation, begun, await_recall(&recall, bound), bound),
            Within::HeldOff(failed) => self.held_off(operation, failed),
        };
        self.let_go();
        Ok(finding)
    }

    fn own_descriptor(&mut self) -> Result<File, Why> {
        self.pin()?.file().try_clone().map_err(|error| error.to_string())
    }

    /// Does it on another thread, as the kernel may hold it off for as long as the file is pinned: then the file is let go.
    fn on_a_thread(&mut self, work: impl FnOnce() -> Tried + Send + 'static) -> Result<Within, Why> {
        let (tell, told) = mpsc::channel();
        // Who does not listen any more has given up.
        let thread = thread::spawn(move || drop(tell.send(work())));
        let patience = match self.kind.0 {
            GuardMode::FrozenFilesystem => HOLD_SHOWN,
            _ => PATIENCE,
        };
        let found = match told.recv_timeout(patience) {
            Ok(tried) => Within::Ended(tried),
            Err(_) => {
                self.release();
                let tried =
                    told.recv_timeout(PATIENCE).map_err(|_| "an attempt waits for nobody".to_owned())?;
                Within::HeldOff(tried.err().map(|(call, error)| failed_call(call, &error)))
            }
        };
        thread.join().map_err(|_| "an attempt panicked".to_owned())?;
        Ok(found)
    }

    /// By which guard is not told by the kernel: it is the one that is known to, when the error is the one that it gives.
    fn refused(&self, operation: Operation, failed: FailedCall) -> Finding {
        let known = operation.known(self.kind);
        if matches!(failed.errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) {
            return Finding { failed: Some(failed), ..finding(operation, Verdict::Impossible) };
        }
        let is_a_guards = matches!(failed.errno, libc::EPERM | libc::ETXTBSY | libc::EROFS | libc::EBUSY);
        let expected = is_a_guards && known.verdict == Verdict::Refused;
        let by = known.by.filter(|_| expected);
        let text = if expected { known.text.to_owned() } else { String::new() };
        Finding { failed: Some(failed), by, text, ..finding(operation, Verdict::Refused) }
    }

    /// It is what was asked for, and must not end the pin.
    fn allowed(&self, operation: Operation, recall: &RecallWatch) -> Finding {
        match recall.incident() {
            None => {
                let text = operation.known(self.kind).text.to_owned();
                Finding { text, ..finding(operation, Verdict::Allowed) }
            }
            Some(incident) => {
                Finding { by: Some(detector(incident.reason)), ..finding(operation, Verdict::Detected) }
            }
        }
    }

    /// It waited until the filesystem was thawed.
    fn held_off(&self, operation: Operation, failed: Option<FailedCall>) -> Finding {
        let text = match &failed {
            None => operation.known(self.kind).text.to_owned(),
            Some(failed) => format!("it waits until the pin ends; then {} failed", failed.call),
        };
        Finding { by: Some(FROZEN), failed, text, ..finding(operation, Verdict::Delayed) }
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
                text: operation.known(self.kind).text.to_owned(),
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
        let limit =
            lease_break_limit().map_or_else(String::new, |limit| format!(", at most {} s", limit.as_secs()));
        let text = match &failed {
            None => format!("{}{limit}", operation.known(self.kind).text),
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

/// A filesystem for attempts, of the same type as that of `directory`.
fn like_that_of(directory: &Path, reflink: &mut Option<bool>) -> Result<LoopFs, Why> {
    let root = File::open(directory).map_err(|error| error.to_string())?;
    let facts = FileFacts::gather(&root, directory).map_err(why)?;
    let kind = facts.filesystem.ok_or("its filesystem is none that files are pinned on")?;
    let shares = match kind {
        FilesystemKind::Xfs => sys::xfs_has_reflink(root.as_fd()).map_err(|error| error.to_string())?,
        FilesystemKind::Ext4 => false,
    };
    *reflink = Some(shares);
    if !rustix::process::geteuid().is_root() {
        return Err("this guard is tried on a scratch filesystem, which takes root".to_owned());
    }
    LoopFs::make(kind, shares)
        .map_err(|error| format!("this guard is tried on a scratch filesystem: {error}"))
}

/// What came of an attempt by this process.
enum Within {
    Ended(Tried),
    /// It waited until the file was let go: what failed then.
    HeldOff(Option<FailedCall>),
}

fn failed_call(call: &str, error: &io::Error) -> FailedCall {
    FailedCall { call: call.to_owned(), errno: error.raw_os_error().unwrap_or_default() }
}

fn why(error: ExtentError) -> Why {
    Chain(&error).to_string()
}

/// Whether a file can share the blocks of another here.
fn shares_blocks(scratch: &Scratch) -> Result<Option<bool>, Why> {
    let source = scratch.file("source").map_err(why)?;
    let source = File::open(source).map_err(|error| error.to_string())?;
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
    /// The kernel holds it off, and it cannot be killed.
    IsHeldOff,
}

/// Another process that tries an operation. Dropped, it is ended.
struct Attempt(Child);

impl Attempt {
    fn start(attempts: &Attempts<'_>, operation: Operation, path: &Path) -> Result<Self, Why> {
        let mut command = attempts(operation, path);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().map(Self).map_err(|error| format!("starting another process: {error}"))
    }

    /// Waits until it ends, or is seen to wait: for the lease of the file that `recall` is of, or for the filesystem, where
    /// that is frozen.
    fn watch(&mut self, recall: Option<&RecallWatch>, is_frozen: bool) -> Result<Outcome, Why> {
        let begun = Instant::now();
        let mut asleep_since = None;
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
            if is_frozen && self.is_uninterruptible() {
                let since = *asleep_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= HOLD_SHOWN {
                    return Ok(Outcome::IsHeldOff);
                }
            } else {
                asleep_since = None;
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("an attempt did not end in {} s", PATIENCE.as_secs()));
            }
            thread::sleep(PAUSE);
        }
    }

    /// After what it waited for is gone: the call that failed, if one did.
    fn end(&mut self) -> Result<Option<FailedCall>, Why> {
        match self.watch(None, false)? {
            Outcome::Ended(Attempted { failed }) => Ok(failed),
            Outcome::Waits(_) | Outcome::IsHeldOff => Err("an attempt waits for nobody".to_owned()),
        }
    }

    /// `proc_pid_stat(5)`: the state follows the name in parentheses.
    fn is_uninterruptible(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
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
