//! The kernel's target, made in configfs (`Documentation/nvme/` and `drivers/nvme/target/configfs.c` say what the files are), and null_blk
//! for it to stand on.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::{Listens, NULL_LEN};

const CONFIGFS: &str = "/sys/kernel/config";
const NQN: &str = "nqn.2026-11.io.fastice:nvmet";
/// It takes no other number for "any".
const PORT: u16 = 4430;
/// Of null_blk's instance.
const NULL_NAME: &str = "fastice-bench";

/// nvmet-tcp with one namespace, until it is dropped.
#[derive(Debug)]
pub(super) struct Nvmet {
    /// Directories and links, in the order in which they were made.
    _made: Made,
    // After the target on it.
    _null: Option<Made>,
}

/// What was made in configfs; taken away in reverse order.
#[derive(Debug, Default)]
struct Made(Vec<PathBuf>);

impl Made {
    fn directory(&mut self, path: PathBuf) -> Result<PathBuf> {
        fs::create_dir(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        self.0.push(path.clone());
        Ok(path)
    }

    fn link(&mut self, to: &Path, path: PathBuf) -> Result<()> {
        symlink(to, &path).with_context(|| format!("{} cannot be made", path.display()))?;
        self.0.push(path);
        Ok(())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.0.drain(..).rev() {
            let removed = if path.is_symlink() { fs::remove_file(&path) } else { fs::remove_dir(&path) };
            if let Err(error) = removed {
                let _ = std::io::Write::write_fmt(
                    &mut std::io::stderr().lock(),
                    format_args!("{} stays: {error}\n", path.display()),
                );
            }
        }
    }
}

fn set(directory: &Path, file: &str, value: impl std::fmt::Display) -> Result<()> {
    let path = directory.join(file);
    fs::write(&path, value.to_string()).with_context(|| format!("{} does not take {value}", path.display()))
}

impl Nvmet {
    /// On a disk.
    pub(super) fn on(disk: &Path) -> Result<Self> {
        Ok(Self { _made: target(&Path::new(CONFIGFS).join("nvmet"), disk)?, _null: None })
    }

    /// On null_blk as it is by default, but for completions: at once, as our null device has them.
    pub(super) fn on_null() -> Result<Self> {
        let (null, disk) = null_blk(&Path::new(CONFIGFS).join("nullb"))?;
        Ok(Self { _null: Some(null), ..Self::on(&disk)? })
    }
}

impl Listens for Nvmet {
    fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, PORT))
    }

    fn nqn(&self) -> &str {
        NQN
    }
}

fn target(nvmet: &Path, disk: &Path) -> Result<Made> {
    ensure!(nvmet.is_dir(), "there is no {}: modprobe nvmet-tcp", nvmet.display());
    let mut made = Made::default();
    let subsystem = made.directory(nvmet.join("subsystems").join(NQN))?;
    set(&subsystem, "attr_allow_any_host", 1)?;
    let namespace = made.directory(subsystem.join("namespaces/1"))?;
    set(&namespace, "device_path", disk.display())?;
    set(&namespace, "enable", 1)?;
    let port = made.directory(nvmet.join("ports/1"))?;
    set(&port, "addr_trtype", "tcp")?;
    set(&port, "addr_adrfam", "ipv4")?;
    set(&port, "addr_traddr", Ipv4Addr::LOCALHOST)?;
    set(&port, "addr_trsvcid", PORT)?;
    // It listens from here on.
    made.link(&subsystem, port.join("subsystems").join(NQN))?;
    Ok(made)
}

fn null_blk(nullb: &Path) -> Result<(Made, PathBuf)> {
    ensure!(nullb.is_dir(), "there is no {}: modprobe null_blk nr_devices=0", nullb.display());
    let mut made = Made::default();
    let device = made.directory(nullb.join(NULL_NAME))?;
    set(&device, "size", NULL_LEN >> 20)?;
    set(&device, "blocksize", 4096)?;
    // Bios are completed where they are submitted: its cheapest way.
    set(&device, "queue_mode", 0)?;
    set(&device, "power", 1)?;
    Ok((made, Path::new("/dev").join(NULL_NAME)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_taken_away_in_reverse_also_when_the_rest_fails() {
        let directory = tempfile::tempdir().unwrap();
        let nvmet = directory.path().join("nvmet");
        assert!(target(&nvmet, Path::new("/dev/x")).is_err(), "there is none");
        // An ordinary directory shows no files of its own to be set: the first one that must be there is missing.
        for part in ["subsystems", "ports"] {
            fs::create_dir_all(nvmet.join(part)).unwrap();
        }
        let error = target(&nvmet, Path::new("/dev/x")).unwrap_err();
        assert!(format!("{error:#}").contains("namespaces/1"), "{error:#}");
        let mut made = Made::default();
        let outer = made.directory(directory.path().join("outer")).unwrap();
        let inner = made.directory(outer.join("inner")).unwrap();
        made.link(&outer, inner.join("link")).unwrap();
        drop(made);
        assert!(!outer.exists());
    }
}
