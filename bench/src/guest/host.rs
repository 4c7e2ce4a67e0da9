//! The kernel's initiator: connected by nvme-cli, found again in sysfs.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6d2a1a5e-9d43-4c11-9f0a-0000000000be";
const HOST_ID: &str = "6d2a1a5e-9d43-4c11-9f0a-0000000000be";
/// For the namespace to show up.
const PATIENCE: Duration = Duration::from_secs(20);

/// A namespace of a target, as a disk, until it is dropped.
#[derive(Debug)]
pub(super) struct Connected {
    nqn: String,
    disk: PathBuf,
}

impl Connected {
    pub(super) fn to(address: SocketAddr, nqn: &str, io_queues: u16) -> Result<Self> {
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        let queues = io_queues.to_string();
        let words = ["connect", "-t", "tcp", "-a", &ip, "-s", &port, "-n", nqn, "--nr-io-queues", &queues];
        nvme(&[&words[..], &["--hostnqn", HOST_NQN, "--hostid", HOST_ID]].concat())?;
        // From here on it is disconnected whatever happens.
        let mut connected = Self { nqn: nqn.to_owned(), disk: PathBuf::new() };
        let begun = Instant::now();
        loop {
            if let Some(name) = disk_of(Path::new("/sys/block"), nqn) {
                connected.disk = Path::new("/dev").join(name);
                return Ok(connected);
            }
            ensure!(begun.elapsed() < PATIENCE, "no disk of {nqn} after {PATIENCE:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(super) fn disk(&self) -> &Path {
        &self.disk
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        if let Err(error) = nvme(&["disconnect", "-n", &self.nqn]) {
            let _ = std::io::Write::write_fmt(&mut std::io::stderr().lock(), format_args!("{error:#}\n"));
        }
    }
}

/// nvme-cli with these words, quietly unless it fails.
fn nvme(words: &[&str]) -> Result<()> {
    let output = Command::new("nvme").args(words).output().context("nvme (nvme-cli) cannot be started")?;
    if !output.status.success() {
        bail!("nvme {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The disk that users see of a subsystem, once its size is known. (With native multipathing the paths to it are hidden.)
fn disk_of(block: &Path, nqn: &str) -> Option<String> {
    let text = |path: &Path, file: &str| fs::read_to_string(path.join(file)).ok();
    fs::read_dir(block).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        let is_it = text(&path, "device/subsysnqn")?.trim() == nqn
            && text(&path, "hidden")?.trim() == "0"
            && text(&path, "size")?.trim().parse::<u64>().ok()? > 0;
        is_it.then(|| entry.file_name().into_string().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_the_one_of_the_subsystem_that_is_seen_and_has_a_size() {
        let directory = tempfile::tempdir().unwrap();
        let add = |name: &str, nqn: &str, hidden: &str, size: &str| {
            let path = directory.path().join(name);
            fs::create_dir_all(path.join("device")).unwrap();
            fs::write(path.join("device/subsysnqn"), format!("{nqn}\n")).unwrap();
            fs::write(path.join("hidden"), format!("{hidden}\n")).unwrap();
            fs::write(path.join("size"), format!("{size}\n")).unwrap();
        };
        fs::create_dir(directory.path().join("sda")).unwrap();
        add("nvme0c0n1", "nqn.a", "1", "8");
        add("nvme1n1", "nqn.b", "0", "8");
        add("nvme0n1", "nqn.a", "0", "0");
        assert_eq!(disk_of(directory.path(), "nqn.a"), None, "its size is not known");
        add("nvme0n1", "nqn.a", "0", "8");
        assert_eq!(disk_of(directory.path(), "nqn.a").as_deref(), Some("nvme0n1"));
    }
}
