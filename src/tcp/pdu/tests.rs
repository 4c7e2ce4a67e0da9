//! Golden bytes, rules one by one, and round trips.

use super::*;
use proptest::prelude::*;

fn running(receiver: Receiver, digests: Digests) -> PduRules {
    PduRules {
        receiver,
        phase: Phase::Running,
        digests,
        pda: 0,
        in_capsule_len_max: 8192,
        data_len_max: 1 << 20,
    }
}

const BOTH: Digests = Digests { header: true, data: true };

fn host() -> PduRules {
    running(Receiver::Host, Digests::NONE)
}

fn controller() -> PduRules {
    running(Receiver::Controller, Digests::NONE)
}

#[test]
fn golden_ic_req_as_linux_sends_it() {
    let mut out = [0xFF; HEADER_MAX];
    let len = ic_req(&mut out, &IcReq { hpda: 0, digests: BOTH, maxr2t_z: 0 });
    let mut golden = [0; 128];
    golden[..8].copy_from_slice(&[0x00, 0, 128, 0, 128, 0, 0, 0]);
    golden[11] = 3;
    assert_eq!(&out[..len], golden);
    let rules = PduRules::initializing(Receiver::Controller);
    let decoded = decode_header(&rules, &out[..len]).unwrap();
    assert_eq!(decoded.header, PduHeader::IcReq(IcReq { hpda: 0, digests: BOTH, maxr2t_z: 0 }));
    assert_eq!(decoded.plan.total_len(), 128);
}

#[test]
fn golden_c2h_data_with_header_digest() {
    let mut out = [0xFF; HEADER_MAX];
    let pdu = DataPdu { cccid: 0x1234, ttag: 0, data_offset: 4096, data_len: 512, last: true, success: true };
    let len = c2h_data(&mut out, Digests { header: true, data: false }, 0, &pdu);
    let golden = [
        0x07, 0b1101, 24, 28, 0x1C, 0x02, 0, 0, 0x34, 0x12, 0, 0, 0x00, 0x10, 0, 0, 0x00, 0x02, 0, 0, 0, 0,
        0, 0,
    ];
    assert_eq!(&out[..24], golden);
    assert_eq!(&out[24..28], crc32c::crc32c(&golden).to_le_bytes());
    assert_eq!(len, 28);
}

#[test]
fn golden_r2t_and_term_req() {
    let mut out = [0xFF; HEADER_MAX];
    let len = r2t(&mut out, Digests::NONE, &R2t { cccid: 7, ttag: 9, offset: 0, len: 0x0002_0000 });
    let golden = [9, 0, 24, 0, 24, 0, 0, 0, 7, 0, 9, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0];
    assert_eq!(&out[..len], golden);

    let mut out = [0xFF; TERM_REQ_MAX];
    let pdu = TermReq { fes: FatalErrorStatus::INVALID_PDU_HEADER_FIELD, fei: 0x0102_0304 };
    let len = c2h_term_req(&mut out, pdu, &[0xEE; 200]);
    assert_eq!(len, 152);
    assert_eq!(&out[..14], [3, 0, 24, 0, 152, 0, 0, 0, 1, 0, 4, 3, 2, 1]);
    assert!(out[24..].iter().all(|&byte| byte == 0xEE));
    let decoded = decode_header(&host(), &out).unwrap();
    assert_eq!(decoded.header, PduHeader::TermReq(pdu));
    assert_eq!((decoded.plan.data_offset, decoded.plan.data_len), (24, 128));
}

#[test]
fn a_capsule_is_padded_to_the_alignment_that_the_controller_asked_for() {
    let mut out = [0xFF; HEADER_MAX];
    let mut rules = running(Receiver::Controller, BOTH);
    for pda in 0..=PDA_MAX {
        let len = capsule_cmd(&mut out, BOTH, pda, &[0x5A; 64], 8192);
        assert!(
            len.is_multiple_of((usize::from(pda) + 1) * 4) && (76..=HEADER_MAX).contains(&len),
            "{pda}: {len}"
        );
        assert!(out[76..len].iter().all(|&byte| byte == 0), "padding is zero");
        rules.pda = pda;
        let plan = decode_header(&rules, &out[..len]).unwrap().plan;
        assert_eq!((plan.data_offset, plan.data_len, plan.ddgst), (len, 8192, true));
        assert_eq!(plan.total_len(), len + 8192 + 4);
    }
}

#[test]
fn common_header_rules_name_the_field() {
    // (rules, first 8 bytes, error)
    let field = |offset| PduError::InvalidField { offset };
    let plain = [(controller(), [4, 0, 72, 0, 72, 0, 0, 0]), (host(), [5, 0, 24, 0, 24, 0, 0, 0])];
    for (rules, first8) in plain {
        header_len_needed(&rules, &first8).unwrap();
    }
    let digested = running(Receiver::Controller, BOTH);
    let cases: [(PduRules, [u8; 8], PduError); 20] = [
        (controller(), [8, 0, 24, 0, 24, 0, 0, 0], field(0)),
        (controller(), [0xFF; 8], field(0)),
        (controller(), [5, 0, 24, 0, 24, 0, 0, 0], field(0)),
        (host(), [4, 0, 72, 0, 72, 0, 0, 0], field(0)),
        (controller(), [0, 0, 128, 0, 128, 0, 0, 0], PduError::Sequence { pdu_type: PduType::IC_REQ }),
        (
            PduRules::initializing(Receiver::Controller),
            [4, 0, 72, 0, 72, 0, 0, 0],
            PduError::Sequence { pdu_type: PduType::CAPSULE_CMD },
        ),
        (controller(), [4, 0, 71, 0, 72, 0, 0, 0], field(2)),
        (controller(), [4, 0x80, 72, 0, 72, 0, 0, 0], field(1)),
        (controller(), [4, 1, 72, 0, 72, 0, 0, 0], field(1)),
        (digested, [4, 0, 72, 0, 76, 0, 0, 0], field(1)),
        (digested, [4, 3, 72, 0, 76, 0, 0, 0], field(1)),
        (digested, [4, 1, 72, 76, 80, 0, 0, 0], field(1)),
        (controller(), [4, 0, 72, 71, 80, 0, 0, 0], field(3)),
        (controller(), [4, 0, 72, 74, 80, 0, 0, 0], field(3)),
        (controller(), [4, 0, 72, 80, 80, 0, 0, 0], field(4)),
        (controller(), [4, 0, 72, 72, 0x49, 0x20, 0, 0], field(4)),
        (controller(), [4, 0, 72, 0, 71, 0, 0, 0], field(3)),
        (host(), [5, 0, 24, 0, 25, 0, 0, 0], field(4)),
        (host(), [7, 0b1000, 24, 24, 28, 0, 0, 0], field(1)),
        (
            controller(),
            [6, 0, 24, 24, 0x19, 0, 0x10, 0],
            PduError::DataLimitExceeded { len: (1 << 20) + 1, max: 1 << 20 },
        ),
    ];
    for (rules, first8, error) in cases {
        assert_eq!(header_len_needed(&rules, &first8), Err(error), "{first8:?}");
        assert!(error.fes().is_some());
    }
}

#[test]
fn a_malformed_term_req_is_never_answered() {
    for first8 in [[2, 0, 24, 0, 153, 0, 0, 0], [2, 0, 23, 0, 24, 0, 0, 0], [2, 0, 24, 0, 0, 0, 0, 0]] {
        let error = header_len_needed(&controller(), &first8).unwrap_err();
        assert!(matches!(error, PduError::MalformedTermReq { .. }), "{error:?}");
        assert_eq!(error.fes(), None);
    }
}

#[test]
fn a_wrong_header_digest_reports_the_digest_that_came() {
    let rules = running(Receiver::Host, BOTH);
    let mut out = [0; HEADER_MAX];
    let len = capsule_resp(&mut out, BOTH, &[1; 16]);
    out[9] ^= 0x40;
    let received = u32::from_le_bytes(out[24..28].try_into().unwrap());
    let error = decode_header(&rules, &out[..len]).unwrap_err();
    assert!(
        matches!(error, PduError::HeaderDigest { received: r, computed } if r == received && computed != r)
    );
    assert_eq!((error.fes(), error.fei()), (Some(FatalErrorStatus::HEADER_DIGEST_ERROR), received));
}

#[test]
fn field_rules_beyond_the_common_header() {
    let mut out = [0; HEADER_MAX];
    let initializing = PduRules::initializing(Receiver::Host);
    let resp = IcResp { cpda: 0, digests: Digests::NONE, maxh2cdata: 4096 };
    let mut check = |at: usize, value: u8, error: PduError| {
        let len = ic_resp(&mut out, &resp);
        assert_eq!(decode_header(&initializing, &out[..len]).unwrap().header, PduHeader::IcResp(resp));
        out[at] = value;
        assert_eq!(decode_header(&initializing, &out[..len]), Err(error));
    };
    check(8, 1, PduError::UnsupportedParameter { offset: 8 });
    check(10, 32, PduError::InvalidField { offset: 10 });
    check(11, 4, PduError::InvalidField { offset: 11 });
    check(12, 2, PduError::InvalidField { offset: 12 });
    check(13, 0, PduError::InvalidField { offset: 12 });

    let data =
        DataPdu { cccid: 1, ttag: 2, data_offset: u32::MAX - 3, data_len: 4, last: true, success: false };
    let len = h2c_data(&mut out, Digests::NONE, 0, &data);
    let error = decode_header(&controller(), &out[..len]).unwrap_err();
    assert_eq!(error, PduError::DataOutOfRange { offset: u32::MAX - 3, len: 4 });
    out[12..16].copy_from_slice(&2u32.to_le_bytes());
    assert_eq!(decode_header(&controller(), &out[..len]), Err(PduError::InvalidField { offset: 12 }));
    out[12..20].copy_from_slice(&[0, 0, 0, 0, 8, 0, 0, 0]);
    assert_eq!(decode_header(&controller(), &out[..len]), Err(PduError::InvalidField { offset: 16 }));

    let len = r2t(&mut out, Digests::NONE, &R2t { cccid: 0, ttag: 0, offset: 0, len: 0 });
    assert_eq!(decode_header(&host(), &out[..len]), Err(PduError::InvalidField { offset: 16 }));
}

#[test]
fn a_short_buffer_asks_for_more() {
    let mut out = [0; HEADER_MAX];
    let len = capsule_resp(&mut out, BOTH, &[1; 16]);
    let rules = running(Receiver::Host, BOTH);
    for cut in 0..len {
        let needed = if cut < 8 { 8 } else { 28 };
        assert_eq!(decode_header(&rules, &out[..cut]), Err(PduError::Incomplete { needed }), "{cut}");
    }
}

prop_compose! {
    fn any_data()(
        cccid: u16, ttag: u16, quad in 0u32..1 << 28, data_len in 1u32..=1 << 20, last: bool, success: bool,
    ) -> DataPdu {
        DataPdu { cccid, ttag, data_offset: quad * 4, data_len, last, success: last && success }
    }
}

proptest! {
    #[test]
    fn data_round_trip(pdu in any_data(), header: bool, data: bool, pda in 0..=PDA_MAX, to_host: bool) {
        let digests = Digests { header, data };
        let mut out = [0xFF; HEADER_MAX];
        let mut rules = running(if to_host { Receiver::Host } else { Receiver::Controller }, digests);
        rules.pda = pda;
        let len = if to_host { c2h_data(&mut out, digests, pda, &pdu) } else { h2c_data(&mut out, digests, pda, &pdu) };
        prop_assert_eq!(len, data_pdu_offset(digests, pda));
        let decoded = decode_header(&rules, &out[..len]).unwrap();
        prop_assert_eq!(decoded.plan.data_offset, len);
        let got = match decoded.header {
            PduHeader::H2cData(got) if !to_host => got,
            PduHeader::C2hData(got) if to_host => got,
            other => panic!("{other:?}"),
        };
        let expected = DataHeader {
            cccid: pdu.cccid, ttag: pdu.ttag, data_offset: pdu.data_offset, data_len: pdu.data_len, last: pdu.last,
            success: pdu.success && to_host,
        };
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn capsule_round_trip(sqe: [u8; 32], cqe: [u8; 16], header: bool, data: bool, len in 0u32..=8192) {
        let digests = Digests { header, data };
        let mut whole = [0; 64];
        whole[..32].copy_from_slice(&sqe);
        whole[32..].copy_from_slice(&sqe);
        let mut out = [0xFF; HEADER_MAX];
        let at = capsule_cmd(&mut out, digests, 0, &whole, len);
        let decoded = decode_header(&running(Receiver::Controller, digests), &out[..at]).unwrap();
        prop_assert_eq!(decoded.header, PduHeader::CapsuleCmd(whole));
        prop_assert_eq!(decoded.plan.data_len, len as usize);
        prop_assert_eq!(decoded.plan.data_offset, at);
        let at = capsule_resp(&mut out, digests, &cqe);
        let decoded = decode_header(&running(Receiver::Host, digests), &out[..at]).unwrap();
        prop_assert_eq!(decoded.header, PduHeader::CapsuleResp(cqe));
    }

    /// The two ways are compared by `fuzz_pdu`: here a good capsule is changed in one place of its common header or not at all,
    /// and cut short or not.
    #[test]
    fn a_plain_command_is_taken_the_short_way(
        sqe: [u8; 32], len in prop_oneof![Just(0), 0u32..=8192], pda in 0u8..3, knobs: u8, at in 0usize..16, value: u8,
        cut in prop_oneof![Just(0), 0usize..72],
    ) {
        let digests = Digests { header: knobs & 4 != 0, data: knobs & 8 != 0 };
        let mut whole = [0; 64];
        whole[..32].copy_from_slice(&sqe);
        let mut out = [0xFF; HEADER_MAX];
        let header_len = capsule_cmd(&mut out, digests, pda, &whole, len);
        let rules = PduRules { pda, ..running(Receiver::Controller, digests) };
        let is_plain = !digests.header && (len == 0 || (!digests.data && pda == 0));
        let plain = plain_command(&rules, &out[..header_len]);
        prop_assert_eq!(plain.map(|(plan, sqe)| (plan.data_len, *sqe)), is_plain.then_some((len as usize, whole)));
        let mut bytes = vec![knobs & 12, pda, 64];
        bytes.extend_from_slice(&out[..header_len.saturating_sub(cut)]);
        if at < 8 && let Some(byte) = bytes.get_mut(3 + at) {
            *byte = value;
        }
        crate::tcp::fuzz::fuzz_pdu(&bytes);
    }

    #[test]
    fn any_bytes_decode_or_fail_cleanly(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        crate::tcp::fuzz::fuzz_pdu(&bytes);
    }

    /// Random bytes seldom get past the common header: here a good PDU is changed in one place.
    #[test]
    fn one_changed_byte_decodes_or_fails_cleanly(pdu in any_data(), knobs: u8, at in 0usize..40, value: u8) {
        let digests = Digests { header: knobs & 4 != 0, data: knobs & 8 != 0 };
        let mut out = [0; HEADER_MAX];
        let len = if knobs & 1 == 0 {
            h2c_data(&mut out, digests, 0, &pdu)
        } else {
            c2h_data(&mut out, digests, 0, &pdu)
        };
        let mut bytes = vec![knobs, 0, 255];
        bytes.extend_from_slice(&out[..len]);
        if let Some(byte) = bytes.get_mut(3 + at) {
            *byte = value;
        }
        crate::tcp::fuzz::fuzz_pdu(&bytes);
    }
}

proptest! {
    #[test]
    fn headers_made_of_words_are_those_that_are_written(
        cid: u16, data_len in 0..=1_u32 << 20, success: bool, cqe: [u64; 2], data_digests: bool,
    ) {
        let mut out = [0xFF; HEADER_MAX];
        let data = DataPdu { cccid: cid, data_len, last: true, success, ..DataPdu::default() };
        let len = c2h_data(&mut out, Digests::NONE, 0, &data);
        prop_assert_eq!(&out[..len], plain_c2h_data(cid, data_len, success));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&cqe[0].to_le_bytes());
        bytes[8..].copy_from_slice(&cqe[1].to_le_bytes());
        let digests = Digests { header: false, data: data_digests };
        let len = capsule_resp(&mut out, digests, &bytes);
        prop_assert_eq!(&out[..len], plain_capsule_resp(cqe));
    }
}
