//! MSI-X interrupts, each an eventfd.
//!
//! All vectors are switched on together, without eventfds, with the first that is wanted: many kernels cannot add
//! vectors to those that are on (`VFIO_IRQ_INFO_NORESIZE`), but give one that is on another eventfd at any time.

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio as abi;

use super::kernel::Kernel;
use crate::access::AccessError;

const MSIX: u32 = abi::VFIO_PCI_MSIX_IRQ_INDEX;

/// The interrupts of a function.
#[derive(Debug)]
pub(super) struct Irqs {
    /// Vectors that the function has.
    count: u16,
    /// Vectors that are on: 0 until the first is attached, then as many as the kernel gave.
    on: Mutex<u16>,
}

impl Irqs {
    /// A function without MSI-X has none.
    pub(super) fn new<K: Kernel>(kernel: &K, device: &K::File) -> Self {
        let count = kernel.irq_info(device, MSIX).map_or(0, |info| info.count);
        Self { count: u16::try_from(count).unwrap_or(u16::MAX), on: Mutex::new(0) }
    }

    pub(super) const fn count(&self) -> u16 {
        self.count
    }

    pub(super) fn attach<K: Kernel>(
        &self,
        kernel: &K,
        device: &K::File,
        name: &str,
        vector: u16,
        eventfd: BorrowedFd<'_>,
    ) -> Result<(), AccessError> {
        let what = "attaching an interrupt";
        let failed = |source| AccessError::Io { what, name: name.to_owned(), source };
        let no_such =
            || AccessError::NoSuch { what: format!("interrupt vector {vector}"), name: name.to_owned() };
        if vector >= self.count {
            return Err(no_such());
        }
        let mut on = self.on();
        if *on == 0 {
            *on = switch_on(kernel, device, self.count).map_err(failed)?;
        }
        if vector >= *on {
            return Err(no_such());
        }
        kernel.set_irqs(device, MSIX, vector.into(), &[Some(eventfd)]).map_err(failed).map(drop)
    }

    /// Takes the eventfd of a vector away. The kernel masks a vector that has none.
    pub(super) fn detach<K: Kernel>(
        &self,
        kernel: &K,
        device: &K::File,
        name: &str,
        vector: u16,
    ) -> Result<(), AccessError> {
        if vector >= self.count {
            let what = format!("interrupt vector {vector}");
            return Err(AccessError::NoSuch { what, name: name.to_owned() });
        }
        if vector < *self.on() {
            kernel.set_irqs(device, MSIX, vector.into(), &[None]).map_err(|source| AccessError::Io {
                what: "detaching an interrupt",
                name: name.to_owned(),
                source,
            })?;
        }
        Ok(())
    }

    fn on(&self) -> MutexGuard<'_, u16> {
        self.on.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Switches on as many vectors as there are, or as many as the kernel has to give; how many.
fn switch_on<K: Kernel>(kernel: &K, device: &K::File, count: u16) -> std::io::Result<u16> {
    let mut want = count;
    // What the kernel says to have left may be gone when it is asked for.
    for _ in 0..4 {
        let left = kernel.set_irqs(device, MSIX, 0, &vec![None; want.into()])?;
        match u16::try_from(left) {
            Ok(0) => return Ok(want),
            Ok(left) if left < want => want = left,
            _ => break,
        }
    }
    Err(std::io::Error::other("the kernel has no interrupt vectors to give"))
}
