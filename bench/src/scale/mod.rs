//! fastice at scale: a million extents in one file, and a thousand pinned files.
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `scale/FS/N-extents/pin` | the default pin, guards and record and all, of a file of N extents | bare fsync and FIEMAP of that file |
//! | `scale/FS/N-extents/watch/look` | processor time of one look of the watch | the same bare calls |
//! | `scale/FS/N-extents/watch/interval` | seconds between two looks that the watch chose | |
//! | `scale/FS/N-extents/watch/share` | what guard and watch took of a core, over whole intervals | |
//! | `scale/FS/N-files/pin` | the default pin of N files, one after the other | bare fsync and FIEMAP of those files |
//! | `scale/FS/N-files/watch/...` | as above, of all files together | |
//! | `scale/lookup/N-extents/...` | random lookups in a map of N extents | the same in a map of one |
//! | `scale/FS/N-extents/memory/...` | bytes an extent that stay for a served file, and more for a moment | |
//!
//! The filesystems are made for it, on loop devices in memory; pins are recorded on the disk that has the temporary
//! directory. That takes root.

mod bare;
mod ground;
pub mod lookup;
mod memory;
mod pin;
mod waits;
mod watch;

#[expect(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../../../tests/extent_real/files.rs"]
pub(crate) mod files;
#[expect(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../../../tests/common/loopfs.rs"]
pub(crate) mod loopfs;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::report::{Measurement, Row};
use ground::Ground;

pub use memory::Counting;

/// How much, how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Extents of the one file.
    pub extents: u64,
    /// Pinned files.
    pub files: u64,
    /// Rounds of each side.
    pub rounds: usize,
    /// Only the pin of the one file, on the filesystem of this name.
    pub only_pin: Option<String>,
    /// Only the lookups of a turn, and what they wait for.
    pub only_waits: bool,
    /// How long the machine may take to come to rest before a part.
    pub rest: Duration,
    /// See [`Row::machine`].
    pub machine: String,
    /// Told of each row.
    pub tell: fn(&str),
}

impl Plan {
    fn row(&self, rows: &mut Vec<Row>, measured: &Measurement<'_>) -> Result<()> {
        let row = Row::new(measured, &self.machine);
        let row = row.with_context(|| format!("{} was not measured", measured.name))?;
        (self.tell)(&row.to_string());
        rows.push(row);
        Ok(())
    }

    /// All of it. What cannot run here is skipped, loudly.
    ///
    /// # Errors
    /// When something does not work that should.
    pub fn run(&self, rows: &mut Vec<Row>) -> Result<()> {
        ensure!(
            self.extents > 0 && self.files > 0 && self.rounds > 0,
            "there must be extents, files and rounds"
        );
        if let Some(kind) = &self.only_pin {
            return self.run_pin(kind, rows);
        }
        if self.only_waits {
            return waits::rows(self, rows);
        }
        lookup::rows(self, rows)?;
        for ground in Ground::make_all(self.extents, None)? {
            let name = format!("scale/{}/{}-extents", ground.kind(), self.extents);
            ground.settle(self)?;
            pin::one_file(self, rows, &ground, &name)?;
            memory::rows(self, rows, &ground, &name)?;
            watch::one_file(self, rows, &ground, &name)?;
            let many = ground.make_files(self.files)?;
            ground.settle(self)?;
            let name = format!("scale/{}/{}-files", ground.kind(), self.files);
            pin::many_files(self, rows, &ground, &many, &name)?;
            watch::many_files(self, rows, &ground, &many, &name)?;
        }
        Ok(())
    }

    fn run_pin(&self, kind: &str, rows: &mut Vec<Row>) -> Result<()> {
        let grounds = Ground::make_all(self.extents, Some(kind))?;
        let ground = grounds.first().with_context(|| format!("there is no {kind} here"))?;
        ground.settle(self)?;
        pin::one_file(self, rows, ground, &format!("scale/{kind}/{}-extents", self.extents))
    }
}
