//! A controller as the rest of the program holds it: questions to the thread that drives it.

use std::fmt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_nvme::{ControllerInfo, NamespaceInfo, Options, QueueTicket, Requeue};

use super::device::{Epoch, NvmeDevice, OnChange, Shared, describe};
use super::keeper::Keeper;
use super::reach::{NvmeWay, Reach};
use crate::block::{BlockError, BlockErrorKind, OpenError};

/// How long a controller may take to become ready at the start, with all that it may try before it gives up: more than
/// the longest CAP.TO (127.5 s), twice.
const START_PATIENCE: Duration = Duration::from_secs(300);
/// How long the thread may take to answer; it never waits for the device before it does.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// I/O queue pairs to ask a controller for: one for each core and namespace, and one more for each namespace.
const IO_QUEUES: u16 = 1024;

/// What a controller says of itself.
#[derive(Clone, Debug)]
pub struct NvmeDescription {
    /// The controller.
    pub controller: ControllerInfo,
    /// Its active namespaces.
    pub namespaces: Vec<NamespaceInfo>,
    /// The number of the kernel's block device that its blocks are those of, for a controller in software.
    pub stands_on: Option<(u32, u32)>,
}

/// What the thread is asked for.
pub(super) enum Ask {
    /// What the controller is; `None` while it is lost.
    Describe(Sender<Option<NvmeDescription>>),
    /// From now on this device is watched.
    Watch(Arc<Shared>),
    /// A queue pair.
    Ticket { nsid: u32, depth: u16, reply: Sender<Result<QueueTicket, BlockError>> },
    /// The device of this appearance is vouched for.
    Admit { device: Arc<Shared>, epoch: Epoch, reply: Sender<Result<(), BlockError>> },
    /// Some blocks.
    Read {
        nsid: u32,
        lba: u64,
        blocks: u64,
        len: u32,
        deadline: Instant,
        reply: Sender<Result<Vec<u8>, BlockError>>,
    },
    /// An orderly end.
    Stop,
}

/// A controller driven by a thread of its own, which looks after resets, events, loss and return.
pub struct NvmeController {
    name: String,
    mail: Mutex<Sender<Ask>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl NvmeController {
    /// Reaches the controller at the end of `way`, resets it, and returns when it is ready.
    ///
    /// # Errors
    /// When there is none, it may not be had, or it is one that the driver cannot drive.
    pub fn start(way: &NvmeWay, reach: Arc<dyn Reach>) -> Result<Arc<Self>, OpenError> {
        let (mail, inbox) = channel();
        let (up, is_up) = channel();
        let options = Options { io_queues: IO_QUEUES, requeue: Requeue::Idempotent, ..Options::default() };
        let to = way.clone();
        let silent = || OpenError::NvmeSilent { name: way.to_string() };
        let thread = std::thread::Builder::new()
            .name("nvme-control".to_owned())
            .spawn(move || Keeper::new(to, reach, options).run(&inbox, &up))
            .map_err(|_| silent())?;
        let started =
            Self { name: way.to_string(), mail: Mutex::new(mail), thread: Mutex::new(Some(thread)) };
        // Whatever the answer is, dropping it ends the thread.
        is_up.recv_timeout(START_PATIENCE).map_err(|_| silent())??;
        Ok(Arc::new(started))
    }

    /// What it is called in messages: the way to it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it says of itself now; `None` while it is lost.
    #[must_use]
    pub fn describe(&self) -> Option<NvmeDescription> {
        self.ask(Ask::Describe).flatten()
    }

    /// A namespace as a block device. `on_change` is called when it is lost and when it is back.
    ///
    /// # Errors
    /// When the controller is lost, or has no such namespace, or the namespace is one that cannot be used.
    pub fn device(self: &Arc<Self>, nsid: u32, on_change: OnChange) -> Result<Arc<NvmeDevice>, OpenError> {
        let name = || self.name.clone();
        let description = self.describe().ok_or_else(|| OpenError::NvmeSilent { name: name() })?;
        let no_namespace = |what: String| OpenError::NvmeNamespace { name: name(), nsid, what };
        let namespace = description
            .namespaces
            .iter()
            .find(|namespace| namespace.nsid == nsid)
            .ok_or_else(|| no_namespace("the controller has no such active namespace".to_owned()))?;
        if let Some(refusal) = namespace.refusal {
            return Err(no_namespace(refusal.to_owned()));
        }
        let info = describe(&self.name, &description.controller, namespace, description.stands_on)
            .ok_or_else(|| no_namespace("its size or block size is beyond all use".to_owned()))?;
        let serial = description.controller.serial;
        let shared = Arc::new(Shared::new(info, namespace.clone(), serial, on_change));
        self.post(Ask::Watch(Arc::clone(&shared)));
        Ok(Arc::new(NvmeDevice::new(shared, Arc::clone(self))))
    }

    /// Shuts the controller down in order; its devices are of no use from then on. Does so once.
    pub fn shut_down(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        self.post(Ask::Stop);
        if thread.join().is_err() {
            tracing::error!(
                name = self.name,
                "the thread of a controller panicked; this is a defect, please report it"
            );
        }
    }

    pub(super) fn ticket(&self, nsid: u32, depth: u16) -> Result<QueueTicket, BlockError> {
        self.ask(|reply| Ask::Ticket { nsid, depth, reply }).unwrap_or(Err(BlockErrorKind::Gone.into()))
    }

    pub(super) fn admit(&self, device: Arc<Shared>, epoch: Epoch) -> Result<(), BlockError> {
        self.ask(|reply| Ask::Admit { device, epoch, reply }).unwrap_or(Err(BlockErrorKind::Gone.into()))
    }

    pub(super) fn read(
        &self,
        nsid: u32,
        lba: u64,
        blocks: u64,
        shift: u32,
        deadline: Instant,
    ) -> Result<Vec<u8>, BlockError> {
        let len = u32::try_from(blocks << shift).map_err(|_| BlockErrorKind::InvalidRequest)?;
        let (reply, answer) = channel();
        self.post(Ask::Read { nsid, lba, blocks, len, deadline, reply });
        // The thread keeps the deadline; what is beyond is for its own turn.
        let patience = deadline.saturating_duration_since(Instant::now()) + ANSWER_PATIENCE;
        answer.recv_timeout(patience).unwrap_or(Err(BlockErrorKind::Gone.into()))
    }

    fn post(&self, ask: Ask) {
        // Refused only by a thread that has ended, and then whoever waits for an answer finds its channel closed.
        let _ = self.mail.lock().unwrap_or_else(PoisonError::into_inner).send(ask);
    }

    fn ask<T>(&self, ask: impl FnOnce(Sender<T>) -> Ask) -> Option<T> {
        let (reply, answer): (Sender<T>, Receiver<T>) = channel();
        self.post(ask(reply));
        answer.recv_timeout(ANSWER_PATIENCE).ok()
    }
}

impl Drop for NvmeController {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl fmt::Debug for NvmeController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NvmeController").field("name", &self.name).finish_non_exhaustive()
    }
}
