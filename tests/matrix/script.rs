//! Running hostile scripts: each is a process of its own, as root or as somebody else.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::daemon::Daemon;
use crate::disk::{Disk, FILE_LEN};

/// Nobody in particular.
pub(crate) const ORDINARY: u32 = 65534;
/// The kernel lets an opener in after 45 seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// What became of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    Errno(i32),
}

/// What a script is told of the place it runs at.
pub(crate) struct Scene<'a> {
    pub(crate) disk: &'a Disk,
    /// The process that serves.
    pub(crate) server: u32,
    pub(crate) file: &'a Path,
}

impl<'a> Scene<'a> {
    pub(crate) fn new(disk: &'a Disk, daemon: &Daemon, file: &'a Path) -> Self {
        let server = u32::try_from(daemon.pid().as_raw_nonzero().get()).expect("a process");
        Self { disk, server, file }
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
        let mut child = command.spawn().expect("perl runs");
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().expect("a child").is_none() {
            if Instant::now() > deadline {
                child.kill().expect("a child");
                panic!("no end: {perl}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let output = child.wait_with_output().expect("a child");
        let (said, wrong) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let last = said.lines().last().unwrap_or_default();
        match last.strip_prefix("errno ") {
            Some(number) => Outcome::Errno(number.parse().expect("a number")),
            None if last == "done" => Outcome::Done,
            None => panic!("{perl}: {said}{wrong}"),
        }
    }
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
