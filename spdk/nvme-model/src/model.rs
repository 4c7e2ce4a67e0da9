//! The model as others hold it: a handle that is an [`Access`] for a driver, and steps and faults for a test.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use async_nvme::access::{Access, AccessError, DmaMapping};
use hugepage_alloc::{DmaBuf, DmaRegion};

use crate::controller::{Controller, ControllerOptions};
use crate::fault::{Fault, FaultHook, RandomFaults, RegisterFaults};
use crate::namespace::Shared;

/// A controller in software.
#[derive(Debug)]
pub struct Model {
    name: String,
    controller: Mutex<Controller>,
}

impl Model {
    pub(crate) fn new(shared: Arc<Shared>, cntlid: u16, options: ControllerOptions) -> Self {
        let name = options.name.clone();
        Self { name, controller: Mutex::new(Controller::new(shared, cntlid, options)) }
    }

    fn no_vector(&self, vector: u16) -> AccessError {
        AccessError::NoSuch { what: format!("interrupt vector {vector}"), name: self.name.clone() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Controller> {
        self.controller.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the controller work a little: its state machine one step on, and a burst of commands from each queue.
    /// Returns whether it had anything to do.
    pub fn step(&self) -> bool {
        self.lock().step()
    }

    /// The thread that calls [`Model::step`] from now on: it is unparked when a register is written or a disk has answered.
    pub fn set_sleeper(&self, sleeper: Option<Thread>) {
        self.lock().set_sleeper(sleeper);
    }

    /// Adds a fault. Earlier ones are asked first.
    pub fn add_fault(&self, fault: Fault) {
        self.lock().faults.add(fault);
    }

    /// Sets or ends the fault hook. It is called under the model's lock and must not use the model.
    pub fn set_fault_hook(&self, hook: Option<FaultHook>) {
        self.lock().faults.set_hook(hook);
    }

    /// Sets or ends random faults.
    pub fn set_random_faults(&self, random: Option<RandomFaults>) {
        self.lock().faults.set_random(random);
    }

    /// Sets what is wrong with the registers.
    pub fn set_register_faults(&self, faults: RegisterFaults) {
        self.lock().faults.registers = faults;
    }

    /// Ends all faults, but leaves what they did.
    pub fn clear_faults(&self) {
        self.lock().faults.clear();
    }

    /// Sets CSTS.CFS now.
    pub fn fail(&self) {
        self.lock().fail();
    }

    /// Removes the device now: all registers read as ones.
    pub fn vanish(&self) {
        self.lock().vanish();
    }

    /// Puts the device back where it was removed, as after power-on.
    pub fn plug_in(&self) {
        let mut controller = self.lock();
        controller.gone = false;
        controller.function_reset();
    }

    /// Reports an asynchronous event with this DW0.
    pub fn raise_event(&self, dw0: u32) {
        self.lock().raise(dw0);
    }

    /// Commands executed so far.
    #[must_use]
    pub fn commands_done(&self) -> u64 {
        self.lock().commands_done
    }

    /// Whether an open command may still read or write bytes of `buf`. A driver that has given the buffer back
    /// while this holds has given it back too early.
    #[must_use]
    pub fn may_touch(&self, buf: &DmaBuf) -> bool {
        let start = buf.as_ptr().addr();
        let end = start + buf.len();
        self.lock().may_touch().iter().any(|&(at, len)| at < end && start < at + len)
    }

    /// Steps in a thread of its own until the result is dropped. When there was nothing to do for a while it sleeps until
    /// a register is written, a millisecond at the most.
    ///
    /// # Errors
    /// When there is no more thread to be had.
    pub fn spawn(self: &Arc<Self>) -> std::io::Result<ModelThread> {
        let stop = Arc::new(AtomicBool::new(false));
        let (model, stopped) = (self.clone(), stop.clone());
        let thread = std::thread::Builder::new().name(format!("nvme-{}", self.name)).spawn(move || {
            model.set_sleeper(Some(std::thread::current()));
            let mut idle_steps = 0;
            while !stopped.load(Ordering::Relaxed) {
                if model.step() {
                    idle_steps = 0;
                } else if idle_steps < IDLE_STEPS {
                    idle_steps += 1;
                    std::thread::yield_now();
                } else {
                    std::thread::park_timeout(SLEEP_MAX);
                }
            }
            model.set_sleeper(None);
        })?;
        Ok(ModelThread { stop, thread: Some(thread) })
    }
}

/// Steps with nothing to do before a thread sleeps, and how long it sleeps at most: what counts steps goes on.
const IDLE_STEPS: u32 = 200;
const SLEEP_MAX: Duration = Duration::from_millis(1);

/// A model that runs by itself; stopped and joined on drop.
#[derive(Debug)]
pub struct ModelThread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for ModelThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Access for Model {
    fn name(&self) -> &str {
        &self.name
    }

    fn bar_len(&self) -> u64 {
        self.lock().bar_len()
    }

    fn read32(&self, offset: u32) -> u32 {
        self.lock().read32(offset)
    }

    fn write32(&self, offset: u32, value: u32) {
        let mut controller = self.lock();
        controller.write32(offset, value);
        controller.wake();
    }

    fn read64(&self, offset: u32) -> u64 {
        self.lock().read64(offset)
    }

    fn write64(&self, offset: u32, value: u64) {
        let mut controller = self.lock();
        controller.write64(offset, value);
        controller.wake();
    }

    fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError> {
        let mapping = self.lock().iommu.map(region);
        mapping
            .ok_or_else(|| AccessError::NoSuch { what: "more addresses".to_owned(), name: self.name.clone() })
    }

    fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError> {
        if self.lock().iommu.unmap(mapping.region()) {
            return Ok(());
        }
        Err(AccessError::NoSuch { what: "such mapping".to_owned(), name: self.name.clone() })
    }

    fn dma_revoke(&self) -> Result<(), AccessError> {
        let mut controller = self.lock();
        if controller.faults.registers.revoke_fails {
            let source = std::io::ErrorKind::PermissionDenied.into();
            return Err(AccessError::Io { what: "revoking DMA", name: self.name.clone(), source });
        }
        controller.iommu.set_revoked(true);
        Ok(())
    }

    fn dma_restore(&self) -> Result<(), AccessError> {
        self.lock().iommu.set_revoked(false);
        Ok(())
    }

    fn function_reset(&self) -> Result<(), AccessError> {
        let mut controller = self.lock();
        if controller.gone {
            return Err(AccessError::Gone { name: self.name.clone() });
        }
        if controller.faults.registers.function_reset_fails {
            return Err(AccessError::Unsupported { what: "a function reset", name: self.name.clone() });
        }
        controller.function_reset();
        Ok(())
    }

    fn interrupts_max(&self) -> u16 {
        self.lock().options.vectors
    }

    fn interrupt_attach(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), AccessError> {
        match self.lock().attach_vector(vector, eventfd) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.no_vector(vector)),
            Err(source) => {
                Err(AccessError::Io { what: "attaching an interrupt", name: self.name.clone(), source })
            }
        }
    }

    fn interrupt_detach(&self, vector: u16) -> Result<(), AccessError> {
        if self.lock().detach_vector(vector) { Ok(()) } else { Err(self.no_vector(vector)) }
    }

    fn config_read32(&self, offset: u16) -> Result<u32, AccessError> {
        let controller = self.lock();
        let (vendor, device) = controller.options.pci_id;
        match offset {
            _ if !offset.is_multiple_of(4) || offset >= 4096 => {
                Err(AccessError::NoSuch { what: format!("dword at {offset:#x}"), name: self.name.clone() })
            }
            _ if controller.gone => Ok(u32::MAX),
            0 => Ok(u32::from(vendor) | u32::from(device) << 16),
            // Class code: mass storage, non-volatile memory, NVM Express.
            8 => Ok(0x0108_0200),
            _ => Ok(0),
        }
    }
}
