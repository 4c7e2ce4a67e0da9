//! Filesystems for the measurements, with a file that is as fragmented as can be.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use fastice::extent::StateDir;

use super::Plan;
use super::files::{fragmented, written};
use super::loopfs::{LoopFs, Spec, skip};
use crate::rest;

/// Small blocks: a million of them are one gigabyte.
const BLOCK_LEN: u64 = 1024;
/// Where a file of a million extents is written in half a minute: every block is a write of its own to the image.
const MEMORY: &str = "/dev/shm";
/// Blocks of 4096 bytes in each of many files.
const SMALL_FILE_BLOCKS: u64 = 16;

/// A filesystem, and beside it a directory for records.
#[derive(Debug)]
pub(super) struct Ground {
    kind: &'static str,
    fs: LoopFs,
    /// On an ordinary disk, as the records of pins are.
    state: tempfile::TempDir,
}

impl Ground {
    /// XFS and ext4, or `only` one of them, each with a file of `extents` extents, made side by side. Those that cannot be made are skipped.
    pub(super) fn make_all(extents: u64, only: Option<&str>) -> Result<Vec<Self>> {
        let size_mib = 512 + ((extents * BLOCK_LEN * 3) >> 20);
        let specs = [
            Spec { mkfs: &["-q", "-m", "reflink=1", "-b", "size=1024"], size_mib, ..Spec::XFS },
            Spec { mkfs: &["-q", "-F", "-b", "1024"], size_mib, ..Spec::EXT4 },
        ];
        let wanted = specs.into_iter().filter(|spec| only.is_none_or(|only| spec.kind == only));
        let making: Vec<_> = wanted.map(|spec| thread::spawn(move || Self::make(&spec, extents))).collect();
        let mut grounds = Vec::new();
        for made in making {
            grounds.extend(made.join().map_err(|_| anyhow!("a filesystem cannot be filled"))??);
        }
        Ok(grounds)
    }

    fn make(spec: &Spec, extents: u64) -> Result<Option<Self>> {
        let memory = Path::new(MEMORY);
        let place = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        let fs = match LoopFs::make_in(&place, spec) {
            Ok(fs) => fs,
            Err(reason) => {
                skip(&format!("scale on {}", spec.kind), &reason);
                return Ok(None);
            }
        };
        let ground = Self { kind: spec.kind, fs, state: tempfile::tempdir()? };
        let path = ground.fragmented_file();
        drop(fragmented(&path, extents, BLOCK_LEN));
        fs::remove_file(path.with_extension("decoy"))?;
        Ok(Some(ground))
    }

    /// Waits until the filesystem has done all that it was told, and the machine is at rest. Says so where it does not come to rest:
    /// the figures are then of a busy machine.
    pub(super) fn settle(&self, plan: &Plan) -> Result<()> {
        let root = fs::File::open(self.fs.root()).context("the filesystem is gone")?;
        rustix::fs::syncfs(&root)?;
        if plan.rest.is_zero() {
            return Ok(());
        }
        if let Err(busy) = rest::wait(plan.rest, || false) {
            (plan.tell)(&format!("before the measurements on {}: {busy}", self.kind));
        }
        Ok(())
    }

    /// The name of the filesystem.
    pub(super) const fn kind(&self) -> &'static str {
        self.kind
    }

    /// The file of many extents.
    pub(super) fn fragmented_file(&self) -> PathBuf {
        self.fs.path("fragmented")
    }

    /// Makes `count` small files.
    pub(super) fn make_files(&self, count: u64) -> Result<Vec<PathBuf>> {
        let directory = self.fs.path("many");
        fs::create_dir(&directory)?;
        let paths: Vec<_> = (0..count).map(|number| directory.join(number.to_string())).collect();
        paths.iter().for_each(|path| drop(written(path, SMALL_FILE_BLOCKS)));
        Ok(paths)
    }

    /// Where pins are recorded when their cost does not matter: in memory.
    pub(super) fn quick_state(&self) -> Result<StateDir> {
        Ok(StateDir::open(self.fs.outside())?)
    }

    /// Where pins are recorded.
    pub(super) fn state(&self) -> Result<StateDir> {
        Ok(StateDir::open(self.state.path())?)
    }
}
