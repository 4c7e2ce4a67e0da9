//! Where commands go: at random, each command anew, so that no lookup is ever guessed and no block stays in a cache.

use std::sync::Arc;

use super::work::{BLOCK_LEN, Work};

/// What a host may ask for.
#[derive(Clone, Debug)]
pub struct Space {
    /// Bytes of the namespace.
    pub len: u64,
    /// Of a namespace of which only some blocks are meant: these, in blocks.
    pub blocks: Option<Arc<[u64]>>,
}

impl Space {
    /// All of a namespace of so many bytes.
    pub const fn whole(len: u64) -> Self {
        Self { len, blocks: None }
    }
}

/// The places of one connection's commands.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// Of xorshift64, never 0.
    state: u64,
    /// Places that there are.
    count: u64,
    blocks_each: u64,
    blocks: Option<Arc<[u64]>>,
}

impl Places {
    /// Another sequence for each seed, the same every time.
    pub(super) fn new(space: &Space, work: Work, seed: u16) -> Self {
        let blocks_each = u64::from(work.len / BLOCK_LEN).max(1);
        let count = match &space.blocks {
            Some(blocks) => blocks.len() as u64,
            None => space.len / u64::from(BLOCK_LEN) / blocks_each,
        };
        let state = 0x9E37_79B9_7F4A_7C15 ^ ((u64::from(seed) << 32) | (u64::from(seed) + 1));
        Self { state, count: count.max(1), blocks_each, blocks: space.blocks.clone() }
    }

    /// The first logical block of the next command.
    #[inline]
    pub(super) fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let place = ((u128::from(self.state) * u128::from(self.count)) >> 64) as u64;
        match &self.blocks {
            Some(blocks) => {
                usize::try_from(place).ok().and_then(|at| blocks.get(at)).copied().unwrap_or_default()
            }
            None => place * self.blocks_each,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::target::work::Kind;

    #[test]
    fn places_are_whole_commands_within_the_space_and_all_are_used() {
        let work = Work { len: 128 << 10, ..Work::small(Kind::Read) };
        let mut places = Places::new(&Space::whole(8 << 20), work, 3);
        let seen: HashSet<u64> = (0..1000).map(|_| places.next()).collect();
        assert_eq!(seen.len(), 64, "{seen:?}");
        assert!(seen.iter().all(|lba| lba % 32 == 0 && *lba < 2048), "{seen:?}");
    }

    #[test]
    fn of_some_blocks_only_these_are_asked_for() {
        let space = Space { len: 1 << 30, blocks: Some([7, 70, 700].into()) };
        let mut places = Places::new(&space, Work::small(Kind::Read), 0);
        let seen: HashSet<u64> = (0..100).map(|_| places.next()).collect();
        assert_eq!(seen, HashSet::from([7, 70, 700]));
    }
}
