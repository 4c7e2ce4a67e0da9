//! A real filesystem on a loop device over a sparse image in a temporary directory, gone when it is dropped.
//!
//! Needs root, `losetup` and the `mkfs` of the filesystem. Where one is missing, [`make_or_skip`] says so on standard
//! error, which the test harness does not swallow; with `FASTICE_REQUIRE_LOOP=1` in the environment it fails instead.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Which filesystem to make.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// `xfs`, `ext4` or any other that has a `mkfs.NAME`.
    pub(crate) kind: &'static str,
    /// More arguments for mkfs.
    pub(crate) mkfs: &'static [&'static str],
    /// Arguments for tune2fs before mounting; empty for none.
    pub(crate) tune: &'static [&'static str],
    /// Options for `mount -o`; empty for none.
    pub(crate) mount: &'static str,
    /// The size of the image in MiB.
    pub(crate) size_mib: u64,
    /// Where a partition begins, in sectors of 512 bytes, that holds the filesystem; `None` for the whole device.
    pub(crate) partition_start: Option<u64>,
    /// The logical block of the loop device in bytes.
    pub(crate) sector_bytes: u32,
}

impl Spec {
    /// XFS with shared extents.
    pub(crate) const XFS: Self = Self {
        kind: "xfs",
        mkfs: &["-q", "-m", "reflink=1"],
        tune: &[],
        mount: "",
        size_mib: 512,
        partition_start: None,
        sector_bytes: 512,
    };
    /// ext4.
    pub(crate) const EXT4: Self = Self {
        kind: "ext4",
        mkfs: &["-q", "-F"],
        tune: &[],
        mount: "",
        size_mib: 512,
        partition_start: None,
        sector_bytes: 512,
    };
}

/// A mounted filesystem of its own.
#[derive(Debug)]
pub(crate) struct LoopFs {
    image: tempfile::TempDir,
    device: String,
}

impl LoopFs {
    /// Makes and mounts it; the error says what is missing.
    pub(crate) fn make(spec: &Spec) -> Result<Self, String> {
        Self::make_in(&std::env::temp_dir(), spec)
    }

    /// The same, with its image below `place`, which may be another of these.
    pub(crate) fn make_in(place: &Path, spec: &Spec) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".to_owned());
        }
        let image = tempfile::tempdir_in(place).map_err(|error| error.to_string())?;
        let file = image.path().join("image");
        fs::File::create(&file).and_then(|f| f.set_len(spec.size_mib << 20)).map_err(|e| e.to_string())?;
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--partscan", "--sector-size", &spec.sector_bytes.to_string()]);
        let device = run(losetup.arg(&file))?;
        // From here on the drop cleans up.
        let made = Self { image, device: device.trim().to_owned() };
        let target = made.filesystem_device(spec)?;
        run(Command::new(format!("mkfs.{}", spec.kind)).args(spec.mkfs).arg(&target))?;
        if !spec.tune.is_empty() {
            run(Command::new("tune2fs").args(spec.tune).arg(&target))?;
        }
        fs::create_dir(made.root()).map_err(|error| error.to_string())?;
        let mut mount = Command::new("mount");
        mount.args(["-t", spec.kind]);
        if !spec.mount.is_empty() {
            mount.args(["-o", spec.mount]);
        }
        run(mount.arg(&target).arg(made.root()))?;
        Ok(made)
    }

    /// The device itself, or a partition of it that is told to the kernel without any table on the disk.
    fn filesystem_device(&self, spec: &Spec) -> Result<String, String> {
        let Some(start) = spec.partition_start else { return Ok(self.device.clone()) };
        let len = (spec.size_mib << 11) - start;
        run(Command::new("addpart").args([&self.device, "1", &start.to_string(), &len.to_string()]))?;
        let node = format!("{}p1", self.device);
        for _ in 0..100 {
            if Path::new(&node).exists() {
                return Ok(node);
            }
            thread::sleep(Duration::from_millis(10));
        }
        Err(format!("{node} does not appear"))
    }

    /// Where it is mounted.
    pub(crate) fn root(&self) -> PathBuf {
        self.image.path().join("mnt")
    }

    /// The path of a file in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// A place outside of it, for a state directory.
    pub(crate) fn outside(&self) -> PathBuf {
        self.image.path().join("state")
    }

    /// The node of the whole loop device.
    pub(crate) fn device(&self) -> &str {
        &self.device
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        let root = self.root();
        // What a failed test has frozen; refused when nothing is.
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&root).stderr(Stdio::null()).status();
        end_swap_areas(&root);
        let unmounted = !is_mounted(&root) || unmount(&root).is_ok();
        let lazily = (!unmounted).then(|| run(Command::new("umount").arg("--lazy").arg(root)));
        let detached = run(Command::new("losetup").args(["--detach", &self.device]));
        for failed in [lazily, Some(detached)].into_iter().flatten().filter_map(Result::err) {
            let _ = writeln!(
                std::io::stderr(),
                "LEFT BEHIND: {} of {}: {failed}",
                self.device,
                self.root().display()
            );
        }
    }
}

/// Ends the swap areas below `root` that a failed test has left: nothing could be unmounted.
fn end_swap_areas(root: &Path) {
    for line in fs::read_to_string("/proc/swaps").unwrap_or_default().lines() {
        let Some(path) =
            line.split_ascii_whitespace().next().filter(|path| Path::new(path).starts_with(root))
        else {
            continue;
        };
        let ended = run(Command::new("chattr").args(["-i", path]))
            .and_then(|_| run(Command::new("swapoff").arg(path)));
        let _ = writeln!(std::io::stderr(), "a test left a swap area: {path}: {ended:?}");
    }
}

fn is_mounted(root: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(4).map(Path::new) == Some(root))
}

/// Unmounts it, patiently: something that a test has just ended may keep it busy for a moment.
pub(crate) fn unmount(root: &Path) -> Result<(), String> {
    let mut outcome = Err(String::new());
    for _ in 0..100 {
        outcome = run(Command::new("umount").arg(root)).map(|_| ());
        if outcome.is_ok() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    outcome
}

static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// Says that a test is skipped, on the real standard error, with the count so far in this process.
///
/// # Panics
/// When the environment forbids to skip.
pub(crate) fn skip(test: &str, reason: &str) {
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {reason} ({count} skipped so far)");
    assert!(std::env::var_os("FASTICE_REQUIRE_LOOP").is_none(), "{test} may not be skipped: {reason}");
}

/// The filesystem, or `None` after saying why not.
pub(crate) fn make_or_skip(test: &str, spec: &Spec) -> Option<LoopFs> {
    LoopFs::make(spec).map_err(|reason| skip(test, &reason)).ok()
}

/// Runs a command to its end; its standard output, or all that it said when it failed.
pub(crate) fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}: {}", output.status, said.trim()))
}
