//! A device of our driver is lost, or back.

use super::Server;
use crate::block::BlockDevice as _;
use crate::block::nvme::{Epoch, NvmeChange, Standing};
use crate::control::disks::{NvmeKey, exports_on};
use crate::control::error::DiskError;
use crate::control::proof::prove_again;
use crate::control::provider::Provider;
use crate::fabrics::{FenceReason, Target};

impl Server {
    /// A lost device has its exports fenced already; one that is back has to prove itself.
    pub(super) fn device_changed(&mut self, key: NvmeKey, change: NvmeChange) {
        let (way, nsid) = (key.0.to_string(), key.1);
        let Some(device) = self.provider.disks().nvme(&key) else { return };
        let exports = exports_on(&self.target, device.info());
        match change {
            NvmeChange::Lost { why } => {
                tracing::error!(
                    way,
                    nsid,
                    why,
                    exports = exports.len(),
                    "device lost: its exports are fenced until it is back"
                );
                fence_lost(&self.target, &mut self.provider);
            }
            NvmeChange::Back(epoch) => match self.provider.vouchers(&exports) {
                Ok(vouchers) => {
                    tracing::warn!(way, nsid, files = vouchers.len(), "device back: proving it");
                    prove_again(key, device, epoch, vouchers, self.events.clone());
                }
                Err(error) => {
                    tracing::error!(way, nsid, %error, "device back, but it cannot be proven: still fenced")
                }
            },
        }
    }

    /// Serves the exports of a device again that has proven itself. Their maps are those that they had.
    pub(super) fn device_proven(&mut self, key: &NvmeKey, epoch: Epoch, verdict: Result<(), DiskError>) {
        let (way, nsid) = (key.0.to_string(), key.1);
        let Some(device) = self.provider.disks().nvme(key) else { return };
        let exports = exports_on(&self.target, device.info());
        if let Err(error) = verdict {
            let error = &error as &dyn std::error::Error;
            tracing::error!(way, nsid, error, "what is back is not what was lost: its exports stay fenced");
            exports.iter().for_each(|export| self.target.fence(export, FenceReason::MapInDoubt));
            return;
        }
        // It was reset when it came back, perhaps after somebody else had it.
        if let Err(error) = self.provider.disks().taken(&key.0) {
            tracing::error!(way, nsid, %error, "its exports stay fenced");
            return;
        }
        if let Err(error) = device.admit(epoch)
            && device.standing() != Standing::Proven(epoch)
        {
            tracing::warn!(way, nsid, %error, "lost again before it was served");
            return;
        }
        exports.iter().for_each(|export| self.target.unfence(export, FenceReason::DeviceFailed));
        // A loss since then was noticed by a thread that may have fenced before we let in.
        fence_lost(&self.target, &mut self.provider);
        tracing::warn!(way, nsid, exports = exports.len(), "device is the one that was lost: served again");
    }
}

/// Fences what stands on devices that are lost, or not proven again: for exports that came, or were let in, while the
/// loss was noticed.
pub(super) fn fence_lost(target: &Target, provider: &mut Provider) {
    for device in provider.disks().nvme_in_use() {
        if !matches!(device.standing(), Standing::Proven(_)) {
            for export in exports_on(target, device.info()) {
                target.fence(&export, FenceReason::DeviceFailed);
            }
        }
    }
}
