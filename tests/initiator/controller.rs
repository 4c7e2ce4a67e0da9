//! Everybody behaves: connect, administer, move blocks, leave.

use crate::scripted_target::{BLOCK_LEN, Behaviour, CNTLID, ScriptedTarget};
use crate::{NSID, options};
use fastice::initiator::command;
use fastice::initiator::controller::{ConnectOptions, Controller, Host};
use fastice::initiator::discovery::{discover, read_log};
use fastice::initiator::error::ErrorKind;
use fastice::units::{BlockCount, Lba};
use nvme_spec::feature::FeatureId;
use nvme_spec::{Nsid, Status};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    (0..len)
        .map(|at| (u32::try_from(at).unwrap().wrapping_mul(2_654_435_761) ^ seed).to_le_bytes()[2])
        .collect()
}

/// Writes and reads back some lengths, in and out of the capsule, alone and split.
fn move_blocks(behaviour: Behaviour, change: impl Fn(&mut ConnectOptions)) {
    let target = ScriptedTarget::start(behaviour);
    let mut options = options(&target);
    change(&mut options);
    let controller = Controller::connect(&options).unwrap();
    let namespace = controller.namespace(NSID).unwrap();
    assert_eq!((namespace.block_size().bytes() as usize, namespace.blocks()), (BLOCK_LEN, BlockCount(8192)));
    for (round, blocks) in [1, 8, 16, 17, 256, 3000].into_iter().enumerate() {
        let data = pattern(blocks * BLOCK_LEN, u32::try_from(round).unwrap());
        let lba = Lba(round as u64 * 100);
        namespace.write(lba, &data, round % 2 == 0).unwrap();
        let mut back = vec![0; data.len()];
        namespace.read(lba, &mut back).unwrap();
        assert!(back == data, "{blocks} blocks came back different");
        let at = round * 100 * BLOCK_LEN;
        assert!(target.media()[at..at + data.len()] == data[..], "{blocks} blocks lie elsewhere");
    }
    namespace.flush().unwrap();
    assert_eq!(target.seen().flushes.load(Ordering::Relaxed), 1);
    controller.shutdown().unwrap();
    assert!(target.seen().shut_down.load(Ordering::Acquire));
}

#[test]
fn blocks_go_there_and_back() {
    move_blocks(Behaviour::default(), |_| {});
}

#[test]
fn blocks_go_there_and_back_with_both_digests_and_odd_alignments() {
    let behaviour = Behaviour { cpda: 17, c2h_len_max: 20_000, r2t_len_max: 70_000, ..Behaviour::default() };
    move_blocks(behaviour, |options| {
        options.header_digest = true;
        options.data_digest = true;
        options.hpda = 31;
    });
}

#[test]
fn blocks_go_there_and_back_with_one_digest() {
    move_blocks(Behaviour::default(), |options| options.header_digest = true);
    move_blocks(Behaviour::default(), |options| options.data_digest = true);
}

#[test]
fn h2c_data_is_split_at_maxh2cdata() {
    let behaviour = Behaviour { maxh2cdata: 4096, in_capsule_len: 0, mdts: 5, ..Behaviour::default() };
    let target = ScriptedTarget::start(behaviour);
    let controller = Controller::connect(&options(&target)).unwrap();
    assert_eq!(controller.transfer_len_max(), 128 << 10);
    let namespace = controller.namespace(NSID).unwrap();
    namespace.write(Lba(0), &pattern(9 * 1024, 1), false).unwrap();
    assert_eq!(*target.seen().h2c_data.lock().unwrap(), [4096, 4096, 1024]);
}

#[test]
fn reads_without_responses_complete_by_the_success_flag() {
    move_blocks(Behaviour { success_flag: true, c2h_len_max: 8192, ..Behaviour::default() }, |_| {});
}

#[test]
fn the_success_flag_is_refused_when_it_was_not_agreed_on() {
    let target = ScriptedTarget::start(Behaviour { success_flag: true, ..Behaviour::default() });
    let connect = ConnectOptions { disable_sq_flow_control: false, ..options(&target) };
    let controller = Controller::connect(&connect).unwrap();
    let error = controller.namespace(NSID).unwrap().read(Lba(0), &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
}

#[test]
fn admin_commands_identify_logs_and_features() {
    let target = ScriptedTarget::start(Behaviour::default());
    let controller = Controller::connect(&ConnectOptions { io_queues: 20, ..options(&target) }).unwrap();
    assert_eq!(
        (controller.cntlid(), controller.io_queue_count()),
        (CNTLID, 8),
        "as many queues as were granted"
    );
    assert_eq!(controller.active_namespaces().unwrap(), [NSID]);
    let ids = controller.descriptors(NSID).unwrap();
    assert_eq!((ids.nguid, ids.eui64, ids.uuid, ids.csi), (Some([0x22; 16]), Some([0x11; 8]), None, Some(0)));
    let log = controller.get_log_page(0x02, Nsid::ALL, 8, 5000).unwrap();
    assert!(log.iter().zip(8u32..).all(|(&byte, at)| byte == at.to_le_bytes()[0]), "pieces fit together");
    assert_eq!(
        controller.get_log_page(0x02, Nsid::ALL, 0, 6).unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    assert_eq!(
        controller.get_features(FeatureId::VOLATILE_WRITE_CACHE, Nsid::NONE, &mut []).unwrap(),
        0xABCD
    );
    let error = controller.identify_namespace(Nsid(9)).unwrap_err();
    assert_eq!((error.kind(), error.status()), (ErrorKind::Status, Some(Status::INVALID_FIELD.with_dnr())));
    let completion = controller.admin_raw(&command::command(0xC1, NSID), &[], &mut []).unwrap();
    assert_eq!(completion.status, Status::INVALID_OPCODE.with_dnr(), "a raw command gives its status");
}

#[test]
fn other_block_commands_and_bad_arguments() {
    let target = ScriptedTarget::start(Behaviour::default());
    let controller = Controller::connect(&options(&target)).unwrap();
    let namespace = controller.namespace(NSID).unwrap();
    namespace.write(Lba(10), &[7; 2048], false).unwrap();
    namespace.write_zeroes(Lba(11), BlockCount(2)).unwrap();
    let media = target.media();
    assert!(media[10 * 512..11 * 512].iter().chain(&media[13 * 512..14 * 512]).all(|&byte| byte == 7));
    assert!(media[11 * 512..13 * 512].iter().all(|&byte| byte == 0));
    namespace.deallocate(Lba(0), BlockCount(100)).unwrap();
    assert_eq!(namespace.write(Lba(0), &[0; 100], false).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let error = namespace.read(Lba(8190), &mut vec![0; 4096]).unwrap_err();
    assert_eq!(error.status(), Some(Status::LBA_OUT_OF_RANGE.with_dnr()));
    let mut back = [0; 512];
    namespace.read(Lba(10), &mut back).unwrap();
    assert_eq!(back, [7; 512], "the queue lives on after a bad status");
}

#[test]
fn keep_alive_is_sent_and_events_are_collected() {
    let target = ScriptedTarget::start(Behaviour::default());
    let controller = Controller::connect(&ConnectOptions { kato_ms: 60, ..options(&target) }).unwrap();
    assert_eq!(controller.next_event(Duration::from_secs(5)).unwrap(), Some(0x0004_0002));
    let started = Instant::now();
    while target.seen().keep_alives.load(Ordering::Relaxed) < 3 {
        assert!(started.elapsed() < Duration::from_secs(5), "no three keep alives in five seconds");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!controller.is_lost());
    drop(target);
}

#[test]
fn discovery_reads_again_when_the_log_moves() {
    let target = ScriptedTarget::start(Behaviour { discovery_changes: 3, ..Behaviour::default() });
    let entries = discover(target.address, &Host::random()).unwrap();
    let nqns: Vec<_> = entries.iter().map(|entry| entry.subsystem_nqn.as_str()).collect();
    assert_eq!(nqns, ["nqn.2026-11.example:disk0", "nqn.2026-11.example:disk1"]);
    assert_eq!((entries[0].address.as_str(), entries[0].service.as_str()), ("127.0.0.1", "4420"));

    let restless = ScriptedTarget::start(Behaviour { discovery_changes: u32::MAX, ..Behaviour::default() });
    let controller =
        Controller::connect(&ConnectOptions::discovery(restless.address, Host::random())).unwrap();
    assert_eq!(read_log(&controller).unwrap_err().kind(), ErrorKind::Incompatible);
}
