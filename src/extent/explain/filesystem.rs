//! A filesystem for attempts that would hold up, or change, everybody who uses the one that is asked about: of the same type,
//! on a loop device over a sparse image, gone when it is dropped.
//!
//! What it does not do: outlive a `kill -9` in order. What is left then is a mount below the directory of temporary files, frozen
//! perhaps: `fsfreeze --unfreeze`, `umount`, and remove the directory.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};

use super::scratch::Scratch;
use crate::extent::identity::FilesystemKind;
use crate::extent::sys;

/// XFS is made of no less than 300 MB; the image is sparse.
const IMAGE_LEN: u64 = 320 << 20;
const ATTEMPTS: u32 = 200;
const PAUSE: Duration = Duration::from_millis(10);

/// A mounted filesystem of its own.
#[derive(Debug)]
pub(super) struct LoopFs {
    mount: PathBuf,
    /// Holds the image and the mount point.
    _place: Scratch,
}

impl LoopFs {
    /// Makes and mounts one. `reflink` has a meaning for XFS only.
    pub(super) fn make(kind: FilesystemKind, reflink: bool) -> Result<Self, String> {
        let place = Scratch::in_directory(&std::env::temp_dir(), "fastice-explain-fs-")
            .map_err(|error| error.to_string())?;
        let (image, mount) = (place.path().join("image"), place.path().join("mount"));
        File::create_new(&image)
            .and_then(|file| file.set_len(IMAGE_LEN))
            .and_then(|()| fs::create_dir(&mount))
            .map_err(|error| error.to_string())?;
        let name = kind.to_string();
        let mut mkfs = Command::new(format!("mkfs.{name}"));
        match kind {
            FilesystemKind::Xfs => {
                mkfs.args(["-q", "-m", if reflink { "reflink=1" } else { "reflink=0,rmapbt=0" }])
            }
            FilesystemKind::Ext4 => mkfs.args(["-q", "-F"]),
        };
        run(mkfs.arg(&image))?;
        // The loop device goes with the mount.
        run(Command::new("mount").args(["-t", &name, "-o", "loop"]).arg(&image).arg(&mount))?;
        Ok(Self { mount, _place: place })
    }

    /// Where it is mounted.
    pub(super) fn path(&self) -> &Path {
        &self.mount
    }

    /// Mounts it read-only, or not, from now on.
    pub(super) fn remount(&self, read_only: bool) -> std::io::Result<()> {
        let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        Ok(rustix::mount::mount_remount(&self.mount, flags, "")?)
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        for _ in 0..ATTEMPTS {
            match rustix::mount::unmount(&self.mount, UnmountFlags::empty()) {
                Ok(()) => return,
                Err(error) => {
                    tracing::debug!(path = %self.mount.display(), %error, "a scratch filesystem is still in use");
                    // Only when a pin that went wrong has left it frozen.
                    if let Ok(root) = File::open(&self.mount) {
                        let _ = sys::thaw(root.as_fd());
                    }
                }
            }
            thread::sleep(PAUSE);
        }
        let path = self.mount.display();
        tracing::error!(%path, "cannot unmount a scratch filesystem: `umount` it, and remove its directory");
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let told = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name}: {}", told.lines().last().unwrap_or("it failed and said nothing")))
}
