//! Bodies of the fuzz targets of this folder: plain functions, so that a stable toolchain replays their corpora.

use super::pdu::{
    self, COMMON_HEADER_LEN, DataPdu, Digests, HEADER_MAX, PduHeader, PduRules, Phase, Receiver, TERM_REQ_MAX,
};

/// Feeds the PDU decoder. The first three bytes choose the rules, the rest is what a peer sent.
///
/// # Panics
/// When the decoder breaks one of its promises: it panics, its two steps or its short and long way disagree, its plan contradicts PLEN, or a
/// header that it accepted is not what the encoder makes of the same fields.
pub fn fuzz_pdu(data: &[u8]) {
    let Some((&[knobs, pda, limit], bytes)) = data.split_first_chunk::<3>() else { return };
    let rules = PduRules {
        receiver: if knobs & 1 == 0 { Receiver::Controller } else { Receiver::Host },
        phase: if knobs & 2 == 0 { Phase::Running } else { Phase::Initializing },
        digests: Digests { header: knobs & 4 != 0, data: knobs & 8 != 0 },
        pda: pda % 32,
        in_capsule_len_max: u32::from(limit) * 128,
        data_len_max: u32::from(limit) * 4096,
    };
    let decoded = pdu::decode_header(&rules, bytes);
    let Some((first8, _)) = bytes.split_first_chunk::<COMMON_HEADER_LEN>() else {
        assert!(decoded.is_err(), "less than a common header was accepted");
        return;
    };
    let plan = match pdu::header_len_needed(&rules, first8) {
        Ok(plan) => plan,
        Err(error) => {
            assert_eq!(decoded, Err(error), "the two steps give different errors");
            assert_eq!(
                pdu::plain_command(&rules, bytes),
                None,
                "the short way takes what the long way refuses"
            );
            return;
        }
    };
    let plen = u32::from_le_bytes([first8[4], first8[5], first8[6], first8[7]]);
    assert_eq!(plan.total_len(), plen as usize, "plan and PLEN differ");
    assert!(plan.header_len() <= HEADER_MAX && plan.header_len() <= plan.data_offset, "{plan:?}");
    let plain = pdu::plain_command(&rules, bytes);
    let Ok(decoded) = decoded else {
        assert!(plain.is_none(), "the short way takes what the long way refuses");
        return;
    };
    assert_eq!(decoded.plan, plan, "the two steps give different plans");
    if let Some((plain, sqe)) = plain {
        assert_eq!((plain, PduHeader::CapsuleCmd(*sqe)), (plan, decoded.header), "the short way differs");
    }
    // Padding, the PDO of PDUs without data and reserved bytes are free to the sender: only meaning is compared.
    let again = encode_again(&rules, &decoded);
    let decoded_again =
        pdu::decode_header(&rules, &again).expect("what the encoder writes, the decoder accepts");
    assert_eq!(decoded_again.header, decoded.header, "decoding and encoding lose something");
}

/// The header that the encoder makes of what was decoded, with the alignment the receiver asked for.
fn encode_again(rules: &PduRules, decoded: &pdu::Decoded) -> Vec<u8> {
    let mut out = [0xA5; HEADER_MAX];
    let data_len = u32::try_from(decoded.plan.data_len).expect("PLEN has 32 bits");
    let data = |header: &pdu::DataHeader| DataPdu {
        cccid: header.cccid,
        ttag: header.ttag,
        data_offset: header.data_offset,
        data_len: header.data_len,
        last: header.last,
        success: header.success,
    };
    let len = match &decoded.header {
        PduHeader::IcReq(header) => pdu::ic_req(&mut out, header),
        PduHeader::IcResp(header) => pdu::ic_resp(&mut out, header),
        PduHeader::CapsuleCmd(sqe) => pdu::capsule_cmd(&mut out, rules.digests, rules.pda, sqe, data_len),
        PduHeader::CapsuleResp(cqe) => pdu::capsule_resp(&mut out, rules.digests, cqe),
        PduHeader::H2cData(header) => pdu::h2c_data(&mut out, rules.digests, rules.pda, &data(header)),
        PduHeader::C2hData(header) => pdu::c2h_data(&mut out, rules.digests, rules.pda, &data(header)),
        PduHeader::R2t(header) => pdu::r2t(&mut out, rules.digests, header),
        PduHeader::TermReq(header) => {
            let mut long = [0xA5; TERM_REQ_MAX];
            let offending = vec![0; decoded.plan.data_len];
            let len = match rules.receiver {
                Receiver::Controller => pdu::h2c_term_req(&mut long, *header, &offending),
                Receiver::Host => pdu::c2h_term_req(&mut long, *header, &offending),
            };
            return long[..len].to_vec();
        }
    };
    out[..len].to_vec()
}
