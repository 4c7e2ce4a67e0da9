//! Blocks that say themselves what they are: written over the network, recognised through the filesystem.
//!
//! ```text
//!   "fastice demo 1\0\0"  16 bytes
//!   seed                   8, of this run
//!   index                  8, of the block within the file
//!   noise                  the rest, derived from seed and index
//! ```

/// The size of a block of the demo.
pub(super) const BLOCK_BYTES: usize = 4096;
const MAGIC: &[u8; 16] = b"fastice demo 1\0\0";

/// Fills `data`, of whole blocks, the first of them block `index` of the file.
pub(super) fn fill(data: &mut [u8], seed: u64, index: u64) {
    for (block, index) in data.chunks_exact_mut(BLOCK_BYTES).zip(index..) {
        let mut words = Words::of(seed, index);
        let (words_part, _) = block.as_chunks_mut::<8>();
        for (at, word) in words_part.iter_mut().enumerate() {
            *word = words.at(at);
        }
    }
}

/// The index of the first block of `data` that is not what [`fill`] makes.
pub(super) fn first_wrong(data: &[u8], seed: u64, index: u64) -> Option<u64> {
    data.chunks_exact(BLOCK_BYTES).zip(index..).find_map(|(block, index)| {
        let mut words = Words::of(seed, index);
        let (words_part, _) = block.as_chunks::<8>();
        let same = words_part.iter().enumerate().all(|(at, word)| *word == words.at(at));
        (!same).then_some(index)
    })
}

/// The words of a block, in order.
struct Words {
    seed: u64,
    index: u64,
    state: u64,
}

impl Words {
    fn of(seed: u64, index: u64) -> Self {
        Self { seed, index, state: seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15) }
    }

    fn at(&mut self, at: usize) -> [u8; 8] {
        let (magic, _) = MAGIC.as_chunks::<8>();
        match at {
            0 | 1 => magic.get(at).copied().unwrap_or_default(),
            2 => self.seed.to_le_bytes(),
            3 => self.index.to_le_bytes(),
            _ => self.noise().to_le_bytes(),
        }
    }

    /// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    fn noise(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_or_displaced_byte_is_seen() {
        let mut data = vec![0; 4 * BLOCK_BYTES];
        fill(&mut data, 7, 100);
        assert_eq!(first_wrong(&data, 7, 100), None);
        assert_eq!(first_wrong(&data, 8, 100), Some(100));
        assert_eq!(first_wrong(&data, 7, 101), Some(101));
        for at in [0, 15, 16, 24, 4095, 4096, 4 * BLOCK_BYTES - 1] {
            let mut other = data.clone();
            other[at] ^= 1;
            assert_eq!(first_wrong(&other, 7, 100), Some(100 + (at / BLOCK_BYTES) as u64), "byte {at}");
        }
        let (first, second) = data.split_at_mut(BLOCK_BYTES);
        first.swap_with_slice(&mut second[..BLOCK_BYTES]);
        assert_eq!(first_wrong(&data, 7, 100), Some(100));
    }
}
