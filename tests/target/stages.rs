//! Commands tell where their time went: each is counted once, its stages add up, and a stage that is long is the right one.

use std::time::Duration;

use fastice::control::LatencyStatus;
use fastice::initiator::controller::Controller;
use fastice::tcp::pdu::Digests;
use fastice::units::{BlockCount, Lba};
use nvme_spec::{Nsid, NvmOpcode, Status};

use crate::rude::{
    HOST, RudeHost, WRITABLE, answer_to, completion_of, expect_status, flush, h2c_data, r2t_of, read,
    rude_target, transfer,
};
use crate::support::{NQN, TestTarget, eventually, memory_target, options};

/// Of one host: the rows, once they have `commands`.
fn latencies(target: &TestTarget, host: &str, commands: u64) -> Vec<LatencyStatus> {
    let rows = || {
        let all = target.running.latencies().into_iter();
        all.filter(|row| row.host.as_deref() == Some(host)).collect::<Vec<_>>()
    };
    let count = || rows().iter().map(|row| row.total.count).sum::<u64>();
    eventually("all answers are counted as sent", || count() >= commands);
    assert_eq!(count(), commands);
    rows()
}

fn add_up(row: &LatencyStatus) {
    assert!(row.stages.values().all(|stage| stage.count == row.total.count), "{row:?}");
    assert_eq!(row.stages.values().map(|stage| stage.sum_ns).sum::<u64>(), row.total.sum_ns, "{row:?}");
    assert!(row.total.sum_ns > 0 && row.total.p50_ns <= row.total.p99_ns, "{row:?}");
}

#[test]
fn every_command_is_counted_once_and_its_stages_add_up() {
    let target = memory_target();
    let options = options(&target);
    let controller = Controller::connect(&options).expect("the host connects");
    let namespace = controller.namespace(Nsid(1)).expect("namespace 1");
    let mut data = vec![0x5A; 64 * 1024];
    for round in 0..50 {
        namespace.write(Lba(round), &data[..4096], false).expect("a write in the capsule");
        namespace.write(Lba(round), &data, true).expect("a write by R2T");
        namespace.read(Lba(round), &mut data).expect("a read");
        namespace.write_zeroes(Lba(round), BlockCount(4)).expect("write zeroes");
        namespace.flush().expect("a flush");
    }
    let rows = latencies(&target, &options.host.nqn, 250);
    let [row] = &rows[..] else { panic!("one namespace: {rows:?}") };
    assert_eq!((row.subsystem.as_deref(), row.nsid), (Some(NQN), Some(1)));
    add_up(row);
    controller.shutdown().expect("shutdown");
    assert_eq!(latencies(&target, &options.host.nqn, 250), rows, "they stay when the host has gone");
}

#[test]
fn namespaces_and_hosts_are_told_apart_and_commands_that_fail_before_a_device_are_not_counted() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, Digests::NONE);
    for _ in 0..3 {
        read(&mut queue, Nsid(1), 0, 1);
    }
    read(&mut queue, Nsid(2), 0, 1);
    expect_status(&mut queue, &flush(Nsid(2), 5), &[], Status::SUCCESS);
    expect_status(&mut queue, &flush(Nsid(9), 6), &[], Status::INVALID_NAMESPACE);
    expect_status(
        &mut queue,
        &transfer(NvmOpcode::WRITE, Nsid(2), 7, 0, 1),
        &[],
        Status::NAMESPACE_WRITE_PROTECTED,
    );
    let rows = latencies(&target, HOST, 5);
    let counted: Vec<_> = rows.iter().map(|row| (row.nsid, row.total.count)).collect();
    assert_eq!(counted, [(Some(1), 3), (Some(2), 2)]);
    rows.iter().for_each(add_up);
    assert!(target.running.latencies().iter().all(|row| row.host.is_some()), "nobody counts with the others");
}

#[test]
fn what_a_host_makes_the_target_wait_for_is_in_the_stage_of_receiving() {
    const PAUSE: Duration = Duration::from_millis(60);
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, Digests::NONE);
    queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, 7, 0, 1), &[]).expect("sent");
    let r2t = r2t_of(&mut queue);
    std::thread::sleep(PAUSE);
    queue.send(&h2c_data(Digests::NONE, &answer_to(&r2t), &[0x60; 4096])).expect("sent");
    assert_eq!(completion_of(&mut queue).1, Status::SUCCESS);
    let rows = latencies(&target, HOST, 1);
    add_up(&rows[0]);
    let pause_ns = u64::try_from(PAUSE.as_nanos()).expect("short");
    let receive = &rows[0].stages["receive"];
    assert!(receive.sum_ns >= pause_ns && receive.p50_ns >= pause_ns, "{rows:?}");
    let others: u64 = rows[0].total.sum_ns - receive.sum_ns;
    assert!(others < pause_ns, "{rows:?}");
}

#[test]
fn cores_tell_what_they_do_with_their_time_and_what_wakes_them() {
    let target = memory_target();
    let cores = || target.running.cores();
    eventually("they sleep", || cores().iter().all(|core| core.asleep_us > 100_000));
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, Digests::NONE);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(2));
        read(&mut queue, WRITABLE, 0, 1);
    }
    assert_eq!(cores().iter().map(|core| core.connections).sum::<usize>(), 2);
    // The core of the admin queue hears of it from the core of the other one, where there is another one.
    drop(queue);
    let wakes = |cause: &str| cores().iter().map(|core| core.wakes[cause]).sum::<u64>();
    for cause in ["socket", "accept", "timer", "mail"] {
        eventually(cause, || wakes(cause) > 0 || (cause == "mail" && cores().len() == 1));
    }
    let before = cores();
    eventually("they go on", || {
        cores().iter().zip(&before).all(|(now, then)| now.asleep_us > then.asleep_us)
    });
    for core in cores() {
        assert!(core.busy_us > 0 && core.polling_us > 0, "{core:?}");
        assert!(core.busy_us + core.polling_us + core.asleep_us > 140_000, "{core:?}");
    }
    let cpus: std::collections::BTreeSet<_> = cores().iter().map(|core| core.cpu).collect();
    assert_eq!(cpus.len(), cores().len());
}
