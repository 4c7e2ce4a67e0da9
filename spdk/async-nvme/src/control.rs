//! The control path as futures. Each polls the controller, asks to be polled again at once, and ends by the
//! controller's own deadlines. Dropping one is always safe: the controller owns whatever is under way.

use std::future::poll_fn;
use std::task::Poll;

use nvme_spec::AdminOpcode;
use nvme_spec::log::{FirmwareSlot, LogPageId, SmartHealth};
use nvme_spec::queue::GetLogCdw10;
use zerocopy::FromBytes;

use crate::admin::{AdminCommand, AdminReply};
use crate::controller::{Controller, State};
use crate::error::Error;

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

    /// The first `len` bytes (at most 4096, a multiple of 4) of a log page.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub async fn log_page(&mut self, page: LogPageId, nsid: u32, len: usize) -> Result<Vec<u8>, Error> {
        if len == 0 || !len.is_multiple_of(4) || len > 4096 {
            return Err(Error::TooLarge { bytes: len });
        }
        let numdl_z = u16::try_from(len / 4 - 1).unwrap_or(0);
        let cdw10 = GetLogCdw10::new().with_lid(page.0).with_rae(true).with_numdl_z(numdl_z);
        let command = AdminCommand {
            what: "Get Log Page",
            opcode: AdminOpcode::GET_LOG_PAGE.0,
            nsid,
            cdw10_15: [cdw10.into_bits(), 0, 0, 0, 0, 0],
            data_in_len: len,
            ..Default::default()
        };
        Ok(self.admin(&command).await?.data)
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
