//! Identify (Base section 5.1.13).

use nvme_spec::aer::config;
use nvme_spec::identify::{
    CONTROLLER_LIST_MAX, CSI_NVM, Cns, ControllerType, IDENTIFY_LEN, IdentifyController,
    IdentifyControllerNvm, IdentifyNamespace, IdentifyNamespaceIndependent, LbaFormat, NamespaceIdType, cmic,
    lpa, oacs, sgls, vwc,
};
use nvme_spec::{Status, SubmissionQueueEntry, ascii_padded};
use zerocopy::IntoBytes;

use crate::controller::Controller;
use crate::logs::ERROR_ENTRIES;
use crate::namespace::Namespace;

impl Controller {
    /// The 4096 bytes that an Identify asks for.
    pub(crate) fn identify(&self, sqe: &SubmissionQueueEntry) -> Result<Vec<u8>, Status> {
        let nsid = sqe.nsid.get();
        let cns = Cns(sqe.cdw10.to_bytes()[0]);
        let csi = sqe.cdw11.to_bytes()[3];
        match cns {
            Cns::CONTROLLER => Ok(self.identify_controller().as_bytes().to_vec()),
            Cns::NAMESPACE => self.identify_namespace(nsid),
            Cns::ACTIVE_NAMESPACES => self.namespace_list(nsid),
            Cns::NAMESPACE_DESCRIPTORS => self.descriptors(nsid),
            Cns::IO_NAMESPACE if csi == CSI_NVM => {
                self.namespace(nsid)?;
                Ok(vec![0; IDENTIFY_LEN])
            }
            Cns::IO_CONTROLLER if csi == CSI_NVM => Ok(self.identify_nvm().as_bytes().to_vec()),
            Cns::IO_ACTIVE_NAMESPACES if csi == CSI_NVM => self.namespace_list(nsid),
            Cns::SUBSYSTEM_CONTROLLERS => Ok(self.controller_list(sqe)),
            Cns::NAMESPACE_CONTROLLERS => self.namespace(nsid).map(|_| self.controller_list(sqe)),
            Cns::INDEPENDENT_NAMESPACE => self.independent(nsid),
            _ => Err(Status::INVALID_FIELD.with_dnr()),
        }
    }

    fn namespace(&self, nsid: u32) -> Result<std::sync::Arc<Namespace>, Status> {
        self.shared.namespace(nsid).ok_or(Status::INVALID_NAMESPACE.with_dnr())
    }

    fn identify_controller(&self) -> IdentifyController {
        let mut id = IdentifyController::zeroed();
        id.vid.set(self.options.pci_id.0);
        id.ssvid.set(self.options.pci_id.0);
        id.sn = ascii_padded(&self.shared.serial);
        id.mn = ascii_padded("fastice model");
        id.fr = ascii_padded("1.0");
        id.cmic = cmic::MULTI_CONTROLLER;
        id.mdts = self.options.mdts;
        id.cntlid.set(self.cntlid);
        id.ver.set(0x0001_0400);
        id.oaes.set(config::NAMESPACE_ATTRIBUTE);
        id.cntrltype = ControllerType::IO;
        id.acl_z = 3;
        id.aerl_z = 3;
        id.frmw = 0b11;
        id.lpa = lpa::EXTENDED_DATA;
        id.elpe_z = u8::try_from(ERROR_ENTRIES - 1).unwrap_or(u8::MAX);
        if self.options.shadow_doorbells {
            id.oacs.set(oacs::DOORBELL_BUFFER_CONFIG);
        }
        // Copy descriptor format 0h.
        id.cdfs.set(1);
        id.wctemp.set(343);
        id.cctemp.set(353);
        id.sqes = 0x66;
        id.cqes = 0x44;
        id.nn.set(1024);
        id.oncs.set(self.options.oncs);
        if self.options.volatile_write_cache {
            id.vwc = vwc::PRESENT | vwc::FLUSH_ALL_SUPPORTED;
        }
        if self.options.sgl {
            let kind = if self.options.sgl_by_dwords { sgls::SUPPORTED_BY_DWORDS } else { sgls::SUPPORTED };
            id.sgls.set(kind);
        }
        for (to, from) in id.subnqn.iter_mut().zip(self.shared.nqn.bytes()) {
            *to = from;
        }
        id
    }

    fn identify_nvm(&self) -> IdentifyControllerNvm {
        let mut id = IdentifyControllerNvm::zeroed();
        id.vsl = self.options.vsl;
        id.wzsl = self.options.wzsl;
        id.dmrl = self.options.dmrl;
        id.dmrsl.set(self.options.dmrsl);
        id.dmsl.set(self.options.dmsl);
        id
    }

    fn identify_namespace(&self, nsid: u32) -> Result<Vec<u8>, Status> {
        let mut id = IdentifyNamespace::zeroed();
        if nsid == 0 || nsid > 1024 {
            return Err(Status::INVALID_NAMESPACE.with_dnr());
        }
        // An inactive namespace is all zeros (Base section 5.1.13.2.1).
        if let Some(namespace) = self.shared.namespace(nsid) {
            let options = &namespace.options;
            id.nsze.set(options.blocks);
            id.ncap.set(options.blocks);
            id.nuse.set(options.blocks);
            id.nmic = 1;
            // Deallocated blocks read as zeros; Write Zeroes may deallocate.
            id.dlfeat = 0b1001;
            id.noiob.set(options.noiob);
            let (range, all, ranges_z) = options.copy_limits;
            id.mssrl.set(range);
            id.mcl.set(all);
            id.msrc = ranges_z;
            id.nsattr = u8::from(options.read_only);
            id.nguid = options.nguid;
            id.eui64 = options.eui64;
            id.lbaf[0] = LbaFormat { ms: options.metadata_bytes.into(), lbads: options.block_shift, rp: 0 };
        }
        Ok(id.as_bytes().to_vec())
    }

    fn independent(&self, nsid: u32) -> Result<Vec<u8>, Status> {
        let namespace = self.namespace(nsid)?;
        let mut id = IdentifyNamespaceIndependent::zeroed();
        id.nmic = 1;
        id.nsattr = u8::from(namespace.options.read_only);
        id.nstat = 1;
        Ok(id.as_bytes().to_vec())
    }

    fn namespace_list(&self, after: u32) -> Result<Vec<u8>, Status> {
        if after >= 0xFFFF_FFFE {
            return Err(Status::INVALID_NAMESPACE.with_dnr());
        }
        let mut list: Vec<u8> = self
            .shared
            .nsids()
            .into_iter()
            .filter(|&nsid| nsid > after)
            .take(IDENTIFY_LEN / 4)
            .flat_map(u32::to_le_bytes)
            .collect();
        list.resize(IDENTIFY_LEN, 0);
        Ok(list)
    }

    /// All controllers from CNTID: each has all namespaces.
    fn controller_list(&self, sqe: &SubmissionQueueEntry) -> Vec<u8> {
        let from = u16::from_le_bytes([sqe.cdw10.to_bytes()[2], sqe.cdw10.to_bytes()[3]]);
        let ids: Vec<u16> =
            self.shared.cntlids().filter(|&id| id >= from).take(CONTROLLER_LIST_MAX).collect();
        let count = u16::try_from(ids.len()).unwrap_or(0);
        let mut list: Vec<u8> = [count].into_iter().chain(ids).flat_map(u16::to_le_bytes).collect();
        list.resize(IDENTIFY_LEN, 0);
        list
    }

    fn descriptors(&self, nsid: u32) -> Result<Vec<u8>, Status> {
        let namespace = self.namespace(nsid)?;
        let options = &namespace.options;
        let mut list = Vec::with_capacity(IDENTIFY_LEN);
        let mut add = |kind: NamespaceIdType, id: &[u8]| {
            if id.iter().any(|&byte| byte != 0) || kind == NamespaceIdType::CSI {
                list.extend([kind.0, u8::try_from(id.len()).unwrap_or(0), 0, 0]);
                list.extend_from_slice(id);
            }
        };
        add(NamespaceIdType::EUI64, &options.eui64);
        add(NamespaceIdType::NGUID, &options.nguid);
        if let Some(uuid) = &options.uuid {
            add(NamespaceIdType::UUID, uuid);
        }
        add(NamespaceIdType::CSI, &[CSI_NVM]);
        list.resize(IDENTIFY_LEN, 0);
        Ok(list)
    }
}
