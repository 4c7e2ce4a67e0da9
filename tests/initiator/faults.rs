//! The target misbehaves: each fault becomes the right error, in time, and the TermReq that belongs to it.

use crate::scripted_target::{Behaviour, Fault, ScriptedTarget};
use crate::{NSID, options};
use fastice::initiator::controller::{ConnectOptions, Controller};
use fastice::initiator::error::{ErrorKind, InitiatorError};
use fastice::initiator::transport::Timeouts;
use fastice::tcp::pdu::{FatalErrorStatus, TermReq};
use fastice::units::Lba;
use nvme_spec::Status;
use std::time::{Duration, Instant};

/// A controller on a target whose first read or write goes wrong.
fn faulty(fault: Fault, digests: bool) -> (ScriptedTarget, Controller) {
    let behaviour = Behaviour { fault, in_capsule_len: 0, ..Behaviour::default() };
    let target = ScriptedTarget::start(behaviour);
    let connect = ConnectOptions {
        header_digest: digests,
        data_digest: digests,
        timeouts: Timeouts { command: Duration::from_millis(300), ..Timeouts::default() },
        ..options(&target)
    };
    let controller = Controller::connect(&connect).expect("connecting is not what goes wrong");
    (target, controller)
}

fn read(controller: &Controller) -> Result<(), InitiatorError> {
    controller.namespace(NSID)?.read(Lba(3), &mut [0; 4096])
}

fn write(controller: &Controller) -> Result<(), InitiatorError> {
    controller.namespace(NSID)?.write(Lba(3), &[1; 4096], false)
}

/// The TermReq that the target got, if one comes within two seconds.
fn term_req(target: &ScriptedTarget) -> Option<TermReq> {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) {
        if let Some(&pdu) = target.seen().term_reqs.lock().unwrap().first() {
            return Some(pdu);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

#[test]
fn protocol_violations_end_the_queue_with_a_term_req() {
    let cases = [
        (Fault::WrongHeaderDigest, FatalErrorStatus::HEADER_DIGEST_ERROR, None),
        (Fault::UnknownCid, FatalErrorStatus::INVALID_PDU_HEADER_FIELD, Some(8)),
        (Fault::UnknownPduType, FatalErrorStatus::INVALID_PDU_HEADER_FIELD, Some(0)),
        (Fault::DataOutOfRange, FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE, Some(4096)),
        (Fault::DataWithHole, FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE, Some(4)),
        (Fault::R2tOutOfRange, FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE, Some(0)),
    ];
    for (fault, fes, fei) in cases {
        let (target, controller) = faulty(fault, true);
        let result = if fault == Fault::R2tOutOfRange { write(&controller) } else { read(&controller) };
        let error = result.expect_err("a protocol violation");
        assert_eq!(error.kind(), ErrorKind::Protocol, "{fault:?}: {error}");
        let pdu = term_req(&target).unwrap_or_else(|| panic!("{fault:?}: no TermReq"));
        assert_eq!(pdu.fes, fes, "{fault:?}");
        assert!(fei.is_none_or(|fei| fei == pdu.fei), "{fault:?}: FEI {}", pdu.fei);
        assert_eq!(
            read(&controller).unwrap_err().kind(),
            ErrorKind::Protocol,
            "{fault:?}: the queue stays dead"
        );
    }
}

#[test]
fn a_wrong_data_digest_fails_one_command_only() {
    let (target, controller) = faulty(Fault::WrongDataDigest, true);
    assert_eq!(read(&controller).unwrap_err().kind(), ErrorKind::DataDigest);
    read(&controller).unwrap();
    assert!(target.seen().term_reqs.lock().unwrap().is_empty(), "it is no fatal error");
}

#[test]
fn a_term_req_tells_why() {
    let (_target, controller) = faulty(Fault::TermReq, false);
    let error = read(&controller).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Terminated);
    assert!(error.to_string().contains("INVALID_PDU_HEADER_FIELD at byte 0x4"), "{error}");
}

#[test]
fn a_closed_connection_is_noticed_also_within_a_pdu() {
    for fault in [Fault::Close, Fault::TruncatedPdu] {
        let (_target, controller) = faulty(fault, false);
        let error = read(&controller).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed, "{fault:?}: {error}");
    }
}

#[test]
fn silence_ends_at_the_deadline() {
    let (_target, controller) = faulty(Fault::Silence, false);
    let started = Instant::now();
    assert_eq!(read(&controller).unwrap_err().kind(), ErrorKind::Timeout);
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_millis(1500), "{took:?}");
}

#[test]
fn a_completion_for_the_same_command_twice_is_caught() {
    let (_target, controller) = faulty(Fault::DoubleCompletion, false);
    let first = read(&controller).unwrap_err();
    assert!(matches!(first.kind(), ErrorKind::Status | ErrorKind::Protocol), "{first}");
    assert_eq!(read(&controller).unwrap_err().kind(), ErrorKind::Protocol);
}

#[test]
fn success_with_half_of_the_data_is_no_success() {
    let (_target, controller) = faulty(Fault::ShortData, false);
    let error = read(&controller).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("2048 bytes"), "{error}");
}

#[test]
fn a_bad_status_is_given_as_it_is() {
    let status = Status::WRITE_FAULT.with_dnr();
    let (_target, controller) = faulty(Fault::Status(status), false);
    let error = write(&controller).unwrap_err();
    assert_eq!((error.kind(), error.status()), (ErrorKind::Status, Some(status)));
    write(&controller).unwrap();
}
