//! Loop devices, for tests that run as root.

use std::path::{Path, PathBuf};
use std::process::Command;

use fastice::block::UringOptions;

/// A loop device over a file; detached when dropped.
pub(crate) struct Loop {
    pub(crate) node: PathBuf,
}

impl Loop {
    /// Attaches `file`. None, and a loud word, where loop devices cannot be had.
    pub(crate) fn attach(file: &Path, arguments: &[&str]) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).args(arguments).arg(file).output();
        match output {
            Ok(output) if output.status.success() => {
                let node = String::from_utf8(output.stdout).expect("a path").trim().into();
                Some(Self { node })
            }
            other => {
                // The harness names the thread by the test.
                let thread = std::thread::current();
                let test = thread.name().unwrap_or("a loop device").replace("::", " ");
                eprintln!("SKIPPED: {test}: no loop device (run as root, with losetup): {other:?}");
                None
            }
        }
    }

    /// How to open it.
    pub(crate) fn options(&self, read_only: bool) -> UringOptions {
        let number = rustix::fs::stat(&self.node).expect("the node").st_rdev;
        UringOptions { major: rustix::fs::major(number), minor: rustix::fs::minor(number), read_only }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = Command::new("losetup").arg("--detach").arg(&self.node).status();
        assert!(status.is_ok_and(|status| status.success()), "{} stays attached", self.node.display());
    }
}
