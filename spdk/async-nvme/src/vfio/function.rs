//! One PCI function in user space: registers, configuration space, memory, interrupts, reset.
//!
//! ```text
//!   bus master   off at open; on when the controller is known to be quiet, or with the first restore
//!   revoke       bus master off and read back; all mappings ended in the IOMMU     one of the two is enough
//!   restore      all mappings made again; bus master on
//!   drop         windows unmapped, bus master off, device closed (the kernel resets it), address space closed,
//!                and only then the memory let go
//! ```

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hugepage_alloc::DmaRegion;
use hugepage_alloc::physical::UnsafeWithoutIommu;
use nvme_spec::register::{Cc, Csts, Property};
use rustix::event::EventfdFlags;
use vfio_bindings::bindings::vfio as abi;

use super::bar::Bar;
use super::error::OpenError;
use super::irq::Irqs;
use super::kernel::Kernel;
use super::memory::Memory;
use super::space::{Opened, Space};
use super::sysfs::PciAddress;
use crate::access::{Access, AccessError, DmaMapping};

/// The command register in configuration space (PCI Express Base Specification, 7.5.1.1.3).
const COMMAND: u64 = 4;
/// The function answers at its BARs.
const COMMAND_MEMORY: u16 = 1 << 1;
/// The function may read and write memory, and so send interrupts.
const COMMAND_BUS_MASTER: u16 = 1 << 2;

/// A function that is open. The order of the fields is the order in which they end.
#[derive(Debug)]
pub(super) struct Function<K: Kernel> {
    name: String,
    kernel: K,
    bar: Bar<K>,
    irqs: Irqs,
    config: Config,
    can_reset: bool,
    /// Signalled when the host wants the function back.
    release: Option<OwnedFd>,
    gone: AtomicBool,
    device: K::File,
    space: Space<K>,
    /// Who opened it accepted that nothing keeps the device to its memory.
    unguarded: Option<UnsafeWithoutIommu>,
    memory: Mutex<Memory>,
}

/// Configuration space in the device's file.
#[derive(Clone, Copy, Debug)]
struct Config {
    file_offset: u64,
    len: u64,
}

impl<K: Kernel> Function<K> {
    /// Takes over a device that was opened. On failure it is closed again.
    pub(super) fn new(
        kernel: K,
        address: PciAddress,
        opened: Opened<K>,
        unguarded: Option<UnsafeWithoutIommu>,
    ) -> Result<Self, OpenError> {
        // The device is named last, so that it is closed first when a call fails.
        let Opened { space, device } = opened;
        let failed = |call| move |source| OpenError::Kernel { call, address, source };
        let unsupported = |what: &str| OpenError::Unsupported { address, what: what.to_owned() };

        let info = kernel.device_info(&device).map_err(failed("VFIO_DEVICE_GET_INFO"))?;
        if !info.is_pci {
            return Err(unsupported("VFIO says that it is no PCI function"));
        }
        let region =
            |index| kernel.region_info(&device, index).map_err(failed("VFIO_DEVICE_GET_REGION_INFO"));
        let config = region(abi::VFIO_PCI_CONFIG_REGION_INDEX)?;
        let config = Config { file_offset: config.file_offset, len: config.len };
        let bar = region(abi::VFIO_PCI_BAR0_REGION_INDEX)?;
        // The properties end at 0x1000 with the first doorbell (NVMe over PCIe Transport Specification, 3.1).
        if bar.len < 0x1008 {
            return Err(unsupported("its BAR 0 is too short for an NVMe controller"));
        }
        let ranges = space.ranges(&kernel).map_err(failed("asking for the address ranges"))?;
        let irqs = Irqs::new(&kernel, &device);
        let bar = Bar::map(&kernel, &device, bar).map_err(failed("mapping BAR 0"))?;
        let release = release_request(&kernel, &device);
        let function = Self {
            name: address.to_string(),
            kernel,
            bar,
            irqs,
            config,
            can_reset: info.can_reset,
            release,
            gone: AtomicBool::new(false),
            device,
            space,
            unguarded,
            memory: Mutex::new(Memory::new(&ranges)),
        };
        function.quieten(address)?;
        Ok(function)
    }

    /// Lets the device reach memory if it is sure that it does so only when told: when the controller is disabled.
    /// One that its last user left enabled would write to where that user's queues were.
    fn quieten(&self, address: PciAddress) -> Result<(), OpenError> {
        let failed = |source| OpenError::Kernel { call: "writing the command register", address, source };
        self.set_command(COMMAND_MEMORY, COMMAND_BUS_MASTER).map_err(failed)?;
        // The kernel has reset it when it was opened, if it could.
        if self.is_enabled() && self.can_reset {
            let _ = self.kernel.reset(&self.device);
        }
        if self.read32(Property::CSTS.0) == u32::MAX {
            return Err(OpenError::Gone { address });
        }
        if !self.is_enabled() {
            return self.set_command(COMMAND_MEMORY | COMMAND_BUS_MASTER, 0).map_err(failed);
        }
        if self.space.is_guarded() {
            // It stays cut off until whoever drives it has disabled it and restores its access.
            return Ok(());
        }
        Err(OpenError::StillEnabled { address })
    }

    fn is_enabled(&self) -> bool {
        let cc = Cc::from_bits(self.read32(Property::CC.0));
        let csts = Csts::from_bits(self.read32(Property::CSTS.0));
        cc.en() || csts.rdy()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the host wants the function back, or it is not there any more. It stays so.
    pub(super) fn is_gone(&self) -> bool {
        if self.gone.load(Ordering::Relaxed) {
            return true;
        }
        let asked =
            self.release.as_ref().is_some_and(|release| rustix::io::read(release, &mut [0; 8]).is_ok());
        let gone = asked || self.bar.is_gone();
        if gone {
            tracing::warn!(name = self.name, asked, "the function is gone, or the host wants it back");
            self.gone.store(true, Ordering::Relaxed);
        }
        gone
    }

    /// Sets and clears bits of the command register and reads it back.
    fn set_command(&self, set: u16, clear: u16) -> io::Result<()> {
        let at = self.config.file_offset + COMMAND;
        let read = || {
            let mut bytes = [0; 2];
            self.kernel.read(&self.device, at, &mut bytes)?;
            match u16::from_le_bytes(bytes) {
                // Reserved bits are 0 in a device that is there.
                u16::MAX => Err(io::Error::other("configuration space reads as all ones")),
                command => Ok(command),
            }
        };
        let command = read()?;
        let wanted = (command | set) & !clear;
        if command != wanted {
            self.kernel.write(&self.device, at, &wanted.to_le_bytes())?;
            if read()? & (set | clear) != wanted & (set | clear) {
                return Err(io::Error::other("the command register did not change"));
            }
        }
        Ok(())
    }

    fn io_error(&self, what: &'static str) -> impl FnOnce(io::Error) -> AccessError {
        let name = self.name.clone();
        move |source| AccessError::Io { what, name, source }
    }
}

/// Has the kernel say when the host wants the function back: on unbinding, and on removal by hot-plug. Without
/// that it would wait for this process for ever. `None` on a kernel older than 4.0.
fn release_request<K: Kernel>(kernel: &K, device: &K::File) -> Option<OwnedFd> {
    let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
    let index = abi::VFIO_PCI_REQ_IRQ_INDEX;
    kernel.irq_info(device, index).ok().filter(|info| info.count > 0)?;
    kernel.set_irqs(device, index, 0, &[Some(eventfd.as_fd())]).ok()?;
    Some(eventfd)
}

impl<K: Kernel + fmt::Debug> Access for Function<K> {
    fn name(&self) -> &str {
        &self.name
    }

    fn bar_len(&self) -> u64 {
        self.bar.len()
    }

    fn read32(&self, offset: u32) -> u32 {
        if self.is_gone() {
            return u32::MAX;
        }
        self.bar.read32(&self.kernel, &self.device, offset)
    }

    fn write32(&self, offset: u32, value: u32) {
        if !self.gone.load(Ordering::Relaxed) {
            self.bar.write32(&self.kernel, &self.device, offset, value);
        }
    }

    fn read64(&self, offset: u32) -> u64 {
        if self.is_gone() {
            return u64::MAX;
        }
        self.bar.read64(offset).unwrap_or_else(|| {
            let lower = self.read32(offset);
            u64::from(lower) | u64::from(self.read32(offset.saturating_add(4))) << 32
        })
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
    fn write64(&self, offset: u32, value: u64) {
        if !self.gone.load(Ordering::Relaxed) && !self.bar.write64(offset, value) {
            self.write32(offset, value as u32);
            self.write32(offset.saturating_add(4), (value >> 32) as u32);
        }
    }

    fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError> {
        let mut memory = self.memory();
        match self.unguarded {
            Some(sure) => memory.map_physical(sure, &self.name, region),
            None => memory.map(&self.kernel, &self.space, &self.name, region),
        }
    }

    fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError> {
        self.memory().unmap(&self.kernel, &self.space, &self.name, mapping)
    }

    fn dma_revoke(&self) -> Result<(), AccessError> {
        let mut memory = self.memory();
        // The device is asked first, for it stops at once; but only the IOMMU makes sure of one that does not obey.
        let off =
            self.set_command(0, COMMAND_BUS_MASTER).map_err(self.io_error("turning the bus master off"));
        let unmapped = memory.uninstall_all(&self.kernel, &self.space, &self.name);
        let revoked = if unmapped.is_ok() { Ok(()) } else { off };
        if revoked.is_ok() {
            memory.set_revoked(true);
        }
        revoked
    }

    fn dma_restore(&self) -> Result<(), AccessError> {
        let mut memory = self.memory();
        let restored = memory.install_all(&self.kernel, &self.space, &self.name).and_then(|()| {
            self.set_command(COMMAND_MEMORY | COMMAND_BUS_MASTER, 0)
                .map_err(self.io_error("turning the bus master on"))
        });
        match restored {
            Ok(()) => memory.set_revoked(false),
            // Half of it would be neither the one nor the other.
            Err(_) if memory.is_revoked() => {
                let _ = memory.uninstall_all(&self.kernel, &self.space, &self.name);
            }
            Err(_) => {}
        }
        restored
    }

    fn function_reset(&self) -> Result<(), AccessError> {
        if self.is_gone() {
            return Err(AccessError::Gone { name: self.name.clone() });
        }
        if !self.can_reset {
            return Err(AccessError::Unsupported { what: "a function reset", name: self.name.clone() });
        }
        // The kernel turns the bus master off, waits for what is under way, resets, waits until the function
        // answers, and puts configuration space back as it was (drivers/pci/pci.c).
        self.kernel.reset(&self.device).map_err(self.io_error("a function reset"))
    }

    fn config_read32(&self, offset: u16) -> Result<u32, AccessError> {
        let inside = offset.is_multiple_of(4) && u64::from(offset) + 4 <= self.config.len;
        if !inside {
            return Err(AccessError::NoSuch {
                what: format!("dword at {offset:#x}"),
                name: self.name.clone(),
            });
        }
        if self.is_gone() {
            return Ok(u32::MAX);
        }
        let mut bytes = [0; 4];
        self.kernel
            .read(&self.device, self.config.file_offset + u64::from(offset), &mut bytes)
            .map_err(self.io_error("reading configuration space"))?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn interrupts_max(&self) -> u16 {
        self.irqs.count()
    }

    fn interrupt_attach(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), AccessError> {
        self.irqs.attach(&self.kernel, &self.device, &self.name, vector, eventfd)
    }

    fn interrupt_detach(&self, vector: u16) -> Result<(), AccessError> {
        self.irqs.detach(&self.kernel, &self.device, &self.name, vector)
    }
}

impl<K: Kernel> Drop for Function<K> {
    fn drop(&mut self) {
        let off = self.set_command(0, COMMAND_BUS_MASTER);
        if self.space.is_guarded() {
            return;
        }
        // Nobody else makes sure of a device without an IOMMU.
        let quiet = off.is_ok() || (self.can_reset && self.kernel.reset(&self.device).is_ok());
        let memory = self.memory.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !quiet && !memory.is_empty() {
            tracing::error!(name = self.name, "the device cannot be stopped: its memory is never used again");
            memory.leak();
        }
    }
}
