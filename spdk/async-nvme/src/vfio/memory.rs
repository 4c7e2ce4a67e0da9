//! The regions that a device can reach: which, at what addresses, and whether at the moment.

use hugepage_alloc::physical::{PhysicalRegion, UnsafeWithoutIommu};
use hugepage_alloc::{BUFFER_LEN_MAX, DmaRegion, IovaAllocator};

use super::error::{explain_map, memlock_limit};
use super::info::IovaRange;
use super::kernel::Kernel;
use super::space::Space;
use crate::access::{AccessError, DmaMapping, Iova};

/// What is mapped for one device. It keeps the regions alive.
#[derive(Debug)]
pub(super) struct Memory {
    iovas: IovaAllocator,
    entries: Vec<Entry>,
    /// The device is cut off: nothing is mapped until it is restored.
    revoked: bool,
}

/// One region.
#[derive(Debug)]
struct Entry {
    mapping: DmaMapping,
    /// Where it begins; of no meaning without an IOMMU.
    iova: u64,
    /// The IOMMU lets the device reach it now.
    installed: bool,
}

impl Entry {
    fn len(&self) -> u64 {
        self.mapping.region().len() as u64
    }
}

impl Memory {
    pub(super) fn new(ranges: &[IovaRange]) -> Self {
        let ranges: Vec<_> = ranges.iter().map(|range| (range.start, range.last)).collect();
        Self { iovas: IovaAllocator::new(&ranges), entries: Vec::new(), revoked: false }
    }

    pub(super) const fn is_revoked(&self) -> bool {
        self.revoked
    }

    /// Says that the device is cut off, or that it is no longer.
    pub(super) const fn set_revoked(&mut self, revoked: bool) {
        self.revoked = revoked;
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Maps a region, in one piece; while the device is cut off only as soon as it is restored.
    pub(super) fn map<K: Kernel>(
        &mut self,
        kernel: &K,
        space: &Space<K>,
        name: &str,
        region: &DmaRegion,
    ) -> Result<DmaMapping, AccessError> {
        let len = region.len() as u64;
        let iova = self.place(len).ok_or_else(|| no_such("more addresses", name))?;
        let made = DmaMapping::contiguous(region.clone(), Iova(iova))
            .ok_or_else(|| no_such("more addresses", name))
            .and_then(|mapping| {
                let mut entry = Entry { mapping, iova, installed: false };
                if !self.revoked {
                    install(kernel, space, name, &mut entry, self.installed_len())?;
                }
                Ok(entry)
            });
        let entry = made.inspect_err(|_| _ = self.iovas.free(iova, len))?;
        let mapping = entry.mapping.clone();
        self.entries.push(entry);
        Ok(mapping)
    }

    /// Looks up where a region lies in physical memory.
    pub(super) fn map_physical(
        &mut self,
        sure: UnsafeWithoutIommu,
        name: &str,
        region: &DmaRegion,
    ) -> Result<DmaMapping, AccessError> {
        let failed = |source| AccessError::Io { what: "mapping a region", name: name.to_owned(), source };
        let physical =
            PhysicalRegion::look_up(region, sure).map_err(|error| failed(std::io::Error::other(error)))?;
        let parts = physical.parts().iter().map(|&part| Iova(part)).collect();
        let mapping =
            DmaMapping::by_part(region.clone(), parts).ok_or_else(|| no_such("such addresses", name))?;
        self.entries.push(Entry { mapping: mapping.clone(), iova: 0, installed: false });
        Ok(mapping)
    }

    /// Ends a mapping. Without an IOMMU only while the device is cut off; before, it may still write there.
    pub(super) fn unmap<K: Kernel>(
        &mut self,
        kernel: &K,
        space: &Space<K>,
        name: &str,
        mapping: &DmaMapping,
    ) -> Result<(), AccessError> {
        let same = |entry: &Entry| {
            entry.mapping.region().is_same(mapping.region()) && entry.mapping.iova(0) == mapping.iova(0)
        };
        let index = self.entries.iter().position(same).ok_or_else(|| no_such("such mapping", name))?;
        if !space.is_guarded() && !self.revoked {
            let what = "ending a mapping while the bus master is on, without an IOMMU,";
            return Err(AccessError::Unsupported { what, name: name.to_owned() });
        }
        let Some(entry) = self.entries.get_mut(index) else { return Err(no_such("such mapping", name)) };
        uninstall(kernel, space, name, entry)?;
        let entry = self.entries.swap_remove(index);
        let _ = self.iovas.free(entry.iova, entry.len());
        Ok(())
    }

    /// Ends all mappings in the IOMMU. What cannot be ended stays, and is said; the rest is ended all the same.
    pub(super) fn uninstall_all<K: Kernel>(
        &mut self,
        kernel: &K,
        space: &Space<K>,
        name: &str,
    ) -> Result<(), AccessError> {
        if !space.is_guarded() {
            return Err(AccessError::Unsupported { what: "unmapping", name: name.to_owned() });
        }
        let ended = self.entries.iter_mut().map(|entry| uninstall(kernel, space, name, entry));
        // All of them, whatever the first says.
        ended.fold(Ok(()), Result::and)
    }

    /// Makes all mappings again that are not there, where they were.
    pub(super) fn install_all<K: Kernel>(
        &mut self,
        kernel: &K,
        space: &Space<K>,
        name: &str,
    ) -> Result<(), AccessError> {
        if !space.is_guarded() {
            return Ok(());
        }
        let mut mapped = self.installed_len();
        for entry in self.entries.iter_mut().filter(|entry| !entry.installed) {
            install(kernel, space, name, entry, mapped)?;
            mapped += entry.len();
        }
        Ok(())
    }

    /// Keeps all regions for ever, because the device may still write to them.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.entries));
    }

    /// An address for a region: such that the largest pages of an IOMMU can be used, when there is room for that.
    fn place(&mut self, len: u64) -> Option<u64> {
        const HUGE: u64 = BUFFER_LEN_MAX as u64;
        const GIGANTIC: u64 = 1 << 30;
        let large = if len.is_multiple_of(GIGANTIC) { self.iovas.allocate(len, GIGANTIC) } else { None };
        large.or_else(|| self.iovas.allocate(len, HUGE))
    }

    fn installed_len(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.installed).map(Entry::len).sum()
    }
}

/// With `mapped` bytes mapped before.
fn install<K: Kernel>(
    kernel: &K,
    space: &Space<K>,
    name: &str,
    entry: &mut Entry,
    mapped: u64,
) -> Result<(), AccessError> {
    space.map(kernel, entry.mapping.region(), entry.iova).map_err(|error| AccessError::Io {
        what: "mapping a region",
        name: name.to_owned(),
        source: explain_map(error, entry.len(), mapped, memlock_limit()),
    })?;
    entry.installed = true;
    Ok(())
}

fn uninstall<K: Kernel>(
    kernel: &K,
    space: &Space<K>,
    name: &str,
    entry: &mut Entry,
) -> Result<(), AccessError> {
    if entry.installed {
        space.unmap(kernel, entry.iova, entry.len()).map_err(|source| AccessError::Io {
            what: "unmapping a region",
            name: name.to_owned(),
            source,
        })?;
        entry.installed = false;
    }
    Ok(())
}

fn no_such(what: &str, name: &str) -> AccessError {
    AccessError::NoSuch { what: what.to_owned(), name: name.to_owned() }
}
