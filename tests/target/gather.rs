//! Commands of a host that keeps many in flight are gathered: its socket is left alone for a moment, and nothing is lost by it.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use fastice::initiator::raw::RawConnection;
use fastice::tcp::pdu::Digests;
use nvme_spec::{Nsid, Status};

use crate::rude::{RudeHost, capsule, completion_of, flush, tcp_stats};
use crate::support::{TestTarget, memory_config};

/// Sends so many commands at once, and waits until all are answered.
fn burst(queue: &mut RawConnection, commands: u16) {
    let bytes: Vec<u8> =
        (0..commands).flat_map(|cid| capsule(Digests::NONE, &flush(Nsid(1), cid), &[])).collect();
    queue.send(&bytes).expect("sent");
    let answered: BTreeSet<u16> = (0..commands)
        .map(|_| {
            let (cid, status, _) = completion_of(queue);
            assert_eq!(status, Status::SUCCESS);
            cid
        })
        .collect();
    assert!(answered.into_iter().eq(0..commands), "each is answered, once");
}

/// How often the socket was left alone, of a host whose bursts are so large, one after the other and again.
fn gathers(keys: &str, bursts: &[u16]) -> u64 {
    let target = TestTarget::start(&format!("{keys}\n{}", memory_config()));
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 128, Digests::NONE);
    for _ in 0..20 {
        for &commands in bursts {
            burst(&mut queue, commands);
            // A core that finds the next one at once has nobody to wait for.
            thread::sleep(Duration::from_millis(1));
        }
    }
    tcp_stats(&target).gathers
}

#[test]
fn a_host_that_had_twice_as_many_in_flight_is_given_time() {
    // The kernel may cut a burst in two, and then it is none: not each time.
    assert!(gathers("poll = \"always\"", &[48, 16]) > 0);
    assert!(gathers("gather_us = 150", &[48, 16]) > 0, "also where cores sleep");
}

#[test]
fn no_other_host_is_and_nobody_where_it_is_switched_off() {
    assert_eq!(gathers("poll = \"always\"\ngather_us = 0", &[48, 16]), 0);
    assert_eq!(gathers("poll = \"always\"", &[7, 1, 3]), 0, "few at a time");
}
