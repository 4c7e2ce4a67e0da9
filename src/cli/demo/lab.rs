//! What the demo sets up, and its undoing: an image with XFS on a loop device, a fragmented file, a serving process.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::{DemoDevice, blocks};
use crate::aligned::AlignedBuffer;
use crate::cli::serve::READY;

/// XFS wants at least 300 MiB.
const IMAGE_BYTES: u64 = 384 << 20;
/// One run of the fragmented file, and of the one that is in its way.
const RUN_BYTES: usize = 256 << 10;
const GAP_BYTES: usize = 64 << 10;
/// Of what the file holds at first.
const FIRST_SEED: u64 = 1;
/// How long the target may take to end by itself.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// A directory with an image in it, mounted. Dropping it undoes it all.
pub(super) struct Lab {
    dir: PathBuf,
    loop_device: Option<String>,
    mounted: bool,
}

impl Lab {
    /// Makes the directory, the image, the filesystem, and mounts it.
    pub(super) fn set_up(parent: &Path) -> anyhow::Result<Self> {
        let dir = parent.join(format!("fastice-demo-{}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot make {}", dir.display()))?;
        // From here on the destructor cleans up.
        let mut lab = Self { dir, loop_device: None, mounted: false };
        fs::create_dir(lab.mount_point())?;
        File::create(lab.image())?.set_len(IMAGE_BYTES)?;
        run(Command::new("mkfs.xfs").args(["-q", "-f"]).arg(lab.image()))?;
        let device = attach(&lab.image())?;
        lab.loop_device = Some(device.clone());
        run(Command::new("mount").args(["-t", "xfs", &device]).arg(lab.mount_point()))?;
        lab.mounted = true;
        Ok(lab)
    }

    /// The block device that the filesystem is on.
    pub(super) fn loop_device(&self) -> &str {
        self.loop_device.as_deref().unwrap_or_default()
    }

    pub(super) fn image(&self) -> PathBuf {
        self.dir.join("xfs.img")
    }

    pub(super) fn mount_point(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    pub(super) fn file(&self) -> PathBuf {
        self.mount_point().join("disk.img")
    }

    pub(super) fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// A file of `len` bytes whose runs lie backwards on the device, with another file's between them. No two blocks are
    /// alike, so that it shows whether a driver reads the right ones.
    pub(super) fn write_fragmented(&self, len: u64) -> anyhow::Result<()> {
        let file = direct(&self.file(), true)?;
        let filler = direct(&self.mount_point().join("others"), true)?;
        let (mut content, zeros) = (AlignedBuffer::new(RUN_BYTES), AlignedBuffer::new(GAP_BYTES));
        let runs = len / RUN_BYTES as u64;
        for run in 0..runs {
            let backwards = runs.saturating_sub(1).saturating_sub(run);
            let at = backwards.saturating_mul(RUN_BYTES as u64);
            blocks::fill(content.bytes_mut(), FIRST_SEED, at / blocks::BLOCK_BYTES as u64);
            file.write_all_at(content.bytes(), at)?;
            filler.write_all_at(zeros.bytes(), run.saturating_mul(GAP_BYTES as u64))?;
        }
        file.sync_all()?;
        Ok(())
    }

    /// Reads the file through its filesystem and recognises every block: by direct I/O, or through the page cache
    /// after what is in it was dropped.
    pub(super) fn recognise(&self, seed: u64, cached: bool) -> anyhow::Result<u64> {
        let path = self.file();
        let mut file = if cached { File::open(&path)? } else { direct(&path, false)? };
        if cached {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).map_err(io::Error::from)?;
        }
        let len = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(0))?;
        let mut buffer = AlignedBuffer::new(1 << 20);
        let mut at = 0;
        while at < len {
            let want =
                usize::try_from(len.saturating_sub(at)).unwrap_or(usize::MAX).min(buffer.bytes().len());
            let part = buffer.bytes_mut().get_mut(..want).unwrap_or_default();
            file.read_exact(part).with_context(|| format!("cannot read {} at {at}", path.display()))?;
            let index = at / blocks::BLOCK_BYTES as u64;
            if let Some(wrong) = blocks::first_wrong(part, seed, index) {
                bail!("block {wrong} of {} is not what was written over the network", path.display());
            }
            at = at.saturating_add(want as u64);
        }
        Ok(len / blocks::BLOCK_BYTES as u64)
    }

    /// Unmounts, so that the filesystem can be checked.
    pub(super) fn unmount(&mut self) -> anyhow::Result<()> {
        run(Command::new("umount").arg(self.mount_point()))?;
        self.mounted = false;
        self.await_release()?;
        self.detach()
    }

    /// A mount that is gone from the tree may be in use for a moment still, by a process that is ending or in another
    /// mount namespace. As long as it is, the kernel gives the device to nobody else.
    fn await_release(&self) -> anyhow::Result<()> {
        let started = Instant::now();
        loop {
            let exclusive = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(self.loop_device());
            match exclusive {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() != Some(libc::EBUSY) => return Err(error.into()),
                Err(_) if started.elapsed() > STOP_WITHIN => {
                    bail!("the filesystem does not let go of its device")
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn detach(&mut self) -> anyhow::Result<()> {
        if let Some(device) = self.loop_device.take() {
            run(Command::new("losetup").args(["--detach", &device]))?;
        }
        Ok(())
    }

    fn undo(&mut self) -> anyhow::Result<()> {
        if self.mounted {
            // A target that was killed leaves the file immutable, which would not be in the way of unmounting.
            if run(Command::new("umount").arg(self.mount_point())).is_err() {
                run(Command::new("umount").arg("--lazy").arg(self.mount_point()))?;
            }
            self.mounted = false;
        }
        self.detach()?;
        fs::remove_dir_all(&self.dir)?;
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::error!(dir = %self.dir.display(), "the demo cannot be cleaned up: {error:#}; umount and remove it by hand");
        }
    }
}

/// `fastice serve` as a process of its own. Dropping it ends it.
pub(super) struct Target {
    child: Option<Child>,
    log: PathBuf,
}

impl Target {
    /// Writes a configuration for the lab's file and starts serving it on a free port.
    pub(super) fn start(lab: &Lab, nqn: &str, device: DemoDevice) -> anyhow::Result<(Self, ChildStdout)> {
        let config = lab.dir.join("fastice.toml");
        fs::write(&config, configuration(lab, nqn, device))?;
        let log = lab.dir.join("serve.log");
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", "--log-format", "human", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            // Ctrl-C is for us; we end the target in our own time.
            .process_group(0)
            .spawn()
            .context("cannot start `fastice serve`")?;
        let stdout = child.stdout.take().context("the target has a standard output")?;
        Ok((Self { child: Some(child), log }, stdout))
    }

    /// Reads the line with which the target says that hosts can connect, and where.
    pub(super) fn ready_line(&self, stdout: ChildStdout) -> anyhow::Result<SocketAddr> {
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().strip_prefix(READY).and_then(|rest| rest.split_whitespace().next());
        match address.map(str::parse) {
            Some(Ok(address)) => Ok(address),
            _ => bail!("the target did not start; its last words:\n{}", self.last_words()),
        }
    }

    /// What the target compared before it let the driver at the disk, by its log.
    pub(super) fn proof(&self) -> Option<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let line = log.lines().find(|line| line.contains("the device is the one under the file"))?;
        let blocks = line.split(' ').find_map(|word| word.strip_prefix("blocks="))?;
        Some(format!(
            "proof: superblock and file read by the driver and through XFS, {blocks} blocks, are equal"
        ))
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n")
    }

    /// Asks the target to end, and waits until it has.
    pub(super) fn stop(&mut self) -> anyhow::Result<Duration> {
        let Some(mut child) = self.child.take() else { return Ok(Duration::ZERO) };
        let started = Instant::now();
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process has an id")?;
        kill_process(pid, Signal::TERM).map_err(io::Error::from)?;
        while started.elapsed() < STOP_WITHIN {
            if let Some(status) = child.try_wait()? {
                if !status.success() {
                    bail!("the target ended with {status}; its last words:\n{}", self.last_words());
                }
                return Ok(started.elapsed());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        child.kill()?;
        child.wait()?;
        bail!(
            "the target did not end within {} s and was killed:\n{}",
            STOP_WITHIN.as_secs(),
            self.last_words()
        )
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!("{error:#}");
        }
    }
}

fn configuration(lab: &Lab, nqn: &str, device: DemoDevice) -> String {
    let (controller, way) = match device {
        DemoDevice::Uring => (String::new(), "uring"),
        DemoDevice::Nvme => (format!("[[nvme]]\nmodel = \"{}\"\n\n", lab.loop_device()), "nvme"),
    };
    format!(
        "state_dir = \"{}\"\nbuffer_memory = \"32MiB\"\n\n[[listener]]\naddress = \"127.0.0.1:0\"\n\n{controller}\
         [[subsystem]]\nnqn = \"{nqn}\"\nallow_any_host = true\n\n[[subsystem.namespace]]\nfile = \"{}\"\n\
         device = \"{way}\"\nblock_size = 4096\n",
        lab.state_dir().display(),
        lab.file().display()
    )
}

/// A loop device over the image: with direct I/O, as a disk has it, where the filesystem under the image can do that.
fn attach(image: &Path) -> anyhow::Result<String> {
    let losetup = |direct: &str| {
        run(Command::new("losetup").args(["--find", "--show", &format!("--direct-io={direct}")]).arg(image))
    };
    let device = losetup("on").or_else(|_| losetup("off"))?;
    Ok(device.trim().to_owned())
}

/// Runs a program that must succeed, and tells what it said when it does not.
pub(super) fn run(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| {
        format!("cannot run {name}; install it (apt-get install xfsprogs mount e2fsprogs)")
    })?;
    if !output.status.success() {
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn direct(path: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(create).create_new(create).custom_flags(libc::O_DIRECT).open(path)
}
