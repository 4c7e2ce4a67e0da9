//! What can go wrong before the first command: a peer played byte by byte.

use fastice::initiator::error::{ErrorKind, InitiatorError};
use fastice::initiator::raw::{RawConnection, RawEvent};
use fastice::initiator::transport::{Queue, QueueOptions, Timeouts};
use fastice::tcp::pdu::{Digests, FatalErrorStatus};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A peer that takes one connection, reads the ICReq and then follows `script`; gives what it read afterwards.
fn peer(script: impl FnOnce(&mut TcpStream) + Send + 'static) -> (SocketAddr, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut ic_req = [0; 128];
        stream.read_exact(&mut ic_req).unwrap();
        assert_eq!(&ic_req[..8], [0, 0, 128, 0, 128, 0, 0, 0]);
        script(&mut stream);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        rest
    });
    (address, thread)
}

fn connect(address: SocketAddr, digests: Digests) -> Result<Queue, InitiatorError> {
    Queue::connect(
        address,
        QueueOptions {
            depth: 4,
            digests,
            hpda: 0,
            success_flag: true,
            timeouts: Timeouts { initialize: Duration::from_millis(200), ..Timeouts::default() },
        },
    )
}

/// ICResp: CPDA 0, MAXH2CDATA 128 KiB.
fn ic_resp(dgst: u8) -> [u8; 128] {
    let mut pdu = [0; 128];
    pdu[..8].copy_from_slice(&[1, 0, 128, 0, 128, 0, 0, 0]);
    pdu[11] = dgst;
    pdu[14] = 2;
    pdu
}

fn failure(result: Result<Queue, InitiatorError>) -> InitiatorError {
    match result {
        Ok(_) => panic!("connected"),
        Err(error) => error,
    }
}

#[test]
fn an_ic_resp_may_come_byte_by_byte() {
    let (address, _peer) = peer(|stream| {
        for byte in ic_resp(0) {
            stream.write_all(&[byte]).unwrap();
        }
    });
    let queue = connect(address, Digests::NONE).unwrap();
    assert_eq!(queue.ic_resp().maxh2cdata, 128 << 10);
}

#[test]
fn no_answer_is_a_timeout() {
    let (address, _peer) = peer(|_| std::thread::sleep(Duration::from_millis(600)));
    let started = Instant::now();
    assert_eq!(failure(connect(address, Digests::NONE)).kind(), ErrorKind::Timeout);
    assert!(started.elapsed() < Duration::from_millis(550));
}

#[test]
fn nobody_there_and_a_closed_door() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    assert_eq!(failure(connect(address, Digests::NONE)).kind(), ErrorKind::Connect);
    let (address, _peer) = peer(|stream| stream.shutdown(std::net::Shutdown::Both).unwrap());
    assert_eq!(failure(connect(address, Digests::NONE)).kind(), ErrorKind::Closed);
}

#[test]
fn digests_must_be_those_asked_for() {
    for (asked, given) in [(false, 1), (true, 0), (true, 3)] {
        let (address, _peer) = peer(move |stream| stream.write_all(&ic_resp(given)).unwrap());
        let error = failure(connect(address, Digests { header: asked, data: false }));
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    }
}

/// A malformed start is answered with a TermReq that names the field.
#[test]
fn a_wrong_ic_resp_is_answered_with_a_term_req() {
    // (byte, value, FES, FEI)
    let cases = [
        (8, 9, FatalErrorStatus::UNSUPPORTED_PARAMETER, 8),
        (10, 0xFF, FatalErrorStatus::INVALID_PDU_HEADER_FIELD, 10),
        (14, 0, FatalErrorStatus::INVALID_PDU_HEADER_FIELD, 12),
        (2, 24, FatalErrorStatus::INVALID_PDU_HEADER_FIELD, 2),
        (4, 0, FatalErrorStatus::INVALID_PDU_HEADER_FIELD, 4),
        (0, 5, FatalErrorStatus::PDU_SEQUENCE_ERROR, 0),
        (0, 0, FatalErrorStatus::INVALID_PDU_HEADER_FIELD, 0),
    ];
    for (at, value, fes, fei) in cases {
        let (address, peer) = peer(move |stream| {
            let mut pdu = ic_resp(0);
            pdu[at] = value;
            stream.write_all(&pdu).unwrap();
        });
        assert_eq!(failure(connect(address, Digests::NONE)).kind(), ErrorKind::Protocol, "byte {at}");
        let rest = peer.join().unwrap();
        assert_eq!(rest[..3], [2, 0, 24], "byte {at}: H2CTermReq");
        assert_eq!(rest[8..10], fes.0.to_le_bytes(), "byte {at}");
        assert_eq!(rest[10..14], u32::to_le_bytes(fei), "byte {at}");
        assert_eq!(rest[24], if at == 0 { value } else { 1 }, "byte {at}: the start of the PDU goes along");
    }
}

#[test]
fn a_second_ic_resp_is_out_of_sequence() {
    let (address, peer) = peer(|stream| {
        stream.write_all(&ic_resp(0)).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        stream.write_all(&ic_resp(0)).unwrap();
    });
    let mut queue = connect(address, Digests::NONE).unwrap();
    let started = Instant::now();
    let error = loop {
        if let Err(error) = queue.poll(Duration::from_millis(20)) {
            break error;
        }
        assert!(started.elapsed() < Duration::from_secs(5));
    };
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert_eq!(peer.join().unwrap()[8..10], FatalErrorStatus::PDU_SEQUENCE_ERROR.0.to_le_bytes());
}

#[test]
fn a_raw_connection_shows_what_comes() {
    let (address, _peer) = peer(|stream| {
        stream.write_all(&ic_resp(0)).unwrap();
        let mut capsule = [0; 72];
        stream.read_exact(&mut capsule).unwrap();
        assert_eq!(capsule[8..], [0xEE; 64]);
        let mut response = [0; 24];
        response[..5].copy_from_slice(&[5, 0, 24, 0, 24]);
        stream.write_all(&response).unwrap();
    });
    let mut raw = RawConnection::connect(address).unwrap();
    raw.initialize(Digests::NONE).unwrap();
    assert_eq!(raw.read_pdu(Duration::from_millis(20)).unwrap(), RawEvent::Silence);
    raw.send_capsule(&[0xEE; 64], &[]).unwrap();
    assert!(matches!(raw.read_pdu(Duration::from_secs(5)).unwrap(), RawEvent::Pdu(_)));
    raw.half_close().unwrap();
    assert_eq!(raw.read_pdu(Duration::from_secs(5)).unwrap(), RawEvent::Closed);
}
