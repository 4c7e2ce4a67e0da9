//! A controller: its registers, and the state machine behind CC and CSTS (Base sections 3.1.4, 3.5, 3.6).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::thread::Thread;

use nvme_spec::log::ErrorInformationEntry;
use nvme_spec::queue::DOORBELL_BASE;
use nvme_spec::register::{Cap, Cc, Crto, Csts, Property, Vs, css};

use crate::disk::Disk;
use crate::fault::Faults;
use crate::interrupts::Vector;
use crate::logs::{Counts, ERROR_ENTRIES};
use crate::memory::Iommu;
use crate::namespace::Shared;
use crate::queues::{CompletionQueue, ShadowBuffers, SubmissionQueue};
use crate::store::Bounce;
use crate::work::Held;

/// What a controller shall be like.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
    /// What to call it.
    pub name: String,
    /// CAP.MQES: most entries of a queue, zero-based, at least 1.
    pub mqes_z: u16,
    /// CAP.DSTRD.
    pub dstrd: u8,
    /// CAP.TO, in 500 ms.
    pub timeout_500ms: u8,
    /// CRTO.CRWMT, in 500 ms.
    pub crwmt_500ms: u16,
    /// MDTS; 0 is no limit.
    pub mdts: u8,
    /// The most I/O queue pairs that it grants.
    pub io_queues_max: u16,
    /// Whether it takes SGLs.
    pub sgl: bool,
    /// Whether addresses and lengths in SGLs must be multiples of 4.
    pub sgl_by_dwords: bool,
    /// Whether it offers shadow doorbells.
    pub shadow_doorbells: bool,
    /// Interrupt vectors; 0 for none.
    pub vectors: u16,
    /// Whether it has a volatile write cache.
    pub volatile_write_cache: bool,
    /// WZSL; 0 is no limit.
    pub wzsl: u8,
    /// VSL; 0 is no limit.
    pub vsl: u8,
    /// DMRL: most ranges of a Dataset Management; 0 is no limit.
    pub dmrl: u8,
    /// DMRSL: most blocks of a deallocated range; 0 is no limit.
    pub dmrsl: u32,
    /// DMSL: most blocks of all deallocated ranges; 0 is no limit.
    pub dmsl: u64,
    /// Optional I/O commands, as in ONCS.
    pub oncs: u16,
    /// Steps from CC.EN to CSTS.RDY, either way.
    pub ready_steps: u32,
    /// Commands taken from each submission queue a step.
    pub burst: u16,
    /// Threads that read and write files and block devices for the controller, which then executes that many commands at a
    /// time and completes them in any order. With 0 it executes each command when it fetches it.
    pub disk_threads: u16,
    /// PCI vendor and device.
    pub pci_id: (u16, u16),
}

impl Default for ControllerOptions {
    /// 1024 entries a queue, 64 queue pairs with an interrupt each, transfers to 512 KiB, all I/O commands that the model
    /// knows, no SGLs, no shadow doorbells.
    fn default() -> Self {
        use nvme_spec::identify::oncs;
        Self {
            name: "model".to_owned(),
            mqes_z: 1023,
            dstrd: 0,
            timeout_500ms: 20,
            crwmt_500ms: 20,
            mdts: 7,
            io_queues_max: 64,
            sgl: false,
            sgl_by_dwords: false,
            shadow_doorbells: false,
            vectors: 65,
            volatile_write_cache: true,
            wzsl: 0,
            vsl: 0,
            dmrl: 0,
            dmrsl: 0,
            dmsl: 0,
            oncs: oncs::COMPARE | oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES | oncs::VERIFY | oncs::COPY,
            ready_steps: 2,
            burst: 64,
            disk_threads: 0,
            // Of the range that virtio's vendor leaves for experiments: nothing real has it.
            pci_id: (0x1AF4, 0x10FE),
        }
    }
}

/// What a driver set by Set Features, and events that wait for a request.
#[derive(Debug, Default)]
pub(crate) struct Features {
    pub(crate) granted_queues: Option<(u16, u16)>,
    pub(crate) write_cache_off: bool,
    pub(crate) async_event_config: u32,
    pub(crate) arbitration: u32,
    pub(crate) interrupt_coalescing: u32,
    pub(crate) error_recovery: u32,
}

/// A controller. All of it is behind one lock, in [`crate::Model`].
#[derive(Debug)]
pub(crate) struct Controller {
    pub(crate) options: ControllerOptions,
    pub(crate) shared: Arc<Shared>,
    pub(crate) cntlid: u16,
    pub(crate) iommu: Iommu,
    pub(crate) faults: Faults,
    pub(crate) cc: Cc,
    pub(crate) csts: Csts,
    aqa: u32,
    asq: u64,
    acq: u64,
    intm: u32,
    /// Steps until CSTS.RDY follows CC.EN.
    ready_in: Option<u32>,
    /// The device was removed.
    pub(crate) gone: bool,
    pub(crate) now_steps: u64,
    pub(crate) sqs: BTreeMap<u16, SubmissionQueue>,
    pub(crate) cqs: BTreeMap<u16, CompletionQueue>,
    pub(crate) shadow: Option<ShadowBuffers>,
    pub(crate) vectors: Vec<Vector>,
    /// Whether interrupts were switched on: with the first that was attached, as by VFIO.
    pub(crate) interrupts_on: bool,
    pub(crate) held: Vec<Held>,
    /// Identifiers of Asynchronous Event Requests that wait.
    pub(crate) event_requests: VecDeque<u16>,
    /// Events that wait for a request.
    pub(crate) events: VecDeque<u32>,
    /// Events that were reported and not cleared.
    pub(crate) masked: Vec<u32>,
    /// Up to where changes of the namespaces were reported, and listed in the log page.
    pub(crate) namespaces_seen: u64,
    pub(crate) namespaces_listed: u64,
    pub(crate) features: Features,
    pub(crate) error_log: VecDeque<ErrorInformationEntry>,
    pub(crate) counts: Counts,
    pub(crate) commands_done: u64,
    pub(crate) data: Bounce,
    /// The thread that steps it, if one does.
    pub(crate) sleeper: Option<Thread>,
    /// `None` when commands are executed at once.
    pub(crate) disk: Option<Disk>,
}

impl Controller {
    pub(crate) fn new(shared: Arc<Shared>, cntlid: u16, options: ControllerOptions) -> Self {
        let namespaces_seen = shared.generation();
        let mut vectors = Vec::new();
        vectors.resize_with(options.vectors.into(), Vector::default);
        // A host that has no thread left gets a slower controller.
        let disk = Some(options.disk_threads).filter(|&threads| threads > 0);
        let disk = disk.and_then(|threads| Disk::start(threads).ok());
        Self {
            options,
            shared,
            cntlid,
            iommu: Iommu::new(),
            faults: Faults::default(),
            cc: Cc::new(),
            csts: Csts::new(),
            aqa: 0,
            asq: 0,
            acq: 0,
            intm: 0,
            ready_in: None,
            gone: false,
            now_steps: 0,
            sqs: BTreeMap::new(),
            cqs: BTreeMap::new(),
            shadow: None,
            vectors,
            interrupts_on: false,
            held: Vec::new(),
            event_requests: VecDeque::new(),
            events: VecDeque::new(),
            masked: Vec::new(),
            namespaces_seen,
            namespaces_listed: namespaces_seen,
            features: Features::default(),
            error_log: VecDeque::with_capacity(ERROR_ENTRIES),
            counts: Counts::default(),
            commands_done: 0,
            data: Bounce::default(),
            sleeper: None,
            disk,
        }
    }

    /// Who steps the model from now on, and is to be woken.
    pub(crate) fn set_sleeper(&mut self, sleeper: Option<Thread>) {
        if let Some(disk) = &self.disk {
            disk.set_sleeper(sleeper.clone());
        }
        self.sleeper = sleeper;
    }

    pub(crate) fn cap(&self) -> Cap {
        Cap::new()
            .with_mqes_z(self.options.mqes_z)
            .with_cqr(true)
            .with_to(self.options.timeout_500ms)
            .with_dstrd(self.options.dstrd & 0xF)
            .with_css_nvm(true)
            .with_mpsmax(4)
            .with_crwms(true)
    }

    /// The memory page that the driver chose, in bytes.
    pub(crate) const fn page(&self) -> usize {
        1 << (12 + self.cc.mps())
    }

    /// The granularity of SGLs in bytes, when they are taken.
    pub(crate) const fn sgl_granularity(&self) -> Option<u32> {
        match (self.options.sgl, self.options.sgl_by_dwords) {
            (false, _) => None,
            (true, false) => Some(1),
            (true, true) => Some(4),
        }
    }

    /// The length of BAR 0: all doorbells that there can be, in whole pages.
    pub(crate) fn bar_len(&self) -> u64 {
        let doorbells = u64::from(self.options.io_queues_max + 1) * 2 * (4 << (self.options.dstrd & 0xF));
        (u64::from(DOORBELL_BASE) + doorbells).next_multiple_of(4096)
    }

    pub(crate) fn read64(&self, offset: u32) -> u64 {
        if self.gone || u64::from(offset) + 8 > self.bar_len() {
            return u64::MAX;
        }
        match Property(offset) {
            Property::CAP => self.cap().into_bits(),
            Property::ASQ => self.asq,
            Property::ACQ => self.acq,
            _ => u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32,
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
    pub(crate) fn read32(&self, offset: u32) -> u32 {
        if self.faults.registers.reads_zeros {
            return 0;
        }
        if self.gone || !offset.is_multiple_of(4) || u64::from(offset) + 4 > self.bar_len() {
            return u32::MAX;
        }
        match Property(offset) {
            Property::CAP => self.cap().into_bits() as u32,
            Property(0x04) => (self.cap().into_bits() >> 32) as u32,
            Property::VS => Vs::new().with_mjr(1).with_mnr(4).into_bits(),
            Property::INTMS | Property::INTMC => self.intm,
            Property::CC => self.cc.into_bits(),
            Property::CSTS => self.csts.into_bits(),
            Property::AQA => self.aqa,
            Property::ASQ => self.asq as u32,
            Property(0x2C) => (self.asq >> 32) as u32,
            Property::ACQ => self.acq as u32,
            Property(0x34) => (self.acq >> 32) as u32,
            Property::CRTO => Crto::new().with_crwmt(self.options.crwmt_500ms).into_bits(),
            _ => 0,
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
    pub(crate) fn write64(&mut self, offset: u32, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset.saturating_add(4), (value >> 32) as u32);
    }

    pub(crate) fn write32(&mut self, offset: u32, value: u32) {
        let lost = self.gone || self.faults.registers.reads_zeros;
        if lost || !offset.is_multiple_of(4) || u64::from(offset) + 4 > self.bar_len() {
            return;
        }
        let low = |old: u64| old & !0xFFFF_FFFF | u64::from(value);
        let high = |old: u64| old & 0xFFFF_FFFF | u64::from(value) << 32;
        match Property(offset) {
            Property::INTMS => self.intm |= value,
            Property::INTMC => self.intm &= !value,
            Property::CC => self.configure(Cc::from_bits(value)),
            Property::AQA => self.aqa = value,
            // The low 12 bits of both addresses are reserved.
            Property::ASQ => self.asq = low(self.asq) & !0xFFF,
            Property(0x2C) => self.asq = high(self.asq),
            Property::ACQ => self.acq = low(self.acq) & !0xFFF,
            Property(0x34) => self.acq = high(self.acq),
            _ if offset >= DOORBELL_BASE => self.doorbell(offset - DOORBELL_BASE, value),
            _ => {}
        }
    }

    /// Something was written: there may be work.
    pub(crate) fn wake(&self) {
        if let Some(sleeper) = &self.sleeper {
            sleeper.unpark();
        }
    }

    fn configure(&mut self, cc: Cc) {
        let before = self.cc;
        self.cc = cc;
        if cc.en() != before.en() {
            self.ready_in = Some(self.options.ready_steps);
        }
        if cc.shn() != 0 && before.shn() == 0 {
            self.csts.set_shst(0b01);
        }
    }

    fn doorbell(&mut self, offset: u32, value: u32) {
        let stride = 4u32 << (self.options.dstrd & 0xF);
        if !self.csts.rdy() || !offset.is_multiple_of(stride) {
            return;
        }
        let index = offset / stride;
        let Ok(qid) = u16::try_from(index / 2) else { return };
        let fits = if index.is_multiple_of(2) {
            self.sqs.get_mut(&qid).map(|queue| queue.set_tail(value))
        } else {
            self.cqs.get_mut(&qid).map(|queue| queue.set_head(value))
        };
        match fits {
            Some(true) => {}
            // Asynchronous events of type error (Base section 5.1.2.1): a doorbell without a queue, a value it cannot have.
            None => self.raise(0x0001_0000),
            Some(false) => self.raise(0x0001_0100),
        }
    }

    /// Lets time pass for the state machine. Returns whether something changed.
    pub(crate) fn advance_state(&mut self) -> bool {
        let before = self.csts;
        match self.ready_in {
            Some(0) => {
                self.ready_in = None;
                if self.cc.en() { self.become_ready() } else { self.become_disabled() }
            }
            Some(steps) => self.ready_in = Some(steps - 1),
            None => {}
        }
        if self.csts.shst() == 0b01 && !self.faults.registers.never_shut_down {
            self.csts.set_shst(0b10);
            // After shutdown nothing is fetched any more (Base section 3.6.1).
            self.drop_io();
        }
        self.csts != before || self.ready_in.is_some()
    }

    fn become_ready(&mut self) {
        if self.faults.registers.fatal_on_enable {
            self.csts.set_cfs(true);
            return;
        }
        let asqs_z = self.aqa & 0xFFF;
        let acqs_z = self.aqa >> 16 & 0xFFF;
        let sizes_fit = asqs_z > 0 && acqs_z > 0 && self.cc.mps() <= 4;
        let sets_fit = self.cc.css() == css::NVM && self.cc.iosqes() == 6 && self.cc.iocqes() == 4;
        if self.faults.registers.never_ready || !sizes_fit || !sets_fit {
            return;
        }
        self.csts = Csts::new().with_rdy(true);
        self.cqs.insert(0, CompletionQueue::new(self.acq, acqs_z + 1, Some(0)));
        self.sqs.insert(0, SubmissionQueue::new(self.asq, asqs_z + 1, 0));
    }

    fn become_disabled(&mut self) {
        if self.faults.registers.never_disabled && self.csts.rdy() {
            return;
        }
        self.reset_state();
    }

    /// Everything that a controller reset clears. AQA, ASQ and ACQ stay (Base section 3.7.2).
    fn reset_state(&mut self) {
        self.csts = Csts::new();
        self.drop_io();
        self.features = Features::default();
        self.shadow = None;
        self.namespaces_seen = self.shared.generation();
        self.namespaces_listed = self.namespaces_seen;
    }

    fn drop_io(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.drain();
        }
        self.sqs.clear();
        self.cqs.clear();
        self.held.clear();
        self.event_requests.clear();
        self.events.clear();
        self.masked.clear();
    }

    /// A reset from outside.
    pub(crate) fn function_reset(&mut self) {
        self.reset_state();
        (self.cc, self.aqa, self.asq, self.acq, self.intm) = (Cc::new(), 0, 0, 0, 0);
        self.ready_in = None;
    }

    /// CSTS.CFS: nothing moves until a reset.
    pub(crate) const fn fail(&mut self) {
        self.csts.set_cfs(true);
    }

    /// The device is pulled out.
    pub(crate) fn vanish(&mut self) {
        self.gone = true;
        self.drop_io();
    }

    /// Puts an event in line for the next Asynchronous Event Request.
    pub(crate) fn raise(&mut self, dw0: u32) {
        if self.events.len() < 16 && !self.events.contains(&dw0) {
            self.events.push_back(dw0);
        }
    }
}
