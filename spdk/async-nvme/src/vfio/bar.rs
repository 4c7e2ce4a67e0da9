//! BAR 0: in memory where the kernel lets it be mapped, through the device's file elsewhere.
//!
//! ```text
//!   BAR 0   |properties, doorbells|  MSI-X table  |          |
//!   areas   |====== window =======|               |= window =|
//!                                   pread, pwrite
//! ```
//!
//! Since Linux 4.16 one window covers all of it. A way around through the file is slow, and only there for a
//! controller whose doorbells share a page with the MSI-X table on an older kernel.

use std::io;

use super::info::RegionInfo;
use super::kernel::{Kernel, Window as _};

/// BAR 0 of a device.
#[derive(Debug)]
pub(super) struct Bar<K: Kernel> {
    info: RegionInfo,
    /// A window for each area of `info`.
    windows: Vec<K::Window>,
}

impl<K: Kernel> Bar<K> {
    /// Maps what can be mapped.
    pub(super) fn map(kernel: &K, device: &K::File, info: RegionInfo) -> io::Result<Self> {
        let map = |area: &super::info::Area| {
            let len = usize::try_from(area.len).map_err(|_| io::ErrorKind::InvalidData)?;
            let offset = info.file_offset.checked_add(area.offset).ok_or(io::ErrorKind::InvalidData)?;
            kernel.map(device, offset, len)
        };
        let windows = info.areas.iter().map(map).collect::<io::Result<_>>()?;
        Ok(Self { info, windows })
    }

    pub(super) const fn len(&self) -> u64 {
        self.info.len
    }

    /// Whether an access found the device gone.
    pub(super) fn is_gone(&self) -> bool {
        self.windows.iter().any(K::Window::is_gone)
    }

    pub(super) fn read32(&self, kernel: &K, device: &K::File, offset: u32) -> u32 {
        if let Some((window, at)) = self.window(offset, 4) {
            return window.read32(at);
        }
        let mut bytes = [0xFF; 4];
        match self.in_file(offset) {
            // What cannot be read is all ones, as on the bus.
            Some(at) => kernel.read(device, at, &mut bytes).map_or(u32::MAX, |()| u32::from_le_bytes(bytes)),
            None => u32::MAX,
        }
    }

    pub(super) fn write32(&self, kernel: &K, device: &K::File, offset: u32, value: u32) {
        if let Some((window, at)) = self.window(offset, 4) {
            window.write32(at, value);
        } else if let Some(at) = self.in_file(offset) {
            // A system call is a barrier, and a write that fails is one to a device that is gone.
            let _ = kernel.write(device, at, &value.to_le_bytes());
        }
    }

    /// `None` when eight bytes cannot be read at once.
    pub(super) fn read64(&self, offset: u32) -> Option<u64> {
        let (window, at) = self.window(offset, 8)?;
        Some(window.read64(at))
    }

    /// False when eight bytes cannot be written at once.
    pub(super) fn write64(&self, offset: u32, value: u64) -> bool {
        self.window(offset, 8).map(|(window, at)| window.write64(at, value)).is_some()
    }

    /// The window that holds all of an aligned access, and where in it.
    fn window(&self, offset: u32, size: u64) -> Option<(&K::Window, usize)> {
        let offset = u64::from(offset);
        if !offset.is_multiple_of(size) {
            return None;
        }
        for (area, window) in self.info.areas.iter().zip(&self.windows) {
            // The first window nearly always.
            if let Some(at) = offset.checked_sub(area.offset)
                && at < area.len
                && size <= area.len - at
            {
                return Some((window, usize::try_from(at).ok()?));
            }
        }
        None
    }

    /// Where an aligned word of the BAR is in the device's file.
    fn in_file(&self, offset: u32) -> Option<u64> {
        let inside = offset.is_multiple_of(4) && u64::from(offset) + 4 <= self.info.len;
        if inside { self.info.file_offset.checked_add(offset.into()) } else { None }
    }
}
