//! Blocks that describe themselves, and the table of what each unit must hold.
//!
//! ```text
//!   0      8          16     24            28        32                      block size
//!   | magic | run seed | LBA  | generation  | CRC32C  | words from (seed, LBA, generation) |
//! ```
//!
//! The CRC covers the whole block with the CRC field zero. Whoever reads a block knows which block it was meant to
//! be, of which run, and how new it is.

use crate::tcp::digest::Digest;
use crate::units::{BlockSize, Lba};
use std::collections::HashMap;
use std::fmt;

const MAGIC: u64 = u64::from_le_bytes(*b"fastice\x01");
const HEADER_LEN: usize = 32;
const CRC_AT: usize = 28;

/// What is wrong with a block that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFault {
    /// It was not written by this run.
    Foreign,
    /// Its checksum is wrong: torn or damaged.
    Damaged,
    /// It is another block.
    Misplaced {
        /// The block it was written as.
        found: Lba,
    },
    /// It is not as new as it must be.
    Stale {
        /// The generation that was acknowledged last.
        expected: u32,
        /// The generation it is of.
        found: u32,
    },
    /// It is newer than anything this run has written there.
    Unexpected {
        /// The generation that was acknowledged last.
        expected: u32,
        /// The generation it is of.
        found: u32,
    },
}

impl fmt::Display for BlockFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("not a block of this run"),
            Self::Damaged => f.write_str("checksum wrong: torn or damaged"),
            Self::Misplaced { found } => write!(f, "holds block {found}"),
            Self::Stale { expected, found } => {
                write!(f, "stale: generation {found}, {expected} was acknowledged")
            }
            Self::Unexpected { expected, found } => {
                write!(f, "generation {found} where {expected} was the last")
            }
        }
    }
}

/// Writes block `lba` of generation `generation` over `block`.
///
/// # Panics
/// When `block` is shorter than 32 bytes; logical blocks have 512 at least.
pub fn fill_block(block: &mut [u8], seed: u64, lba: Lba, generation: u32) {
    let (header, body) = block.split_at_mut(HEADER_LEN);
    header[..8].copy_from_slice(&MAGIC.to_le_bytes());
    header[8..16].copy_from_slice(&seed.to_le_bytes());
    header[16..24].copy_from_slice(&lba.get().to_le_bytes());
    header[24..28].copy_from_slice(&generation.to_le_bytes());
    header[CRC_AT..].fill(0);
    let mut state = seed ^ lba.get().rotate_left(20) ^ u64::from(generation).rotate_left(44);
    let (words, _) = body.as_chunks_mut::<8>();
    for word in words {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        *word = (state ^ state >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9).to_le_bytes();
    }
    let mut digest = Digest::new();
    digest.update(block);
    block[CRC_AT..HEADER_LEN].copy_from_slice(&digest.to_wire());
}

/// Reads a block: its generation, when it is block `lba` of the run `seed` and whole.
///
/// # Errors
/// What is wrong with it.
pub fn check_block(block: &[u8], seed: u64, lba: Lba) -> Result<u32, BlockFault> {
    let word =
        |at: usize| block.get(at..).and_then(|rest| rest.first_chunk::<8>()).map(|w| u64::from_le_bytes(*w));
    let (Some(magic), Some(run), Some(found), Some(last)) = (word(0), word(8), word(16), word(24)) else {
        return Err(BlockFault::Foreign);
    };
    if magic != MAGIC {
        return Err(BlockFault::Foreign);
    }
    #[expect(clippy::cast_possible_truncation, reason = "two halves of a word")]
    let (generation, crc) = (last as u32, (last >> 32) as u32);
    let mut digest = Digest::new();
    digest.update(&block[..CRC_AT]);
    digest.update(&[0; 4]);
    digest.update(&block[HEADER_LEN..]);
    if digest.value() != crc {
        return Err(BlockFault::Damaged);
    }
    if run != seed {
        return Err(BlockFault::Foreign);
    }
    if found != lba.get() {
        return Err(BlockFault::Misplaced { found: Lba(found) });
    }
    Ok(generation)
}

/// What the units of one worker must hold. A unit is one read or write: some blocks of one generation.
#[derive(Debug)]
pub(super) struct Table {
    seed: u64,
    block_size: BlockSize,
    /// The last acknowledged generation, 0 for none; the top bit is set while a command is in flight.
    units: Vec<u32>,
    /// Units with writes of which nobody knows whether they happened: the generations these would have left.
    uncertain: HashMap<u64, Vec<u32>>,
    next_generation: u32,
}

const BUSY: u32 = 1 << 31;

impl Table {
    pub(super) fn new(seed: u64, block_size: BlockSize, units: u64) -> Self {
        let units = usize::try_from(units).unwrap_or(usize::MAX);
        Self { seed, block_size, units: vec![0; units], uncertain: HashMap::new(), next_generation: 1 }
    }

    /// How many units there are.
    pub(super) const fn len(&self) -> u64 {
        self.units.len() as u64
    }

    fn entry(&mut self, unit: u64) -> &mut u32 {
        // A unit is one of this worker's share, which the table was made for.
        &mut self.units[usize::try_from(unit).unwrap_or(usize::MAX)]
    }

    /// Takes a unit for one command; `false` when it is taken.
    pub(super) fn take(&mut self, unit: u64) -> bool {
        let entry = self.entry(unit);
        let free = *entry & BUSY == 0;
        *entry |= BUSY;
        free
    }

    pub(super) fn give_back(&mut self, unit: u64) {
        *self.entry(unit) &= !BUSY;
    }

    /// The acknowledged generation of a unit.
    pub(super) fn generation(&mut self, unit: u64) -> u32 {
        *self.entry(unit) & !BUSY
    }

    /// Whether it is known what a unit holds, at least as one of several.
    pub(super) fn is_known(&mut self, unit: u64) -> bool {
        self.generation(unit) != 0
    }

    /// Fills the blocks of a unit for a write; gives the generation.
    pub(super) fn fill(&mut self, data: &mut [u8], lba: Lba) -> u32 {
        let generation = self.next_generation;
        // 2^31 writes of one worker: then old generations come again, long after they were overwritten.
        self.next_generation = if generation + 1 == BUSY { 1 } else { generation + 1 };
        for (block, lba) in data.chunks_exact_mut(self.block_size.bytes() as usize).zip(lba.get()..) {
            fill_block(block, self.seed, Lba(lba), generation);
        }
        generation
    }

    /// A write was acknowledged.
    pub(super) fn acknowledge(&mut self, unit: u64, generation: u32) {
        *self.entry(unit) = generation;
        if !self.uncertain.is_empty() {
            self.uncertain.remove(&unit);
        }
    }

    /// A write failed, or nobody knows: it may have happened, in part or not at all.
    pub(super) fn doubt(&mut self, unit: u64, generation: u32) {
        self.give_back(unit);
        self.uncertain.entry(unit).or_default().push(generation);
    }

    /// Units whose content is one of several.
    pub(super) fn uncertain_count(&self) -> u64 {
        self.uncertain.len() as u64
    }

    /// Checks what was read of a unit: the blocks checked, and the first fault.
    pub(super) fn check(&mut self, unit: u64, data: &[u8], lba: Lba) -> Result<u64, (Lba, BlockFault)> {
        let expected = self.generation(unit);
        let doubts = self.uncertain.get(&unit);
        let mut checked = 0;
        for (block, lba) in data.chunks_exact(self.block_size.bytes() as usize).zip(lba.get()..) {
            checked += 1;
            let lba = Lba(lba);
            let found = check_block(block, self.seed, lba).map_err(|fault| (lba, fault))?;
            if found == expected || doubts.is_some_and(|doubts| doubts.contains(&found)) {
                continue;
            }
            let fault = if found < expected {
                BlockFault::Stale { expected, found }
            } else {
                BlockFault::Unexpected { expected, found }
            };
            return Err((lba, fault));
        }
        Ok(checked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 0x1234_5678;

    fn block(lba: u64, generation: u32) -> Vec<u8> {
        let mut block = vec![0; 512];
        fill_block(&mut block, SEED, Lba(lba), generation);
        block
    }

    #[test]
    fn a_block_tells_what_is_wrong_with_it() {
        assert_eq!(check_block(&block(7, 3), SEED, Lba(7)), Ok(3));
        assert_eq!(check_block(&block(7, 3), SEED, Lba(8)), Err(BlockFault::Misplaced { found: Lba(7) }));
        assert_eq!(check_block(&block(7, 3), SEED + 1, Lba(7)), Err(BlockFault::Foreign));
        assert_eq!(check_block(&[0; 512], SEED, Lba(7)), Err(BlockFault::Foreign));
        assert_eq!(check_block(&[], SEED, Lba(7)), Err(BlockFault::Foreign));
        for at in 8..512 {
            let mut damaged = block(7, 3);
            damaged[at] ^= 1;
            assert_eq!(check_block(&damaged, SEED, Lba(7)), Err(BlockFault::Damaged), "byte {at}");
        }
        let torn = [&block(7, 3)[..256], &block(7, 4)[256..]].concat();
        assert_eq!(check_block(&torn, SEED, Lba(7)), Err(BlockFault::Damaged));
    }

    #[test]
    fn the_table_finds_stale_and_torn_units() {
        let mut table = Table::new(SEED, BlockSize::B512, 4);
        let mut old = vec![0; 1024];
        let mut new = vec![0; 1024];
        let first = table.fill(&mut old, Lba(4));
        table.acknowledge(2, first);
        let second = table.fill(&mut new, Lba(4));
        assert_eq!(table.check(2, &old, Lba(4)), Ok(2));
        assert_eq!(
            table.check(2, &new, Lba(4)),
            Err((Lba(4), BlockFault::Unexpected { expected: first, found: second }))
        );
        table.acknowledge(2, second);
        let mixed = [&new[..512], &old[512..]].concat();
        let stale = BlockFault::Stale { expected: second, found: first };
        assert_eq!(table.check(2, &mixed, Lba(4)), Err((Lba(5), stale)));
    }

    #[test]
    fn a_write_in_doubt_allows_both_generations_until_the_next_acknowledgement() {
        let mut table = Table::new(SEED, BlockSize::B512, 1);
        let [mut one, mut two, mut three] = [(); 3].map(|()| vec![0; 512]);
        let generation = table.fill(&mut one, Lba(0));
        assert!(table.take(0) && !table.take(0));
        table.acknowledge(0, generation);
        assert!(table.take(0));
        let generation = table.fill(&mut two, Lba(0));
        table.doubt(0, generation);
        assert!(table.take(0), "a unit in doubt is free again");
        assert_eq!((table.check(0, &one, Lba(0)), table.check(0, &two, Lba(0))), (Ok(1), Ok(1)));
        let generation = table.fill(&mut three, Lba(0));
        assert!(table.check(0, &three, Lba(0)).is_err());
        table.acknowledge(0, generation);
        assert!(table.check(0, &one, Lba(0)).is_err() && table.check(0, &two, Lba(0)).is_err());
        assert_eq!(table.uncertain_count(), 0);
    }
}
