//! Running hostile scripts: each is a process of its own, as root or as somebody else.

use std::cell::RefCell;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::daemon::Daemon;
use crate::disk::{Disk, FILE_LEN};

/// Nobody in particular.
pub(crate) const ORDINARY: u32 = 65534;
/// The kernel lets an opener in after 45 seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// Whoever sleeps uninterruptibly for so long is held off.
const HOLD_SHOWN: Duration = Duration::from_millis(250);

/// What became of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    Errno(i32),
    /// It waits, and cannot be killed.
    HeldOff,
}

/// What a script is told of the place it runs at.
pub(crate) struct Scene<'a> {
    pub(crate) disk: &'a Disk,
    /// The process that serves.
    pub(crate) server: u32,
    pub(crate) file: &'a Path,
    /// Where scripts may be held off: those that are.
    held: Option<RefCell<Vec<Child>>>,
}

impl<'a> Scene<'a> {
    pub(crate) fn new(disk: &'a Disk, daemon: &Daemon, file: &'a Path) -> Self {
        let server = u32::try_from(daemon.pid().as_raw_nonzero().get()).expect("a process");
        Self { disk, server, file, held: None }
    }

    /// In this very process.
    pub(crate) fn inside(disk: &'a Disk, file: &'a Path) -> Self {
        Self { disk, server: std::process::id(), file, held: None }
    }

    /// Scripts that are held off are left to themselves.
    pub(crate) fn that_holds_off(self) -> Self {
        Self { held: Some(RefCell::default()), ..self }
    }

    /// Whatever held them off is gone: how many there were, and what became of them then.
    pub(crate) fn await_held(self) -> Vec<Outcome> {
        let held = self.held.map(RefCell::into_inner).unwrap_or_default();
        held.into_iter()
            .map(|child| end_of(child, "held off", None).expect("not held off for ever").0)
            .collect()
    }

    /// Runs `perl` as root, or as `user`.
    pub(crate) fn run(&self, perl: &str, user: Option<u32>) -> Outcome {
        self.run_with(perl, user, Stdio::null())
    }

    /// The same with this standard input.
    pub(crate) fn run_with(&self, perl: &str, user: Option<u32>, input: Stdio) -> Outcome {
        let mut command = match user {
            None => Command::new("perl"),
            Some(user) => {
                let mut command = Command::new("setpriv");
                let user = user.to_string();
                command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "perl"]);
                command
            }
        };
        command.arg("-e").arg(script(perl)).arg(self.file).arg(self.disk.directory());
        command.arg(self.server.to_string()).arg(self.disk.lab.fs.device());
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().expect("perl runs");
        match (end_of(child, perl, self.held.as_ref().map(|_| HOLD_SHOWN)), &self.held) {
            (Ok((outcome, _)), _) => outcome,
            (Err(child), Some(held)) => {
                held.borrow_mut().push(child);
                Outcome::HeldOff
            }
            (Err(_), None) => panic!("no end: {perl}"),
        }
    }
}

/// What became of it, and what it said; the process itself when it sleeps uninterruptibly for `hold_shown`.
fn end_of(mut child: Child, perl: &str, hold_shown: Option<Duration>) -> Result<(Outcome, String), Child> {
    let deadline = Instant::now() + PATIENCE;
    let mut asleep_since = None;
    while child.try_wait().expect("a child").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("a child");
            panic!("no end: {perl}");
        }
        match hold_shown.filter(|_| is_uninterruptible(&child)) {
            Some(hold) if asleep_since.get_or_insert_with(Instant::now).elapsed() > hold => {
                return Err(child);
            }
            Some(_) => {}
            None => asleep_since = None,
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().expect("a child");
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let last = said.lines().last().unwrap_or_default();
    let outcome = match last.strip_prefix("errno ") {
        Some(number) => Outcome::Errno(number.parse().expect("a number")),
        None if last == "done" => Outcome::Done,
        None => panic!("{perl}: {said}{wrong}"),
    };
    Ok((outcome, said.into_owned()))
}

/// `proc_pid_stat(5)`: the state follows the name in parentheses.
fn is_uninterruptible(child: &Child) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
}

fn script(perl: &str) -> String {
    let numbers = [
        ("L", i64::try_from(FILE_LEN).expect("small")),
        ("H", i64::try_from(FILE_LEN / 2).expect("small")),
        ("Q", i64::try_from(FILE_LEN / 4).expect("small")),
        ("SYS_PIDFD_OPEN", libc::SYS_pidfd_open),
        ("SYS_PIDFD_GETFD", libc::SYS_pidfd_getfd),
        ("SYS_FALLOCATE", libc::SYS_fallocate),
        ("SYS_FSYNC", libc::SYS_fsync),
        ("SYS_FTRUNCATE", libc::SYS_ftruncate),
        ("SYS_COPY_FILE_RANGE", libc::SYS_copy_file_range),
        ("SYS_NAME_TO_HANDLE_AT", libc::SYS_name_to_handle_at),
        ("SYS_OPEN_BY_HANDLE_AT", libc::SYS_open_by_handle_at),
        ("SYS_MMAP", libc::SYS_mmap),
        ("SYS_SETXATTR", libc::SYS_setxattr),
        ("SYS_UMOUNT2", libc::SYS_umount2),
        ("SYS_SWAPON", libc::SYS_swapon),
        ("SYS_SWAPOFF", libc::SYS_swapoff),
        ("O_DIRECT", libc::O_DIRECT.into()),
    ];
    let numbers: String =
        numbers.iter().map(|(name, number)| format!("use constant {name} => {number};\n")).collect();
    format!("use Errno;\n{numbers}{}\n{perl}\ndone();\n", include_str!("prelude.pl"))
}
