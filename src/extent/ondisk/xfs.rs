//! XFS: superblock, inode, extents in the inode or in a B+tree (`xfs_format.h`; "XFS Algorithms & Data Structures").
//!
//! ```text
//!   inode number = allocation group | block in it | inode in the block
//!   file system block = allocation group << agblklog | block in it
//!   data fork:  extents   16-byte records in the inode
//!               btree     root in the inode -> nodes -> leaves, chained left to right
//! ```
//!
//! Nothing is read from a filesystem whose log has to be replayed first.

mod log;

use super::bytes::{be16, be32, be64, byte, uuid};
use super::{Found, OnDiskError, OnDiskFile, ReadAt, read_vec};
use crate::extent::identity::{FilesystemKind, MapIdentity};
use crate::units::ByteLen;
use log::Log;

const SUPERBLOCK_MAGIC: u32 = u32::from_be_bytes(*b"XFSB");
const INODE_MAGIC: u16 = u16::from_be_bytes(*b"IN");
const BTREE_MAGIC_V5: u32 = u32::from_be_bytes(*b"BMA3");
const BTREE_MAGIC_V4: u32 = u32::from_be_bytes(*b"BMAP");
const SUPERBLOCK_LEN: usize = 512;
const RECORD_LEN: usize = 16;
const BTREE_LEVELS_MAX: u16 = 10;

/// `sb_features_incompat` that change nothing here, or that are understood: FTYPE, SPINODES, META_UUID, BIGTIME,
/// NREXT64, EXCHRANGE, PARENT, METADIR. NEEDSREPAIR (0x10) and what is newer are refused.
const INCOMPAT_KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80 | 0x100;
const FLAG_REALTIME: u16 = 1 << 0;
const FLAG_IMMUTABLE: u16 = 1 << 3;
const FLAG2_LARGE_COUNTS: u64 = 1 << 4;
const FORMAT_EXTENTS: u8 = 2;
const FORMAT_BTREE: u8 = 3;
const MODE_REGULAR: u16 = 0o100_000;
const MODE_TYPE: u16 = 0o170_000;

/// What is needed of the superblock.
struct Geometry {
    v5: bool,
    block: u64,
    blocks: u64,
    ag_blocks: u64,
    ag_count: u64,
    ag_block_log: u8,
    inode: usize,
    inodes_per_block_log: u8,
    /// As a filesystem block number; zero for a log on a device of its own.
    log_start: u64,
    log_blocks: u32,
    uuid: [u8; 16],
}

pub(super) fn read(device: &mut dyn ReadAt, identity: &MapIdentity) -> Result<OnDiskFile, OnDiskError> {
    let geometry = Geometry::read(device, identity)?;
    geometry.log()?.refuse_unclean(device)?;
    let other = OnDiskError::OtherFile { inode: identity.inode };
    let at = geometry.inode_at(identity.inode).ok_or(other)?;
    let inode = read_vec(device, at, geometry.inode)?;
    let core_len = geometry.check_inode(&inode, at, identity)?;
    if be16(&inode, 90) & FLAG_REALTIME != 0 {
        return Err(OnDiskError::Unsupported { what: "an XFS realtime file" });
    }
    let fork = data_fork(&inode, core_len).ok_or(OnDiskError::Damaged { what: "inode", offset: at })?;
    let count = if geometry.v5 && be64(&inode, 120) & FLAG2_LARGE_COUNTS != 0 {
        be64(&inode, 24)
    } else {
        u64::from(be32(&inode, 76))
    };
    let mut found = Found::new(geometry.block, geometry.blocks);
    match byte(&inode, 5) {
        FORMAT_EXTENTS => geometry.records(fork, count, &mut found),
        FORMAT_BTREE => geometry.btree(device, fork, count, identity.inode, &mut found)?,
        _ => return Err(OnDiskError::Unsupported { what: "an XFS file whose data is in its inode" }),
    }
    .ok_or(OnDiskError::Damaged { what: "extent list of the inode", offset: at })?;
    Ok(OnDiskFile {
        size: ByteLen(be64(&inode, 56)),
        immutable: be16(&inode, 90) & FLAG_IMMUTABLE != 0,
        extents: found.extents,
    })
}

/// The data fork: what follows the core, up to the attribute fork.
fn data_fork(inode: &[u8], core_len: usize) -> Option<&[u8]> {
    let end = match usize::from(byte(inode, 82)) {
        0 => inode.len(),
        words => core_len + words * 8,
    };
    inode.get(core_len..end)
}

impl Geometry {
    fn read(device: &mut dyn ReadAt, identity: &MapIdentity) -> Result<Self, OnDiskError> {
        let data = read_vec(device, 0, SUPERBLOCK_LEN)?;
        if be32(&data, 0) != SUPERBLOCK_MAGIC || uuid(&data, 32) != identity.filesystem.uuid {
            return Err(OnDiskError::OtherFilesystem { kind: FilesystemKind::Xfs });
        }
        let version = be16(&data, 100) & 0xF;
        let v5 = version == 5;
        if !matches!(version, 4 | 5) || (v5 && be32(&data, 216) & !INCOMPAT_KNOWN != 0) {
            return Err(OnDiskError::Unsupported {
                what: "an XFS with features that are newer or need a repair",
            });
        }
        let geometry = Self {
            v5,
            block: u64::from(be32(&data, 4)),
            blocks: be64(&data, 8),
            ag_blocks: u64::from(be32(&data, 84)),
            ag_count: u64::from(be32(&data, 88)),
            ag_block_log: byte(&data, 124),
            inode: usize::from(be16(&data, 104)),
            inodes_per_block_log: byte(&data, 123),
            log_start: be64(&data, 48),
            log_blocks: be32(&data, 96),
            uuid: uuid(&data, 32),
        };
        let damaged = OnDiskError::Damaged { what: "superblock", offset: 0 };
        if geometry.is_plausible(byte(&data, 120)) { Ok(geometry) } else { Err(damaged) }
    }

    fn is_plausible(&self, block_log: u8) -> bool {
        matches!(block_log, 9..=16)
            && self.block == 1 << block_log
            && matches!(self.inode, 256..=2048)
            && self.inode.is_power_of_two()
            && self.inode as u64 <= self.block
            && self.inodes_per_block_log < 16
            && self.block >> self.inodes_per_block_log == self.inode as u64
            && matches!(self.ag_block_log, 1..=31)
            && self.ag_blocks > 0
            && self.ag_blocks <= 1 << self.ag_block_log
            && self.ag_count > 0
            && self.blocks.checked_mul(self.block).is_some_and(|bytes| i64::try_from(bytes).is_ok())
            && self.blocks <= self.ag_blocks * self.ag_count
    }

    fn log(&self) -> Result<Log, OnDiskError> {
        if self.log_start == 0 {
            return Err(OnDiskError::Unsupported { what: "an XFS with its log on another device" });
        }
        let first = self.block_of(self.log_start);
        let first = first.ok_or(OnDiskError::Damaged { what: "place of the log", offset: 0 })?;
        let len = u64::from(self.log_blocks) * self.block;
        Ok(Log { offset: first * self.block, len, uuid: self.uuid })
    }

    /// Where an inode lies, in bytes; `None` when its number is none of this filesystem.
    fn inode_at(&self, number: u64) -> Option<u64> {
        let block = self.block_of(number >> self.inodes_per_block_log)?;
        let index = number & ((1 << self.inodes_per_block_log) - 1);
        Some(block * self.block + index * self.inode as u64)
    }

    /// The block, counted through, of a filesystem block number.
    fn block_of(&self, number: u64) -> Option<u64> {
        let (group, in_group) = (number >> self.ag_block_log, number & ((1 << self.ag_block_log) - 1));
        if group >= self.ag_count || in_group >= self.ag_blocks {
            return None;
        }
        let block = group * self.ag_blocks + in_group;
        (block < self.blocks).then_some(block)
    }

    /// Whether this is the inode of the pinned file; the length of its core.
    fn check_inode(&self, inode: &[u8], at: u64, identity: &MapIdentity) -> Result<usize, OnDiskError> {
        let damaged = Err(OnDiskError::Damaged { what: "inode", offset: at });
        if be16(inode, 0) != INODE_MAGIC {
            return damaged;
        }
        let version = byte(inode, 4);
        let core_len = match (self.v5, version) {
            (true, 3) => 176,
            (false, 1 | 2) => 100,
            _ => return damaged,
        };
        if self.v5 && be64(inode, 152) != identity.inode {
            return damaged;
        }
        let is_file = be16(inode, 2) & MODE_TYPE == MODE_REGULAR;
        // A link count of zero is a file that was removed.
        let links = if version == 1 { u32::from(be16(inode, 6)) } else { be32(inode, 16) };
        if !is_file || links == 0 || be32(inode, 92) != identity.inode_generation {
            return Err(OnDiskError::OtherFile { inode: identity.inode });
        }
        Ok(core_len)
    }

    /// Adds `count` records from the start of `data`. `None` when they are not all there, or cannot be.
    fn records(&self, data: &[u8], count: u64, found: &mut Found) -> Option<()> {
        let count = usize::try_from(count).ok()?;
        let data = data.get(..count.checked_mul(RECORD_LEN)?)?;
        for record in data.chunks_exact(RECORD_LEN) {
            let (high, low) = (be64(record, 0), be64(record, 8));
            let unwritten = high >> 63 != 0;
            let file_block = high >> 9 & ((1 << 54) - 1);
            let start = (high & 0x1FF) << 43 | low >> 21;
            let blocks = low & ((1 << 21) - 1);
            let first = self.block_of(start)?;
            // A run never crosses into the next allocation group.
            let in_group = start & ((1 << self.ag_block_log) - 1);
            if in_group + blocks > self.ag_blocks {
                return None;
            }
            found.add(file_block, first, blocks, unwritten).then_some(())?;
        }
        Some(())
    }

    /// Walks the B+tree from its root in the inode. `None` when the root cannot be.
    fn btree(
        &self,
        device: &mut dyn ReadAt,
        root: &[u8],
        count: u64,
        inode: u64,
        found: &mut Found,
    ) -> Result<Option<()>, OnDiskError> {
        let (level, entries) = (be16(root, 0), be16(root, 2));
        let most = root.len().saturating_sub(4) / 16;
        if level == 0 || level > BTREE_LEVELS_MAX || entries == 0 || usize::from(entries) > most {
            return Ok(None);
        }
        let mut child = be64(root, 4 + most * 8);
        // Down the left edge to the first leaf.
        for level in (1..level).rev() {
            let node = self.node(device, child, level, inode)?;
            child = be64(&node.data, node.header + node.fits(16) * 8);
        }
        // Along the leaves. Each holds at least one record, so that there are no more leaves than records.
        let mut left = count;
        loop {
            let leaf = self.node(device, child, 0, inode)?;
            let records = u64::from(be16(&leaf.data, 6));
            let rest = left.checked_sub(records).ok_or(leaf.damaged())?;
            let body = leaf.data.get(leaf.header..).unwrap_or_default();
            self.records(body, records, found).ok_or(leaf.damaged())?;
            left = rest;
            child = be64(&leaf.data, 16);
            if child == u64::MAX {
                return Ok((left == 0).then_some(()));
            }
        }
    }

    fn node(
        &self,
        device: &mut dyn ReadAt,
        number: u64,
        level: u16,
        inode: u64,
    ) -> Result<Node, OnDiskError> {
        let outside = OnDiskError::Damaged { what: "pointer of the extent tree", offset: number };
        let at = self.block_of(number).ok_or(outside)? * self.block;
        // A block is at most 64 KiB.
        let data = read_vec(device, at, usize::try_from(self.block).unwrap_or(0))?;
        let (magic, header) = if self.v5 { (BTREE_MAGIC_V5, 72) } else { (BTREE_MAGIC_V4, 24) };
        let node = Node { data, header, at };
        let entries = usize::from(be16(&node.data, 6));
        let owned = !self.v5 || be64(&node.data, 56) == inode;
        if be32(&node.data, 0) != magic
            || be16(&node.data, 4) != level
            || entries == 0
            || entries > node.fits(16)
            || !owned
        {
            return Err(node.damaged());
        }
        Ok(node)
    }
}

/// A block of the extent tree.
struct Node {
    data: Vec<u8>,
    header: usize,
    at: u64,
}

impl Node {
    /// How many entries of `len` bytes it has room for.
    const fn fits(&self, len: usize) -> usize {
        self.data.len().saturating_sub(self.header) / len
    }

    const fn damaged(&self) -> OnDiskError {
        OnDiskError::Damaged { what: "block of the extent tree", offset: self.at }
    }
}
