//! The scripted target's fabrics and admin commands: as few as the initiator needs.

use super::{CNTLID, Connection, Fault, Over};
use nvme_spec::fabrics::{ConnectCommand, FabricsCommandType, PropertyGetCommand, PropertySetCommand};
use nvme_spec::identify::{Cns, ControllerType, IdentifyController, IdentifyNamespace};
use nvme_spec::register::{Cap, Cc, Csts, Property};
use nvme_spec::{AdminOpcode, Status, SubmissionQueueEntry};
use std::sync::atomic::Ordering;
use zerocopy::{FromZeros, IntoBytes, transmute};

impl Connection {
    pub(super) fn fabrics(&mut self, sqe: SubmissionQueueEntry) -> Result<(), Over> {
        let connect: ConnectCommand = transmute!(sqe);
        match FabricsCommandType(connect.fctype) {
            FabricsCommandType::CONNECT => {
                self.qid = connect.qid.get();
                self.respond(&sqe, CNTLID.into(), Status::SUCCESS)
            }
            FabricsCommandType::PROPERTY_GET => {
                let get: PropertyGetCommand = transmute!(sqe);
                let value = match Property(get.ofst.get()) {
                    Property::CAP => {
                        Cap::new().with_mqes_z(1023).with_cqr(true).with_to(10).with_css_nvm(true).into_bits()
                    }
                    Property::VS => 0x0001_0400,
                    Property::CC => self.cc.into_bits().into(),
                    Property::CSTS => {
                        let shst = if self.cc.shn() == 0 { 0 } else { 2 };
                        Csts::new().with_rdy(self.cc.en()).with_shst(shst).into_bits().into()
                    }
                    _ => return self.respond(&sqe, 0, Status::INVALID_FIELD.with_dnr()),
                };
                self.respond(&sqe, value, Status::SUCCESS)
            }
            FabricsCommandType::PROPERTY_SET => {
                let set: PropertySetCommand = transmute!(sqe);
                self.cc = Cc::from_bits(u32::try_from(set.value.get()).expect("CC has 32 bits"));
                if self.cc.shn() != 0 {
                    self.shared.seen.shut_down.store(true, Ordering::Release);
                }
                self.respond(&sqe, 0, Status::SUCCESS)
            }
            _ => self.respond(&sqe, 0, Status::INVALID_FIELD.with_dnr()),
        }
    }

    pub(super) fn admin(&mut self, sqe: &SubmissionQueueEntry) -> Result<(), Over> {
        let cdw10 = sqe.cdw10.get();
        match AdminOpcode(sqe.opcode) {
            AdminOpcode::IDENTIFY => {
                let cns = Cns(cdw10.to_le_bytes()[0]);
                match self.identify(cns, sqe.nsid().get()) {
                    Some(data) => self.send_data(sqe, &data, Fault::None),
                    None => self.respond(sqe, 0, Status::INVALID_FIELD.with_dnr()),
                }
            }
            AdminOpcode::GET_LOG_PAGE if cdw10 & 0xFF == 0x70 => {
                let len = ((sqe.cdw11.get() << 16 | cdw10 >> 16) as usize + 1) * 4;
                let log = self.discovery_log(sqe.cdw12.get() == 0);
                let at = (sqe.cdw12.get() as usize).min(log.len());
                let mut data = log[at..].to_vec();
                data.resize(len, 0);
                self.send_data(sqe, &data, Fault::None)
            }
            AdminOpcode::GET_LOG_PAGE => {
                let len = ((sqe.cdw11.get() << 16 | cdw10 >> 16) as usize + 1) * 4;
                let data: Vec<u8> = (sqe.cdw12.get()..).take(len).map(|at| at.to_le_bytes()[0]).collect();
                self.send_data(sqe, &data, Fault::None)
            }
            AdminOpcode::SET_FEATURES if cdw10 & 0xFF == 7 => {
                let granted = u32::from(self.shared.behaviour.io_queues - 1);
                self.respond(sqe, (granted | granted << 16).into(), Status::SUCCESS)
            }
            AdminOpcode::SET_FEATURES => self.respond(sqe, 0, Status::SUCCESS),
            AdminOpcode::GET_FEATURES => self.respond(sqe, 0xABCD, Status::SUCCESS),
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                self.events.push(sqe.cid.get());
                if self.events.len() < 4 {
                    return Ok(());
                }
                // All requests are in: tell of a changed namespace, once.
                let cid = self.events.remove(0);
                self.complete(cid, 0x0004_0002, Status::SUCCESS)
            }
            AdminOpcode::KEEP_ALIVE => {
                self.shared.seen.keep_alives.fetch_add(1, Ordering::Relaxed);
                self.respond(sqe, 0, Status::SUCCESS)
            }
            _ => self.respond(sqe, 0, Status::INVALID_OPCODE.with_dnr()),
        }
    }

    fn identify(&self, cns: Cns, nsid: u32) -> Option<Vec<u8>> {
        let behaviour = self.shared.behaviour;
        match cns {
            Cns::CONTROLLER => {
                let mut identity = IdentifyController::new_zeroed();
                identity.cntlid = CNTLID.into();
                identity.cntrltype = ControllerType::IO;
                identity.mdts = behaviour.mdts;
                identity.kas_100ms = 1.into();
                identity.oaes = (1 << 8).into();
                identity.aerl_z = 3;
                identity.ioccsz_16b = ((64 + behaviour.in_capsule_len) / 16).into();
                identity.iorcsz_16b = 1.into();
                Some(identity.as_bytes().to_vec())
            }
            Cns::NAMESPACE if nsid == 1 => {
                let mut identity = IdentifyNamespace::new_zeroed();
                identity.nsze = behaviour.blocks.into();
                identity.ncap = behaviour.blocks.into();
                identity.lbaf[0].lbads = 9;
                Some(identity.as_bytes().to_vec())
            }
            Cns::ACTIVE_NAMESPACES => {
                let mut data = vec![0; 4096];
                data[0] = u8::from(nsid == 0);
                Some(data)
            }
            Cns::NAMESPACE_DESCRIPTORS => {
                let mut data = vec![2, 16, 0, 0];
                data.extend_from_slice(&[0x22; 16]);
                data.extend_from_slice(&[1, 8, 0, 0]);
                data.extend_from_slice(&[0x11; 8]);
                data.extend_from_slice(&[4, 1, 0, 0, 0]);
                data.resize(4096, 0);
                Some(data)
            }
            _ => None,
        }
    }

    /// Two entries; the generation moves while the log is read as often as was asked for.
    fn discovery_log(&self, is_header: bool) -> Vec<u8> {
        if is_header {
            let reads = self.shared.genctr_reads.fetch_add(1, Ordering::Relaxed);
            if reads % 2 == 1 && reads / 2 < self.shared.behaviour.discovery_changes {
                self.shared.genctr.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut log = vec![0; 3 * 1024];
        log[..4].copy_from_slice(&self.shared.genctr.load(Ordering::Relaxed).to_le_bytes());
        log[8] = 2;
        for (index, entry) in log[1024..].chunks_mut(1024).enumerate() {
            entry[..3].copy_from_slice(&[3, 1, 2]);
            entry[32..64].fill(b' ');
            entry[32..36].copy_from_slice(b"4420");
            let nqn = format!("nqn.2026-11.example:disk{index}");
            entry[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
            entry[512..768].fill(b' ');
            entry[512..521].copy_from_slice(b"127.0.0.1");
        }
        log
    }
}
