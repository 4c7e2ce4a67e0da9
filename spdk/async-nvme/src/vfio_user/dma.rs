//! What the server may reach: regions, their addresses, and whether the server holds them just now.

use hugepage_alloc::{BUFFER_LEN_MAX, DmaRegion, IovaAllocator};

use crate::access::{DmaMapping, Iova};

/// Addresses that are given out: all that a process can have, but for the first 2 MiB.
const IOVA_RANGE: (u64, u64) = (BUFFER_LEN_MAX as u64, (1 << 47) - 1);

/// A region with its address.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) region: DmaRegion,
    pub(crate) iova: u64,
    /// Whether the server has it mapped, or may have.
    pub(crate) live: bool,
}

impl Entry {
    pub(crate) fn len(&self) -> u64 {
        self.region.len() as u64
    }
}

/// All mappings of one server.
#[derive(Debug)]
pub(crate) struct Table {
    addresses: IovaAllocator,
    pub(crate) entries: Vec<Entry>,
    pub(crate) revoked: bool,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self { addresses: IovaAllocator::new(&[IOVA_RANGE]), entries: Vec::new(), revoked: false }
    }

    /// Gives a region addresses. `None` when there are none left.
    pub(crate) fn add(&mut self, region: &DmaRegion) -> Option<(usize, DmaMapping)> {
        let iova = self.addresses.allocate(region.len() as u64, BUFFER_LEN_MAX as u64)?;
        let mapping = DmaMapping::contiguous(region.clone(), Iova(iova))?;
        self.entries.push(Entry { region: region.clone(), iova, live: false });
        Some((self.entries.len() - 1, mapping))
    }

    pub(crate) fn find(&self, mapping: &DmaMapping) -> Option<usize> {
        let iova = mapping.iova(0)?.0;
        self.entries.iter().position(|entry| entry.iova == iova && entry.region.is_same(mapping.region()))
    }

    /// Forgets a region that the server cannot reach any more.
    pub(crate) fn remove(&mut self, index: usize) {
        let entry = self.entries.swap_remove(index);
        // Taken by `add`, so it can be given back.
        let _ = self.addresses.free(entry.iova, entry.len());
    }

    /// The server can reach nothing any more.
    pub(crate) fn all_dead(&mut self) {
        for entry in &mut self.entries {
            entry.live = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_that_is_mapped_twice_has_two_addresses() {
        let mut table = Table::new();
        let region = DmaRegion::map(1, false, false).unwrap();
        let (_, first) = table.add(&region).unwrap();
        let (_, second) = table.add(&region).unwrap();
        assert_ne!(first.iova(0), second.iova(0));
        assert_eq!(table.find(&second), Some(1));
        table.remove(0);
        assert_eq!((table.find(&first), table.find(&second)), (None, Some(0)));
        let other = DmaRegion::map(1, false, false).unwrap();
        let (_, third) = table.add(&other).unwrap();
        assert_eq!(third.iova(0), first.iova(0), "the address is free again");
        assert_eq!(table.find(&DmaMapping::contiguous(region, first.iova(0).unwrap()).unwrap()), None);
    }
}
