//! A filesystem with files that are served pinned, on a loop device in memory, and the blocks of these files on the device.
//!
//! ```text
//!   ours   read at a place of the file -> frozen map -> the block on the disk
//!   peer   read at that very block of the same disk, served as a whole: the host has the map and asks for what it says
//! ```
//!
//! So both sides read the same blocks of the same device in as random an order, and what is between them is the pin's own cost: look-up,
//! check, and a watch that reads the map again and again meanwhile.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fastice::extent::read_map;
use rustix::fs::FallocateFlags;

use super::places::Space;
use super::work::BLOCK_LEN;
use crate::scale::files::{fallocate, fragmented, open};
use crate::scale::loopfs::{LoopFs, Spec};

/// Blocks of each file, and so the most extents that it can have.
const BLOCKS: u64 = 10_000;
/// Memory that a filesystem of this size is not written all over.
const MEMORY: &str = "/dev/shm";
/// A file's blocks, twice for the decoy, three times, and room for the filesystem itself.
const SIZE_MIB: u64 = 512;

/// A filesystem with its files; it goes with this.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) files: Vec<Arc<ServedFile>>,
    _fs: LoopFs,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServedFile {
    /// In names of rows: `file-1-extent`.
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// How many it has.
    pub(super) extents: usize,
    /// Where its blocks are on the disk, in blocks, in their order in the file.
    blocks: Arc<[u64]>,
}

impl Ground {
    /// Makes it; the error says what is missing.
    pub(super) fn make() -> Result<Self> {
        let memory = Path::new(MEMORY);
        let place = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        let spec = Spec { size_mib: SIZE_MIB, ..Spec::XFS };
        let fs = LoopFs::make_in(&place, &spec)
            .map_err(|why| anyhow::anyhow!("no XFS on a loop device: {why}"))?;
        let (one, many) = (fs.path("one"), fs.path("many"));
        let len = BLOCKS * u64::from(BLOCK_LEN);
        let file = open(&one);
        fallocate(&file, FallocateFlags::empty(), 0, len);
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0x5A), len), &mut &file)?;
        file.sync_all()?;
        drop(file);
        drop(fragmented(&many, BLOCKS, u64::from(BLOCK_LEN)));
        let files = vec![ServedFile::of(one, 1)?, ServedFile::of(many, BLOCKS)?];
        Ok(Self { files: files.into_iter().map(Arc::new).collect(), _fs: fs })
    }
}

impl ServedFile {
    /// Takes its map, which must be of `wanted` extents or nearly so.
    fn of(path: PathBuf, wanted: u64) -> Result<Self> {
        let (identity, extents) = read_map(&path)?;
        let (block, start) = (u64::from(BLOCK_LEN), identity.disk.partition_start.get());
        let mut blocks = Vec::new();
        for extent in &extents {
            let at = extent.device_offset.get() + start;
            ensure!(
                at % block == 0 && extent.len.get() % block == 0,
                "an extent that is not of whole blocks"
            );
            blocks.extend((0..extent.len.get() / block).map(|block_no| at / block + block_no));
        }
        let count = extents.len();
        let most = usize::try_from(wanted)?;
        ensure!(count <= most && count * 100 >= most * 99, "{} has {count} extents", path.display());
        let name = format!("file-{wanted}-extent{}", if wanted == 1 { "" } else { "s" });
        Ok(Self { name, path, extents: count, blocks: blocks.into() })
    }

    /// All of it, as a namespace.
    pub(super) fn space(&self) -> Space {
        Space::whole(self.blocks.len() as u64 * u64::from(BLOCK_LEN))
    }

    /// Its blocks, on the disk.
    pub(super) fn space_on_disk(&self) -> Space {
        Space { blocks: Some(Arc::clone(&self.blocks)), ..self.space() }
    }

    /// As an argument for a process that serves it.
    pub(super) fn path_text(&self) -> Result<&str> {
        self.path.to_str().context("a path that is not text")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::loopfs::skip;

    #[test]
    fn a_file_of_one_and_one_of_many_extents_have_their_blocks_told() {
        let ground = match Ground::make() {
            Ok(ground) => ground,
            Err(why) => return skip("files to serve pinned", &why.to_string()),
        };
        let [one, many] = &ground.files[..] else { panic!("two files: {ground:?}") };
        assert_eq!((one.name.as_str(), many.name.as_str()), ("file-1-extent", "file-10000-extents"));
        assert!(one.blocks.windows(2).all(|pair| pair[1] == pair[0] + 1), "one extent");
        let jumps = many.blocks.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
        assert!(jumps as u64 >= BLOCKS * 99 / 100 - 1, "{jumps}");
        assert_eq!(one.space().len, BLOCKS * u64::from(BLOCK_LEN));
        assert_eq!(one.blocks.len() as u64, BLOCKS);
    }
}
