//! What the bare responder puts around its answers where header and data have digests (NVMe/TCP Transport specification 1.1, section 3.3.1).
//!
//! ```text
//!   header 24 | HDGST 4 | data | DDGST 4
//! ```
//!
//! Its data is zeroes, so the digest of as many is reckoned once: a target that serves what was stored has to read all of it. Headers
//! have theirs one by one, as the CID differs. What it does not do: check a digest that comes.

use fastice::tcp::digest::{Digest, crc32c};
use fastice::tcp::pdu::{Digests, flags};

use super::inbound::HEADER_LEN;

/// Where ICReq says which digests the host asks for (section 3.6.2.2), and what the bits are.
const DGST_AT: usize = 11;
const DGST_HEADER: u8 = 1;
const DGST_DATA: u8 = 2;

/// Those that an ICReq asks for.
pub(super) fn asked(ic_req: &[u8]) -> Digests {
    let bits = ic_req.get(DGST_AT).copied().unwrap_or_default();
    Digests { header: bits & DGST_HEADER != 0, data: bits & DGST_DATA != 0 }
}

/// Bytes of the digest behind each header.
pub(super) const fn header_digest_len(digests: Digests) -> usize {
    if digests.header { Digest::LEN } else { 0 }
}

/// A header as it goes over the wire, and how much data follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sealed {
    bytes: [u8; HEADER_LEN + Digest::LEN],
    len: usize,
    pub(super) data_len: usize,
}

impl Sealed {
    /// Of a header without digests, with so much data behind it.
    pub(super) fn new(plain: [u8; HEADER_LEN], data_len: usize, digests: Digests) -> Self {
        let mut bytes = [0; HEADER_LEN + Digest::LEN];
        bytes[..HEADER_LEN].copy_from_slice(&plain);
        let has_data = data_len > 0;
        let len = HEADER_LEN + header_digest_len(digests);
        if digests.data && has_data {
            bytes[1] |= flags::DDGST;
        }
        let trailer_len = if digests.data && has_data { Digest::LEN } else { 0 };
        let plen = u32::try_from(len + data_len + trailer_len).unwrap_or_default();
        bytes[4..8].copy_from_slice(&plen.to_le_bytes());
        if has_data {
            bytes[3] = u8::try_from(len).unwrap_or_default();
        }
        if digests.header {
            bytes[1] |= flags::HDGST;
            let digest = crc32c(0, bytes.get(..HEADER_LEN).unwrap_or_default());
            bytes[HEADER_LEN..].copy_from_slice(&digest.to_le_bytes());
        }
        Self { bytes, len, data_len }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// The digests of zeroes, by how many they are: few lengths are asked for.
#[derive(Debug, Default)]
pub(super) struct OfZeroes(Vec<(usize, [u8; Digest::LEN])>);

impl OfZeroes {
    /// That of so many, which are the first of `zeroes`, is known from now on.
    pub(super) fn take_note(&mut self, zeroes: &[u8], len: usize) {
        if len > 0 && self.behind(len).is_empty() {
            let digest = crc32c(0, zeroes.get(..len).unwrap_or_default());
            self.0.push((len, digest.to_le_bytes()));
        }
    }

    /// What follows so many; nothing where that is not known, or there are none.
    pub(super) fn behind(&self, len: usize) -> &[u8] {
        self.0.iter().find(|(known, _)| *known == len).map_or(&[], |(_, digest)| digest)
    }
}

#[cfg(test)]
mod tests {
    use super::super::bare;
    use super::*;

    #[test]
    fn with_digests_a_header_is_what_the_target_itself_would_write() {
        use fastice::tcp::pdu::{self, DataPdu, HEADER_MAX};
        for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
            let digests = Digests { header, data };
            let sealed = Sealed::new(bare::read_data([7, 1], 4096, true), 4096, digests);
            let pdu = DataPdu { cccid: 263, data_len: 4096, last: true, success: true, ..DataPdu::default() };
            let mut expected = [0; HEADER_MAX];
            let len = pdu::c2h_data(&mut expected, digests, 0, &pdu);
            assert_eq!(sealed.bytes(), &expected[..len], "{digests:?}");
        }
    }

    #[test]
    fn a_host_says_which_digests_it_asks_for() {
        let mut ic_req = [0; 128];
        assert_eq!(asked(&ic_req), Digests::NONE);
        ic_req[11] = 3;
        assert_eq!(asked(&ic_req), Digests { header: true, data: true });
    }

    #[test]
    fn the_digest_behind_data_is_that_of_as_many_zeroes() {
        let zeroes = [0; 8192];
        let mut behind = OfZeroes::default();
        assert_eq!(behind.behind(4096), [] as [u8; 0]);
        for len in [4096, 512, 8192] {
            behind.take_note(&zeroes, len);
        }
        for len in [4096, 512, 8192] {
            assert_eq!(behind.behind(len), crc32c(0, &zeroes[..len]).to_le_bytes());
        }
        assert_eq!(behind.behind(0), [] as [u8; 0], "no data, no digest");
    }
}
