//! What commands call for, told from the bytes of a connection, and the headers that answer them.

use anyhow::{Context, Result, bail, ensure};
use fastice::tcp::pdu::{self, Digests, PduType};
use nvme_spec::NvmOpcode;

use super::super::bare::{self, PIECE_LEN};
use super::super::inbound::HEADER_LEN;
use super::super::sealed::{self, Sealed};
use super::super::work::CAPSULE_LEN;
use super::Together;

/// A header, and how many bytes of data come behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    header: [u8; HEADER_LEN],
    data_len: usize,
    /// The CID of a read.
    read: Option<[u8; 2]>,
}

impl Reply {
    /// Without data.
    const fn alone(header: [u8; HEADER_LEN]) -> Self {
        Self { header, data_len: 0, read: None }
    }
}

/// The bytes of one connection: commands, and data that nobody looks at.
#[derive(Debug, Default)]
pub(super) struct Commands {
    /// Whether reads have response capsules.
    responds: bool,
    /// The length of a capsule without data.
    alone_len: usize,
    /// Bytes to pass over, and what is due when they are gone.
    skip: usize,
    due: Option<Reply>,
}

impl Commands {
    /// Of a connection from whose beginning they are read.
    pub(super) fn new(responds: bool, digests: Digests) -> Self {
        let alone_len = CAPSULE_LEN + sealed::header_digest_len(digests);
        Self { responds, alone_len, ..Self::default() }
    }

    /// Takes what it can of `bytes`, and says how many these were.
    pub(super) fn take(&mut self, bytes: &[u8], replies: &mut Vec<Reply>) -> Result<usize> {
        let mut at = 0;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            let passed = self.skip.min(rest.len());
            (self.skip, at) = (self.skip - passed, at + passed);
            if self.skip > 0 {
                return Ok(at);
            }
            replies.extend(self.due.take());
            let rest = rest.get(passed..).unwrap_or_default();
            let Some(plen) = plen_of(rest) else { return Ok(at) };
            let (reply, header_len) = if rest.first() == Some(&PduType::H2C_DATA.0) {
                let Some(header) = rest.first_chunk() else { return Ok(at) };
                (after_data(header), HEADER_LEN)
            } else {
                let Some(capsule) = rest.first_chunk() else { return Ok(at) };
                (Some(to_command(capsule, plen == self.alone_len, self.responds)?), CAPSULE_LEN)
            };
            self.skip = plen.checked_sub(header_len).context("a PDU shorter than its header")?;
            (self.due, at) = (reply, at + header_len);
        }
    }
}

/// PLEN, once the common header is there.
pub(super) fn plen_of(bytes: &[u8]) -> Option<usize> {
    let plen = bytes.get(4..8)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(plen)).ok()
}

/// What the last data of a write calls for.
fn after_data(header: &[u8; HEADER_LEN]) -> Option<Reply> {
    let is_last = header[1] & pdu::flags::LAST != 0;
    is_last.then(|| Reply::alone(bare::capsule_resp([header[8], header[9]])))
}

/// What a capsule calls for, once its data is here, if it is not `alone`.
fn to_command(capsule: &[u8; CAPSULE_LEN], alone: bool, responds: bool) -> Result<Reply> {
    let kind = PduType(capsule[0]);
    ensure!(kind == PduType::CAPSULE_CMD, "a PDU that no host sends: {kind:?}");
    // Dword 0 of the command, and the length in its SGL descriptor.
    let cid = [capsule[10], capsule[11]];
    let len = [capsule[40], capsule[41], capsule[42], capsule[43]];
    Ok(match NvmOpcode(capsule[8]) {
        NvmOpcode::READ => {
            let len = u32::from_le_bytes(len);
            let data_len = len as usize;
            ensure!(data_len <= PIECE_LEN, "a read of {len} bytes");
            Reply { header: bare::read_data(cid, len, !responds), data_len, read: Some(cid) }
        }
        NvmOpcode::WRITE if alone => {
            let mut header = bare::common(PduType::R2T, HEADER_LEN);
            header[8..10].copy_from_slice(&cid);
            header[10..12].copy_from_slice(&cid);
            header[16..20].copy_from_slice(&len);
            Reply::alone(header)
        }
        // Linux flushes what says that it has a write cache, as the admin queue's target does.
        NvmOpcode::WRITE | NvmOpcode::FLUSH => Reply::alone(bare::capsule_resp(cid)),
        other => bail!("a command that it has no answer for: {other:?}"),
    })
}

/// Headers in their order, each with the length of its data: the response capsules of reads, where there are any, behind the data of
/// so many.
pub(super) fn arrange(
    replies: &mut Vec<Reply>,
    (responds, digests): (Option<Together>, Digests),
    headers: &mut Vec<Sealed>,
) {
    headers.clear();
    let group = match responds {
        None | Some(Together::One) => 1,
        Some(Together::All) => replies.len(),
    };
    for group in replies.chunks(group.max(1)) {
        headers.extend(group.iter().map(|reply| Sealed::new(reply.header, reply.data_len, digests)));
        if responds.is_some() {
            let reads = group.iter().filter_map(|reply| reply.read);
            headers.extend(reads.map(|cid| Sealed::new(bare::capsule_resp(cid), 0, digests)));
        }
    }
    replies.clear();
}

#[cfg(test)]
mod tests {
    use fastice::initiator::command;
    use fastice::tcp::digest::Digest;
    use fastice::tcp::pdu::HEADER_MAX;
    use nvme_spec::command::psdt;
    use nvme_spec::{Nsid, SglDescriptor, SubmissionQueueEntry};
    use zerocopy::{FromBytes as _, IntoBytes as _};

    use super::*;

    /// A capsule of one block, with its data if it is in the capsule.
    fn capsule(opcode: NvmOpcode, cid: u16, data: Option<&[u8]>) -> Vec<u8> {
        capsule_with(Digests::NONE, opcode, cid, data)
    }

    fn capsule_with(digests: Digests, opcode: NvmOpcode, cid: u16, data: Option<&[u8]>) -> Vec<u8> {
        let dptr = match data {
            Some(data) => SglDescriptor::in_capsule(0, u32::try_from(data.len()).unwrap()),
            None => SglDescriptor::transport(4096),
        };
        let sqe = command::command(opcode.0, Nsid(1));
        let sqe = SubmissionQueueEntry { flags: psdt::SGL << 6, cid: cid.into(), dptr, ..sqe };
        let mut header = [0; HEADER_MAX];
        let bytes = <[u8; 64]>::read_from_bytes(sqe.as_bytes()).unwrap();
        let data = data.unwrap_or_default();
        let len = pdu::capsule_cmd(&mut header, digests, 0, &bytes, u32::try_from(data.len()).unwrap());
        // Nobody looks at the digest of data.
        let trailer: &[u8] = if digests.data && !data.is_empty() { &[0; Digest::LEN] } else { &[] };
        [&header[..len], data, trailer].concat()
    }

    fn last_data(cid: u16, data: &[u8]) -> Vec<u8> {
        let mut header = [0; HEADER_MAX];
        let data_len = u32::try_from(data.len()).unwrap();
        let pdu = pdu::DataPdu { cccid: cid, ttag: cid, data_len, last: true, ..pdu::DataPdu::default() };
        let len = pdu::h2c_data(&mut header, Digests::NONE, 0, &pdu);
        [&header[..len], data].concat()
    }

    /// What is answered when the bytes come in pieces of so many: type, CID and data of each header.
    fn answered(bytes: &[u8], piece: usize, responds: Option<Together>) -> Vec<(PduType, u16, usize)> {
        answered_with(Digests::NONE, bytes, piece, responds)
    }

    fn answered_with(
        digests: Digests,
        bytes: &[u8],
        piece: usize,
        responds: Option<Together>,
    ) -> Vec<(PduType, u16, usize)> {
        let mut commands = Commands::new(responds.is_some(), digests);
        let (mut replies, mut left, mut headers) = (Vec::new(), Vec::<u8>::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            left.extend_from_slice(piece);
            let taken = commands.take(&left, &mut replies).unwrap();
            left.drain(..taken);
        }
        assert!(left.is_empty(), "all of it was taken");
        arrange(&mut replies, (responds, digests), &mut headers);
        let told = headers.iter().map(|sealed| {
            let (header, data_len) = (sealed.bytes(), sealed.data_len);
            let kind = PduType(header[0]);
            let at = if kind == PduType::CAPSULE_RESP { 20 } else { 8 };
            let trailer_len = if digests.data && data_len > 0 { Digest::LEN } else { 0 };
            assert_eq!(plen_of(header), Some(header.len() + data_len + trailer_len));
            (kind, u16::from_le_bytes([header[at], header[at + 1]]), data_len)
        });
        told.collect()
    }

    #[test]
    fn each_command_has_its_answer_however_its_bytes_are_cut() {
        let bytes = [
            capsule(NvmOpcode::READ, 7, None),
            capsule(NvmOpcode::WRITE, 300, Some(&[1; 4096])),
            capsule(NvmOpcode::WRITE, 9, None),
            last_data(9, &[2; 4096]),
        ]
        .concat();
        let expected = [
            (PduType::C2H_DATA, 7, 4096),
            (PduType::CAPSULE_RESP, 300, 0),
            (PduType::R2T, 9, 0),
            (PduType::CAPSULE_RESP, 9, 0),
        ];
        for piece in [1, 7, 72, 4096, bytes.len()] {
            assert_eq!(answered(&bytes, piece, None), expected, "{piece}");
        }
    }

    #[test]
    fn digests_are_passed_over_and_make_no_write_longer() {
        let digests = Digests { header: true, data: true };
        let bytes = [
            capsule_with(digests, NvmOpcode::READ, 7, None),
            capsule_with(digests, NvmOpcode::WRITE, 8, Some(&[1; 4096])),
            capsule_with(digests, NvmOpcode::WRITE, 9, None),
        ]
        .concat();
        let expected = [(PduType::C2H_DATA, 7, 4096), (PduType::CAPSULE_RESP, 8, 0), (PduType::R2T, 9, 0)];
        for piece in [1, 76, bytes.len()] {
            assert_eq!(answered_with(digests, &bytes, piece, None), expected, "{piece}");
        }
    }

    #[test]
    fn response_capsules_of_reads_go_behind_their_data_or_behind_that_of_all() {
        let bytes = [1, 2].map(|cid| capsule(NvmOpcode::READ, cid, None)).concat();
        let (data, response) = (PduType::C2H_DATA, PduType::CAPSULE_RESP);
        let told = |responds| answered(&bytes, bytes.len(), responds);
        let one = [(data, 1, 4096), (response, 1, 0), (data, 2, 4096), (response, 2, 0)];
        assert_eq!(told(Some(Together::One)), one);
        let all = [(data, 1, 4096), (data, 2, 4096), (response, 1, 0), (response, 2, 0)];
        assert_eq!(told(Some(Together::All)), all);
        assert_eq!(told(None), [(data, 1, 4096), (data, 2, 4096)]);
    }

    #[test]
    fn data_that_is_not_the_last_calls_for_nothing() {
        let mut first = last_data(3, &[0; 512]);
        first[1] &= !pdu::flags::LAST;
        assert!(answered(&first, 100, None).is_empty());
        let both = [first, last_data(3, &[0; 512])].concat();
        assert_eq!(answered(&both, 100, None), [(PduType::CAPSULE_RESP, 3, 0)]);
    }

    #[test]
    fn what_no_host_sends_is_no_command() {
        let mut commands = Commands::new(false, Digests::NONE);
        assert!(commands.take(&[0xFF; 128], &mut Vec::new()).is_err());
        let other = capsule(NvmOpcode::COMPARE, 1, None);
        assert!(commands.take(&other, &mut Vec::new()).is_err(), "it has no answer for it");
    }
}
