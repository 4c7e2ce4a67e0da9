//! A table of reusable slots whose keys carry a generation, so that a late completion for a slot that was given
//! to somebody else is recognised and dropped instead of being delivered to the wrong owner.

/// The key of an entry: index in the low, generation in the high half. Never reused within 2^24 uses of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    index: u32,
    generation: u32,
}

/// Generations are kept to 24 bits, so that a key and an eight-bit kind fit one 64-bit ring token.
const GENERATION_MASK: u32 = 0x00FF_FFFF;

impl Key {
    /// The position in the table.
    #[must_use]
    pub const fn index(self) -> usize {
        self.index as usize
    }

    /// The key as 56 bits: 32 of index, 24 of generation.
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        (self.generation as u64) << 32 | self.index as u64
    }

    /// The inverse of [`Key::to_bits`]; higher bits are ignored.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the halves are taken apart on purpose")]
    pub const fn from_bits(bits: u64) -> Self {
        Self { index: bits as u32, generation: (bits >> 32) as u32 & GENERATION_MASK }
    }
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// The table. Grows only by [`Slab::reserve`], which belongs to the control path.
#[derive(Debug)]
pub struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Makes room for `total` entries, those that are there included, so that inserting them does not allocate.
    pub fn reserve(&mut self, total: usize) {
        let missing = total.saturating_sub(self.slots.len());
        self.slots.reserve(missing);
        self.free.reserve(self.slots.len() + missing);
        for _ in 0..missing {
            let Ok(index) = u32::try_from(self.slots.len()) else { return };
            self.slots.push(Slot { generation: 0, value: None });
            self.free.push(index);
        }
    }

    /// Puts `value` into a free slot, or gives it back when there is none.
    ///
    /// # Errors
    /// The value itself, when every reserved slot is taken.
    pub fn insert(&mut self, value: T) -> Result<Key, T> {
        let Some(index) = self.free.pop() else { return Err(value) };
        let slot = &mut self.slots[index as usize];
        slot.value = Some(value);
        Ok(Key { index, generation: slot.generation })
    }

    /// The entry, unless the key is stale.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&T> {
        let slot = self.slots.get(key.index())?;
        if slot.generation == key.generation { slot.value.as_ref() } else { None }
    }

    /// The entry for change, unless the key is stale.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.index())?;
        if slot.generation == key.generation { slot.value.as_mut() } else { None }
    }

    /// Takes the entry out; its key is stale from here on.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.index())?;
        if slot.generation != key.generation {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1) & GENERATION_MASK;
        self.free.push(key.index);
        Some(value)
    }

    /// Drops the entry where it is; its key is stale from here on.
    pub fn free(&mut self, key: Key) {
        let Some(slot) = self.slots.get_mut(key.index()) else { return };
        if slot.generation == key.generation && slot.value.is_some() {
            slot.value = None;
            slot.generation = slot.generation.wrapping_add(1) & GENERATION_MASK;
            self.free.push(key.index);
        }
    }

    /// How many slots there are, taken or not: the bound for walking the table with [`Slab::key_at`].
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The key of the entry at a position, or `None` when the slot is free. Lets a walk change the table.
    #[must_use]
    pub fn key_at(&self, index: usize) -> Option<Key> {
        let slot = self.slots.get(index)?;
        slot.value.as_ref()?;
        Some(Key { index: u32::try_from(index).ok()?, generation: slot.generation })
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_key_reaches_nobody() {
        let mut slab = Slab::default();
        slab.reserve(1);
        let first = slab.insert("first").expect("reserved");
        assert_eq!(slab.insert("none left"), Err("none left"));
        assert_eq!(slab.remove(first), Some("first"));
        let second = slab.insert("second").expect("freed");
        assert_eq!(first.index(), second.index());
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.get_mut(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second), Some(&"second"));
        slab.free(first);
        assert_eq!(slab.get(second), Some(&"second"));
        slab.free(second);
        slab.free(second);
        assert_eq!((slab.get(second), slab.len()), (None, 0));
        let third = slab.insert("third").expect("freed");
        assert_ne!(third, second);
        assert_eq!(slab.insert("none left"), Err("none left"), "it was freed once");
    }

    #[test]
    fn keys_survive_the_ring_token() {
        let mut slab = Slab::default();
        slab.reserve(3);
        for round in 0..5 {
            let key = slab.insert(round).expect("reserved");
            assert_eq!(Key::from_bits(key.to_bits()), key);
            assert_eq!(Key::from_bits(key.to_bits() | 0xAB << 56), key);
            slab.remove(key);
        }
    }

    #[test]
    fn reserve_counts_what_is_taken_and_never_shrinks() {
        let mut slab: Slab<u8> = Slab::default();
        slab.reserve(4);
        slab.reserve(2);
        assert_eq!(slab.slots.len(), 4);
        let _ = slab.insert(1);
        slab.reserve(5);
        assert_eq!(slab.slots.len(), 5);
        assert_eq!((0..slab.slots()).filter_map(|index| slab.key_at(index)).count(), 1);
    }
}
