//! ext4: superblock, group descriptor, inode, extent tree (`Documentation/filesystems/ext4`).
//!
//! ```text
//!   inode number -> block group -> its descriptor -> inode table -> inode
//!   i_block: header, then index entries (depth above 0: blocks of the same form) or extents (depth 0)
//! ```

use super::bytes::{le16, le32, uuid};
use super::{Found, OnDiskError, OnDiskFile, ReadAt, read_vec};
use crate::extent::identity::{FilesystemKind, MapIdentity};
use crate::units::ByteLen;

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_LEN: usize = 1024;
const SUPERBLOCK_MAGIC: u16 = 0xEF53;
const EXTENT_MAGIC: u16 = 0xF30A;
const ENTRY_LEN: usize = 12;
const DEPTH_MAX: u16 = 5;
/// Lengths above this mean an unwritten extent of so much less.
const INITIALISED_MAX: u16 = 32768;

const STATE_CLEAN: u16 = 0x1;
const STATE_ERRORS: u16 = 0x2;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
/// FILETYPE, RECOVER (looked at on its own), EXTENTS, 64BIT, MMP, FLEX_BG, EA_INODE, DIRDATA, CSUM_SEED, LARGEDIR,
/// INLINE_DATA, ENCRYPT, CASEFOLD: none moves an extent.
const INCOMPAT_KNOWN: u32 =
    0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;
const FLAG_IMMUTABLE: u32 = 0x10;
const FLAG_EXTENTS: u32 = 0x8_0000;
const MODE_REGULAR: u16 = 0o100_000;
const MODE_TYPE: u16 = 0o170_000;

/// What is needed of the superblock.
struct Geometry {
    block: u64,
    blocks: u64,
    first_data_block: u64,
    inodes: u64,
    inodes_per_group: u64,
    inode: usize,
    descriptor: u64,
}

pub(super) fn read(device: &mut dyn ReadAt, identity: &MapIdentity) -> Result<OnDiskFile, OnDiskError> {
    let geometry = Geometry::read(device, identity)?;
    let at = geometry.inode_at(device, identity.inode)?;
    let inode = read_vec(device, at, geometry.inode)?;
    let is_file = le16(&inode, 0) & MODE_TYPE == MODE_REGULAR;
    // A link count of zero is a file that was removed.
    if !is_file || le16(&inode, 26) == 0 || le32(&inode, 100) != identity.inode_generation {
        return Err(OnDiskError::OtherFile { inode: identity.inode });
    }
    let flags = le32(&inode, 32);
    if flags & FLAG_EXTENTS == 0 {
        return Err(OnDiskError::Unsupported { what: "an ext4 file without extents" });
    }
    let mut found = Found::new(geometry.block, geometry.blocks);
    let root = inode.get(40..100).unwrap_or_default().to_vec();
    let depth = le16(&root, 6);
    if depth > DEPTH_MAX {
        return Err(OnDiskError::Damaged { what: "extent tree of the inode", offset: at });
    }
    geometry.walk(device, Node { data: root, at }, depth, &mut found)?;
    Ok(OnDiskFile {
        size: ByteLen(u64::from(le32(&inode, 4)) | u64::from(le32(&inode, 108)) << 32),
        immutable: flags & FLAG_IMMUTABLE != 0,
        extents: found.extents,
    })
}

impl Geometry {
    fn read(device: &mut dyn ReadAt, identity: &MapIdentity) -> Result<Self, OnDiskError> {
        let data = read_vec(device, SUPERBLOCK_AT, SUPERBLOCK_LEN)?;
        if le16(&data, 56) != SUPERBLOCK_MAGIC || uuid(&data, 104) != identity.filesystem.uuid {
            return Err(OnDiskError::OtherFilesystem { kind: FilesystemKind::Ext4 });
        }
        let incompat = le32(&data, 96);
        if incompat & !INCOMPAT_KNOWN != 0 {
            let what = if incompat & INCOMPAT_META_BG != 0 {
                "an ext4 with meta block groups"
            } else {
                "an ext4 with newer features"
            };
            return Err(OnDiskError::Unsupported { what });
        }
        let state = le16(&data, 58);
        if incompat & INCOMPAT_RECOVER != 0 || state & STATE_CLEAN == 0 || state & STATE_ERRORS != 0 {
            return Err(OnDiskError::Unclean);
        }
        let wide = incompat & INCOMPAT_64BIT != 0;
        let high = if wide { u64::from(le32(&data, 0x150)) << 32 } else { 0 };
        let revision = le32(&data, 76);
        let geometry = Self {
            block: 1024u64.checked_shl(le32(&data, 24)).unwrap_or(0),
            blocks: u64::from(le32(&data, 4)) | high,
            first_data_block: u64::from(le32(&data, 20)),
            inodes: u64::from(le32(&data, 0)),
            inodes_per_group: u64::from(le32(&data, 40)),
            inode: if revision == 0 { 128 } else { usize::from(le16(&data, 88)) },
            descriptor: if wide { u64::from(le16(&data, 254)) } else { 32 },
        };
        let damaged = OnDiskError::Damaged { what: "superblock", offset: SUPERBLOCK_AT };
        if geometry.is_plausible() { Ok(geometry) } else { Err(damaged) }
    }

    fn is_plausible(&self) -> bool {
        matches!(self.block, 1024..=65536)
            && self.inode >= 128
            && self.inode.is_power_of_two()
            && self.inode as u64 <= self.block
            && self.inodes_per_group > 0
            && self.first_data_block <= 1
            && matches!(self.descriptor, 32..=1024)
            && self.descriptor.is_power_of_two()
            && self.blocks.checked_mul(self.block).is_some_and(|bytes| i64::try_from(bytes).is_ok())
    }

    /// Where an inode lies, in bytes.
    fn inode_at(&self, device: &mut dyn ReadAt, number: u64) -> Result<u64, OnDiskError> {
        if number == 0 || number > self.inodes {
            return Err(OnDiskError::OtherFile { inode: number });
        }
        let (group, index) = ((number - 1) / self.inodes_per_group, (number - 1) % self.inodes_per_group);
        // Group descriptors follow the superblock's block. Both numbers are below 2^32, and the table was checked
        // to lie in 63 bits by the number of blocks.
        let at = (self.first_data_block + 1) * self.block + group * self.descriptor;
        let descriptor = read_vec(device, at, usize::try_from(self.descriptor).unwrap_or(32))?;
        let high = if self.descriptor >= 64 { u64::from(le32(&descriptor, 40)) << 32 } else { 0 };
        let table = u64::from(le32(&descriptor, 8)) | high;
        let damaged = OnDiskError::Damaged { what: "group descriptor", offset: at };
        let end = (index + 1) * self.inode as u64;
        let blocks = end.div_ceil(self.block);
        if table == 0 || table.checked_add(blocks).is_none_or(|end| end > self.blocks) {
            return Err(damaged);
        }
        Ok(table * self.block + index * self.inode as u64)
    }

    /// Takes the extents below `root`, depth first and left to right.
    fn walk(
        &self,
        device: &mut dyn ReadAt,
        root: Node,
        depth: u16,
        found: &mut Found,
    ) -> Result<(), OnDiskError> {
        let mut path = vec![(root, 0usize, depth)];
        // More blocks than the filesystem has means a tree that runs in circles.
        let mut left = self.blocks;
        while let Some((node, next, depth)) = path.last_mut() {
            let depth = *depth;
            let entries = node.entries(depth)?;
            if depth == 0 {
                node.extents(entries, found)?;
                path.pop();
                continue;
            }
            if *next == entries {
                path.pop();
                continue;
            }
            let entry = ENTRY_LEN * (*next + 1);
            *next += 1;
            let child = u64::from(le32(&node.data, entry + 4)) | u64::from(le16(&node.data, entry + 8)) << 32;
            let damaged = node.damaged();
            left = left.checked_sub(1).filter(|_| child < self.blocks).ok_or(damaged)?;
            let at = child * self.block;
            let data = read_vec(device, at, usize::try_from(self.block).unwrap_or(0))?;
            path.push((Node { data, at }, 0, depth - 1));
        }
        Ok(())
    }
}

/// A block of the extent tree, or the root in the inode.
struct Node {
    data: Vec<u8>,
    at: u64,
}

impl Node {
    const fn damaged(&self) -> OnDiskError {
        OnDiskError::Damaged { what: "extent tree", offset: self.at }
    }

    /// How many entries it has, when it is a node of this depth.
    fn entries(&self, depth: u16) -> Result<usize, OnDiskError> {
        let entries = usize::from(le16(&self.data, 2));
        let fits = (self.data.len() / ENTRY_LEN).saturating_sub(1);
        let is_node = le16(&self.data, 0) == EXTENT_MAGIC && le16(&self.data, 6) == depth;
        // Only an empty file's root has no entries.
        if !is_node || entries > fits || (entries == 0 && depth > 0) {
            return Err(self.damaged());
        }
        Ok(entries)
    }

    fn extents(&self, entries: usize, found: &mut Found) -> Result<(), OnDiskError> {
        for index in 1..=entries {
            let at = index * ENTRY_LEN;
            let file_block = u64::from(le32(&self.data, at));
            let len = le16(&self.data, at + 4);
            let start = u64::from(le32(&self.data, at + 8)) | u64::from(le16(&self.data, at + 6)) << 32;
            let (count, unwritten) =
                if len > INITIALISED_MAX { (len - INITIALISED_MAX, true) } else { (len, false) };
            if !found.add(file_block, start, u64::from(count), unwritten) {
                return Err(self.damaged());
            }
        }
        Ok(())
    }
}
