//! Whoever is given the blocks that a pinned file lost.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use crate::broken::End;
use crate::daemon::create;
use crate::disk::{Disk, PIECE, damage, piece, take_all_room};

const PATTERN: u64 = 9999;
/// How long hosts may try what they are refused.
const AFTERMATH: Duration = Duration::from_millis(20);

/// Small extents that it has from the beginning, and where they begin: the blocks of its tree are not to be among those that
/// were freed, for a host that writes those would write the filesystem's own.
const EXTENTS: u64 = 60;
const EXTENTS_AT: u64 = 1 << 30;
/// What is left free of what the thief is not to have.
const LEFT_FREE: u64 = 1 << 20;

/// Has all free blocks, and a pattern of its own in them. Gone when dropped.
pub(crate) struct Thief {
    path: PathBuf,
    file: File,
    len: u64,
    hoard: Option<PathBuf>,
}

impl Thief {
    /// Waits for blocks of `disk`. Where every moment counts, somebody else has all that is free before that.
    pub(crate) fn waiting_on(disk: &Disk, end: End) -> Self {
        let path = disk.lab.fs.path("thief");
        let file = create(&path);
        for extent in 0..EXTENTS {
            file.write_all_at(&[7; 4096], EXTENTS_AT + 8192 * extent).expect("room");
        }
        file.sync_all().expect("a disk");
        let hoard = (end == End::Noticed).then(|| disk.hoard("hoard", LEFT_FREE));
        Self { path, file, len: 0, hoard }
    }

    /// What is in it that it has not written: offsets, and whether a host did.
    pub(crate) fn damage(&self) -> Vec<(u64, bool)> {
        damage(&self.file, PATTERN, self.len)
    }

    /// Takes what is free. Blocks that were freed a moment ago can be had when that is on the disk.
    pub(crate) fn grow(&mut self) {
        rustix::fs::syncfs(&self.file).expect("a disk");
        let len = take_all_room(&self.file, self.len);
        self.write(self.len, len);
        self.len = len;
    }

    fn write(&self, from: u64, to: u64) {
        for at in (from..to).step_by(PIECE) {
            self.file.write_all_at(&piece(PATTERN, at), at).expect("its own blocks");
        }
        self.file.sync_all().expect("a disk");
    }

    /// Nobody but the thief writes what it was given. `end_hosts` ends those who still try to.
    ///
    /// Where the change is only noticed when it has taken blocks, hosts may have written what was another's until then; how
    /// much is told. From the fence on there must be no more.
    pub(crate) fn assert_alone<T>(&mut self, what: &str, end: End, end_hosts: impl FnOnce() -> T) -> T {
        if end == End::Noticed {
            let damage = self.damage();
            let remote = damage.iter().filter(|(_, remote)| *remote).count();
            println!("{what}: of {} KiB that were free, hosts wrote {remote} sectors", self.len >> 10);
            assert_eq!(damage.len(), remote, "{what}: neither hosts nor the thief wrote that");
            self.write(0, self.len);
        }
        std::thread::sleep(AFTERMATH);
        let ended = end_hosts();
        assert_eq!(self.damage(), [], "{what}: hosts wrote sectors of another file");
        self.grow();
        assert_eq!(self.damage(), [], "{what}: what was freed late is not quiet");
        ended
    }
}

impl Drop for Thief {
    fn drop(&mut self) {
        [Some(&self.path), self.hoard.as_ref()].into_iter().flatten().for_each(|path| {
            let _ = fs::remove_file(path);
        });
    }
}
