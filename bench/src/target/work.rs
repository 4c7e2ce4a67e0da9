//! What a light host asks for, and the bytes of the commands that ask for it.

use anyhow::{Context, Result};
use fastice::initiator::command;
use fastice::tcp::digest::Digest;
use fastice::tcp::pdu::{Digests, PduType, flags};
use fastice::units::Lba;
use nvme_spec::command::psdt;
use nvme_spec::{Nsid, NvmOpcode, SglDescriptor, SubmissionQueueEntry};
use zerocopy::IntoBytes;

/// Common header and command (NVMe/TCP Transport specification 1.1, section 3.6.2.6).
pub const CAPSULE_LEN: usize = 72;
/// A header digest, and a data digest.
pub const DIGEST_LEN: usize = 4;
/// Bytes of a logical block of what is served.
pub const BLOCK_LEN: u32 = 4096;
/// Data of a write up to this goes in the capsule: what every target takes.
pub const IN_CAPSULE_LEN_MAX: u32 = 4096;
/// Where SLBA is in a capsule: behind the common header, in dwords 10 and 11 of the command.
const SLBA_AT: usize = 48;
/// What is written.
pub const FILL: u8 = 0x5A;

/// What the host does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Random reads.
    Read,
    /// Random writes.
    Write,
    /// Seven reads to three writes, evenly mixed.
    Mixed,
}

/// Commands of one kind and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Which.
    pub kind: Kind,
    /// Bytes of each, whole blocks.
    pub len: u32,
    /// Whether all PDUs have both digests.
    pub digests: bool,
}

impl Work {
    /// Commands of 4 KiB, without digests.
    pub const fn small(kind: Kind) -> Self {
        Self { kind, len: 4096, digests: false }
    }

    /// Its name in rows: `randread`, `randrw-128k`, `randread-digests`.
    pub fn name(self) -> String {
        let kind = match self.kind {
            Kind::Read => "randread",
            Kind::Write => "randwrite",
            Kind::Mixed => "randrw",
        };
        let len = if self.len == 4096 { String::new() } else { format!("-{}k", self.len >> 10) };
        format!("{kind}{len}{}", if self.digests { "-digests" } else { "" })
    }

    /// What is asked of the target when a connection begins.
    pub const fn wanted(self) -> Digests {
        Digests { header: self.digests, data: self.digests }
    }

    /// Whether the command with this CID reads. A command keeps its kind.
    pub const fn reads(self, cid: u16) -> bool {
        match self.kind {
            Kind::Read => true,
            Kind::Write => false,
            // 3 of 10, not next to each other.
            Kind::Mixed => !matches!(cid % 10, 2 | 5 | 8),
        }
    }

    /// A command somewhere on a namespace of so many blocks, with a CID of its own, and its data if that is in the capsule.
    ///
    /// # Errors
    /// When it has more data than 32 bits tell.
    pub fn capsule(self, cid: u16, seed: u16, blocks: u64) -> Result<Vec<u8>> {
        let in_capsule = !self.reads(cid) && self.len <= IN_CAPSULE_LEN_MAX;
        let (opcode, dptr) = match (self.reads(cid), in_capsule) {
            (true, _) => (NvmOpcode::READ, SglDescriptor::transport(self.len)),
            (false, true) => (NvmOpcode::WRITE, SglDescriptor::in_capsule(0, self.len)),
            (false, false) => (NvmOpcode::WRITE, SglDescriptor::transport(self.len)),
        };
        // Any odd number spreads them; each command keeps its place.
        let places = (blocks * u64::from(BLOCK_LEN) / u64::from(self.len)).max(1);
        let place = (u64::from(seed) << 16 | u64::from(cid)).wrapping_mul(0x9E37_79B9_7F4A_7C15) % places;
        let blocks_each = self.len / BLOCK_LEN;
        let nlb_z = u16::try_from(blocks_each - 1).context("a command that is too long")?;
        let sqe = SubmissionQueueEntry {
            flags: psdt::SGL << 6,
            cid: cid.into(),
            dptr,
            ..command::io(opcode, Nsid(1), Lba(place * u64::from(blocks_each)), nlb_z, false)
        };
        let data_len = if in_capsule { self.len as usize } else { 0 };
        Ok(self.pdu(PduType::CAPSULE_CMD, 0, sqe.as_bytes(), &vec![FILL; data_len]))
    }

    /// Gives a capsule of this work another place.
    #[inline]
    pub fn move_to(self, capsule: &mut [u8], lba: u64) {
        if let Some(slba) = capsule.get_mut(SLBA_AT..).and_then(<[u8]>::first_chunk_mut) {
            *slba = lba.to_le_bytes();
        }
        if self.digests
            && let Some((header, rest)) = capsule.split_at_mut_checked(CAPSULE_LEN)
            && let Some(header_digest) = rest.first_chunk_mut()
        {
            *header_digest = digest(header);
        }
    }

    /// A part of a command's data, as an R2T asked for it.
    pub fn data(self, asked: Asked, at: u32, len: u32) -> Vec<u8> {
        let last = if at + len == asked.offset + asked.len { flags::LAST } else { 0 };
        let mut specific = [0; 16];
        specific[..2].copy_from_slice(&asked.cccid.to_le_bytes());
        specific[2..4].copy_from_slice(&asked.ttag.to_le_bytes());
        specific[4..8].copy_from_slice(&at.to_le_bytes());
        specific[8..12].copy_from_slice(&len.to_le_bytes());
        self.pdu(PduType::H2C_DATA, last, &specific, &vec![FILL; len as usize])
    }

    /// A PDU of a common header, what is specific to its kind, digests and data.
    fn pdu(self, kind: PduType, flag_bits: u8, specific: &[u8], data: &[u8]) -> Vec<u8> {
        let small = |value: usize| u8::try_from(value).unwrap_or_default();
        let header_len = 8 + specific.len();
        let digest_len = if self.digests { DIGEST_LEN } else { 0 };
        let data_at = header_len + digest_len;
        let data_digest_len = if data.is_empty() { 0 } else { digest_len };
        let total = data_at + data.len() + data_digest_len;
        let header_digest = if self.digests { flags::HDGST } else { 0 };
        let data_digest = if data_digest_len > 0 { flags::DDGST } else { 0 };
        let pdo = if data.is_empty() { 0 } else { small(data_at) };
        let mut bytes = vec![kind.0, flag_bits | header_digest | data_digest, small(header_len), pdo];
        bytes.extend_from_slice(&u32::try_from(total).unwrap_or_default().to_le_bytes());
        bytes.extend_from_slice(specific);
        if self.digests {
            bytes.extend_from_slice(&digest(&bytes));
        }
        bytes.extend_from_slice(data);
        if data_digest_len > 0 {
            bytes.extend_from_slice(&digest(data));
        }
        bytes
    }
}

fn digest(bytes: &[u8]) -> [u8; DIGEST_LEN] {
    let mut digest = Digest::new();
    digest.update(bytes);
    digest.to_wire()
}

/// What an R2T asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Of which command.
    pub cccid: u16,
    /// To be said again with the data.
    pub ttag: u16,
    /// Where in the command's data it begins.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capsules_are_as_long_as_they_say_and_hold_what_they_must() {
        for (kind, len, digests, expected) in [
            (Kind::Read, 4096, false, 72),
            (Kind::Write, 4096, false, 72 + 4096),
            (Kind::Write, 128 << 10, false, 72),
            (Kind::Read, 4096, true, 76),
            (Kind::Write, 4096, true, 76 + 4096 + 4),
        ] {
            let capsule = Work { kind, len, digests }.capsule(7, 0, 1 << 20).unwrap();
            assert_eq!(capsule.len(), expected);
            assert_eq!(capsule[4..8], u32::try_from(expected).unwrap().to_le_bytes());
            assert_eq!(usize::from(capsule[2]), CAPSULE_LEN);
        }
    }

    #[test]
    fn a_capsule_that_is_moved_is_the_one_that_would_have_been_made_there() {
        for (kind, digests) in [(Kind::Read, false), (Kind::Read, true), (Kind::Write, true)] {
            let work = Work { kind, len: 4096, digests };
            let [mut here, there] = [1, 2].map(|seed| work.capsule(7, seed, 1 << 20).unwrap());
            assert_ne!(here, there);
            let lba = there[SLBA_AT..].first_chunk().copied().map(u64::from_le_bytes).unwrap();
            work.move_to(&mut here, lba);
            assert_eq!(here, there);
        }
    }

    #[test]
    fn three_of_ten_mixed_commands_write() {
        let work = Work::small(Kind::Mixed);
        assert_eq!((0..100).filter(|cid| !work.reads(*cid)).count(), 30);
        assert_eq!(work.name(), "randrw");
        assert_eq!(Work { kind: Kind::Read, len: 128 << 10, digests: true }.name(), "randread-128k-digests");
    }
}
