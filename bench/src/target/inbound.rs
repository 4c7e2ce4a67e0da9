//! What comes back, told from its headers: data is passed over where it lies, and looked at by nobody.
//!
//! ```text
//!   | CH PDU-specific 24 bytes | HDGST | data | DDGST |   next one
//!   '---- looked at -----------'---- passed over -----'
//! ```
//!
//! All three kinds that come to a host have headers of 24 bytes (NVMe/TCP Transport specification 1.1, section 3.6.2).

use anyhow::{Result, bail, ensure};
use fastice::tcp::pdu::{PduType, flags};

use super::work::Asked;

/// Common header and what is specific to C2HData, R2T and response capsules.
pub(crate) const HEADER_LEN: usize = 24;

/// What a PDU means to a host that only counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A command is done, well.
    Done {
        /// Which.
        cid: u16,
    },
    /// Data of a command is to be sent.
    Wanted(Asked),
    /// Data came, and more is to come.
    More,
}

/// The bytes of one connection, cut anywhere.
#[derive(Debug, Default)]
pub(crate) struct Inbound {
    header: [u8; HEADER_LEN],
    filled: usize,
    /// Of the PDU whose header is there.
    pending: Option<Event>,
    /// Bytes to pass over before it is whole.
    skip: usize,
}

impl Inbound {
    /// Takes what was received, and tells of every PDU that it completes.
    ///
    /// # Errors
    /// When something else comes than answers of commands that went well.
    pub(crate) fn take(&mut self, mut bytes: &[u8], mut tell: impl FnMut(Event) -> Result<()>) -> Result<()> {
        loop {
            if let Some(event) = self.pending {
                let passed = self.skip.min(bytes.len());
                bytes = bytes.get(passed..).unwrap_or_default();
                self.skip -= passed;
                if self.skip > 0 {
                    return Ok(());
                }
                self.pending = None;
                tell(event)?;
            }
            let room = self.header.get_mut(self.filled..).unwrap_or_default();
            let part = room.len().min(bytes.len());
            if part == 0 && !room.is_empty() {
                return Ok(());
            }
            let (head, rest) = bytes.split_at_checked(part).unwrap_or((bytes, &[]));
            if let Some(room) = room.get_mut(..part) {
                room.copy_from_slice(head);
            }
            bytes = rest;
            self.filled += part;
            if self.filled < HEADER_LEN {
                return Ok(());
            }
            self.filled = 0;
            self.pending = Some(event_of(&self.header)?);
            let len = u32_at(&self.header, 4) as usize;
            ensure!(len >= HEADER_LEN, "a PDU of {len} bytes");
            self.skip = len - HEADER_LEN;
        }
    }
}

fn event_of(header: &[u8; HEADER_LEN]) -> Result<Event> {
    match PduType(header[0]) {
        PduType::C2H_DATA => {
            let is_last = header[1] & (flags::LAST | flags::SUCCESS) == flags::LAST | flags::SUCCESS;
            Ok(if is_last { Event::Done { cid: u16_at(header, 8) } } else { Event::More })
        }
        PduType::CAPSULE_RESP => {
            // Dword 3 of the completion queue entry; the lowest bit of the status is the phase tag, which is 0 on fabrics.
            let (cid, status) = (u16_at(header, 20), u16_at(header, 22));
            ensure!(status == 0, "a command failed with status {:#x}", status >> 1);
            Ok(Event::Done { cid })
        }
        PduType::R2T => Ok(Event::Wanted(Asked {
            cccid: u16_at(header, 8),
            ttag: u16_at(header, 10),
            offset: u32_at(header, 12),
            len: u32_at(header, 16),
        })),
        other => bail!("another PDU than is measured came: type {:#x}", other.0),
    }
}

fn u16_at(header: &[u8; HEADER_LEN], at: usize) -> u16 {
    header.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u16::from_le_bytes)
}

fn u32_at(header: &[u8; HEADER_LEN], at: usize) -> u32 {
    header.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pdu(kind: PduType, flag_bits: u8, len: u32, specific: [u8; 16]) -> Vec<u8> {
        let mut bytes = vec![kind.0, flag_bits, 24, 0];
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&specific);
        bytes.resize((len as usize).max(HEADER_LEN), 0xEE);
        bytes
    }

    #[test]
    fn answers_are_told_wherever_the_bytes_are_cut() {
        let cid = |at: usize, cid: u8| {
            let mut specific = [0; 16];
            specific[at] = cid;
            specific
        };
        let stream = [
            pdu(PduType::C2H_DATA, flags::LAST | flags::SUCCESS, 24 + 4096, cid(0, 7)),
            pdu(PduType::CAPSULE_RESP, 0, 24, cid(12, 9)),
            pdu(PduType::C2H_DATA, 0, 24 + 512, cid(0, 3)),
            pdu(PduType::R2T, 0, 24, [1, 0, 2, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]),
        ]
        .concat();
        let expected = [
            Event::Done { cid: 7 },
            Event::Done { cid: 9 },
            Event::More,
            Event::Wanted(Asked { cccid: 1, ttag: 2, offset: 3, len: 4 }),
        ];
        for piece in [1, 5, 24, 100, 4096, stream.len()] {
            let (mut inbound, mut seen) = (Inbound::default(), Vec::new());
            for bytes in stream.chunks(piece) {
                inbound
                    .take(bytes, |event| {
                        seen.push(event);
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(seen, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_went_wrong_is_no_answer() {
        let failed = pdu(PduType::CAPSULE_RESP, 0, 24, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0]);
        for bytes in [failed, pdu(PduType::C2H_TERM_REQ, 0, 24, [0; 16]), pdu(PduType::R2T, 0, 23, [0; 16])] {
            assert!(Inbound::default().take(&bytes, |_| Ok(())).is_err());
        }
    }
}
