//! The control path as futures. Each polls the controller, asks to be polled again at once, and ends by the
//! controller's own deadlines. Dropping one is always safe: the controller owns whatever is under way.

use std::future::poll_fn;
use std::task::Poll;

use nvme_spec::AdminOpcode;
use nvme_spec::feature::{FeatureId, FeatureSelect, SET_FEATURES_SAVE};
use nvme_spec::identify::{Cns, IDENTIFY_LEN};
use nvme_spec::log::{ErrorInformationEntry, FirmwareSlot, LogPageId, SmartHealth};
use zerocopy::FromBytes;

use crate::admin::{AdminCommand, AdminReply, DATA_LEN};
use crate::controller::Controller;
use crate::error::Error;
use crate::events::get_log;
use crate::options::State;

/// Most bytes of a log page read at once.
const LOG_LEN_MAX: usize = 1 << 20;

impl Controller {
    /// Starts the controller, or waits for a reset under way, until it is ready.
    ///
    /// # Errors
    /// Why it was given up.
    pub async fn ready(&mut self) -> Result<(), Error> {
        self.start();
        self.until(|controller| controller.state() == State::Ready).await
    }

    /// Polls until `done` says so.
    ///
    /// # Errors
    /// When the controller is over before.
    pub async fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) -> Result<(), Error> {
        poll_fn(|context| {
            self.poll();
            if done(self) {
                return Poll::Ready(Ok(()));
            }
            if self.is_over() {
                let gone = || Error::NotReady { name: self.name() };
                return Poll::Ready(Err(self.failure().cloned().unwrap_or_else(gone)));
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }

    /// One admin command.
    ///
    /// # Errors
    /// The controller's answer, when it is no success; that it was reset meanwhile; or that it cannot be asked now.
    pub async fn admin(&mut self, command: &AdminCommand) -> Result<AdminReply, Error> {
        let token = self.submit_admin(command)?;
        let mut guard = Forget { controller: self, token: Some(token) };
        poll_fn(|context| {
            guard.controller.poll();
            if let Some(answer) = guard.controller.take_admin(token) {
                guard.token = None;
                return Poll::Ready(answer);
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }

    /// The first `len` bytes (a multiple of 4) of a log page. Leaves the events that belong to it as they are.
    ///
    /// # Errors
    /// As [`Controller::admin`]; when `len` is 0, no multiple of 4, or above 1 MiB.
    pub async fn log_page(&mut self, page: LogPageId, nsid: u32, len: usize) -> Result<Vec<u8>, Error> {
        if len == 0 || !len.is_multiple_of(4) || len > LOG_LEN_MAX {
            return Err(Error::TooLarge { bytes: len });
        }
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let part = (len - data.len()).min(DATA_LEN);
            let command = get_log(page, nsid, data.len() as u64, part, true);
            data.extend(self.admin(&command).await?.data);
        }
        Ok(data)
    }

    /// The SMART / Health Information log.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn smart(&mut self) -> Result<SmartHealth, Error> {
        let data = self.log_page(LogPageId::SMART_HEALTH, u32::MAX, 512).await?;
        SmartHealth::read_from_bytes(&data).map_err(|_| Error::TooLarge { bytes: data.len() })
    }

    /// The Firmware Slot Information log.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn firmware_slots(&mut self) -> Result<FirmwareSlot, Error> {
        let data = self.log_page(LogPageId::FIRMWARE_SLOT, u32::MAX, 512).await?;
        FirmwareSlot::read_from_bytes(&data).map_err(|_| Error::TooLarge { bytes: data.len() })
    }

    /// The entries of the Error Information log, the latest first, at most 64.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn error_log(&mut self) -> Result<Vec<ErrorInformationEntry>, Error> {
        let entries = usize::from(self.info().error_log_entries.clamp(1, 64));
        let data = self.log_page(LogPageId::ERROR_INFORMATION, u32::MAX, entries * 64).await?;
        let entries =
            data.chunks_exact(64).filter_map(|bytes| ErrorInformationEntry::read_from_bytes(bytes).ok());
        Ok(entries.filter(|entry| entry.error_count.get() != 0).collect())
    }

    /// The value of a feature: DW0 of Get Features.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn feature(
        &mut self,
        feature: FeatureId,
        nsid: u32,
        select: FeatureSelect,
    ) -> Result<u32, Error> {
        let command = AdminCommand {
            what: "Get Features",
            opcode: AdminOpcode::GET_FEATURES.0,
            nsid,
            cdw10_15: [u32::from(feature.0) | u32::from(select.0) << 8, 0, 0, 0, 0, 0],
            ..Default::default()
        };
        Ok(self.admin(&command).await?.dw0)
    }

    /// Sets a feature to `value` (CDW11); with `save` also beyond the next reset. Returns DW0. Features on which the
    /// driver stands (Number of Queues, Asynchronous Event Configuration, Host Memory Buffer) are not for this.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn set_feature(
        &mut self,
        feature: FeatureId,
        nsid: u32,
        value: u32,
        save: bool,
    ) -> Result<u32, Error> {
        let saved = if save { SET_FEATURES_SAVE } else { 0 };
        let command = AdminCommand {
            what: "Set Features",
            opcode: AdminOpcode::SET_FEATURES.0,
            nsid,
            cdw10_15: [u32::from(feature.0) | saved, value, 0, 0, 0, 0],
            ..Default::default()
        };
        Ok(self.admin(&command).await?.dw0)
    }

    /// Whether the volatile write cache is on; false where there is none. While it is on, only a Flush, or FUA, makes
    /// what was written durable.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn write_cache(&mut self) -> Result<bool, Error> {
        if !self.info().volatile_write_cache {
            return Ok(false);
        }
        let value = self.feature(FeatureId::VOLATILE_WRITE_CACHE, 0, FeatureSelect::CURRENT).await?;
        Ok(value & 1 != 0)
    }

    /// Turns the volatile write cache on or off; after each reset of the controller anew.
    ///
    /// # Errors
    /// As [`Controller::admin`]; when there is none that could be turned on.
    pub async fn set_write_cache(&mut self, on: bool) -> Result<(), Error> {
        if !self.info().volatile_write_cache {
            let what = "it has no volatile write cache".to_owned();
            return if on { Err(Error::Unsupported { name: self.name(), what }) } else { Ok(()) };
        }
        self.set_feature(FeatureId::VOLATILE_WRITE_CACHE, 0, on.into(), false).await?;
        self.write_cache_wished = Some(on);
        Ok(())
    }

    /// The identifiers of the controllers to which a namespace is attached; of all controllers of the subsystem for
    /// `None`. At most the first 2047.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn controllers(&mut self, nsid: Option<u32>) -> Result<Vec<u16>, Error> {
        let cns = if nsid.is_some() { Cns::NAMESPACE_CONTROLLERS } else { Cns::SUBSYSTEM_CONTROLLERS };
        let data = self.identify(cns, nsid.unwrap_or(0)).await?;
        let mut list = data.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        let count = list.next().unwrap_or(0);
        Ok(list.take(count.into()).collect())
    }

    /// The 4096 bytes of any Identify structure.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn identify(&mut self, cns: Cns, nsid: u32) -> Result<Vec<u8>, Error> {
        let command = AdminCommand {
            what: "Identify",
            opcode: AdminOpcode::IDENTIFY.0,
            nsid,
            cdw10_15: [cns.0.into(), 0, 0, 0, 0, 0],
            data_in_len: IDENTIFY_LEN,
            ..Default::default()
        };
        Ok(self.admin(&command).await?.data)
    }

    /// Shuts the controller down and disables it.
    ///
    /// # Errors
    /// When it is gone or given up before.
    pub async fn shutdown(&mut self) -> Result<(), Error> {
        self.begin_shutdown();
        self.until(|controller| controller.state() == State::Stopped).await
    }
}

/// An answer that nobody waits for is thrown away when it comes.
struct Forget<'a> {
    controller: &'a mut Controller,
    token: Option<crate::admin::AdminToken>,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(token) = self.token {
            self.controller.admin.forget(token);
        }
    }
}
