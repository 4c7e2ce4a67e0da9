//! Files with known layouts.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command};

use fastice::extent::{ExtentError, NoProgress, PinOptions, PinnedFile, StateDir, pin};
use rustix::fs::FallocateFlags;

use super::loopfs::{self, LoopFs};

/// One KiB and one MiB.
pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// The filesystems that every rule is tried on.
pub(crate) const BOTH: [loopfs::Spec; 2] = [loopfs::Spec::XFS, loopfs::Spec::EXT4];

/// A process that does not outlive this.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A byte that depends on the file offset, so that no two blocks are alike.
pub(crate) fn pattern(offset: u64) -> Vec<u8> {
    offset.to_le_bytes().iter().copied().cycle().take(4096).collect()
}

/// The state directory that goes with a filesystem.
pub(crate) fn state_of(fs: &LoopFs) -> StateDir {
    StateDir::open(fs.outside()).expect("a state directory")
}

/// Pins a file with a record there.
pub(crate) fn try_pin(fs: &LoopFs, path: &Path, options: &PinOptions) -> Result<PinnedFile, ExtentError> {
    pin(path, options, &state_of(fs), &mut NoProgress)
}

/// A file of `blocks` written blocks of 4096 bytes, each beginning with its offset.
pub(crate) fn written(path: &Path, blocks: u64) -> File {
    let file = open(path);
    for block in 0..blocks {
        file.write_all_at(&pattern(block * 4096), block * 4096).unwrap();
    }
    file.sync_all().unwrap();
    file
}

/// A new file, open for reading and writing.
pub(crate) fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// A file of `blocks` blocks, on XFS nearly each an extent of its own: its blocks and those of a decoy are allocated
/// in turn.
pub(crate) fn fragmented(path: &Path, blocks: u64, block_len: u64) -> File {
    let file = open(path);
    let decoy = open(&path.with_extension("decoy"));
    for block in 0..blocks {
        for file in [&file, &decoy] {
            fallocate(file, FallocateFlags::empty(), block * block_len, block_len);
        }
    }
    let data = vec![0x5A; usize::try_from(block_len).unwrap()];
    for block in 0..blocks {
        file.write_all_at(&data, block * block_len).unwrap();
    }
    file.sync_all().unwrap();
    file
}

pub(crate) fn fallocate(file: &File, flags: FallocateFlags, start: u64, len: u64) {
    rustix::fs::fallocate(file.as_fd(), flags, start, len).unwrap();
}

pub(crate) fn punch(file: &File, start: u64, len: u64) {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, len);
}

/// Whether a command is refused, with what it says.
pub(crate) fn refused(command: &mut Command) -> String {
    let error = loopfs::run(command).expect_err("the command must be refused");
    assert!(error.contains("not permitted"), "refused otherwise than by EPERM: {error}");
    error
}

/// A command with a path for its last argument.
pub(crate) fn command(program: &str, arguments: &[&str], path: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).arg(path);
    command
}
