//! Goal: the driver does what its documentation says, against a controller that does what the specification says.

mod common;

use std::sync::Arc;
use std::time::Duration;

use async_nvme::{
    AdminCommand, Clock, Controller, Error, Event, IoError, OpKind, Options, RawCommand, RefusedWhy, State,
    SystemClock, block_on,
};
use common::{Rig, bytes, op};
use nvme_model::{Backing, ControllerOptions, NamespaceOptions, Subsystem};
use nvme_spec::{AdminOpcode, NvmOpcode, Status};
use proptest::prelude::*;

const WRITE: OpKind = OpKind::Write { fua: false };

#[test]
fn a_controller_becomes_ready_and_tells_what_it_is() {
    let mut namespace = NamespaceOptions::memory(3, 12, 1000);
    namespace.uuid = Some([9; 16]);
    namespace.noiob = 32;
    let mut rig = Rig::new(namespace, ControllerOptions::default());
    rig.subsystem.add_namespace(NamespaceOptions::memory(7, 9, 5)).unwrap();
    rig.start().unwrap();
    let info = rig.controller.info();
    assert_eq!((info.serial.as_str(), info.model.as_str()), ("TEST0001", "fastice model"));
    assert_eq!((info.io_queues, info.transfer_len_max), (16, 256 << 10));
    let [first, second] = rig.controller.namespaces() else { panic!("two namespaces") };
    assert_eq!((first.nsid, first.blocks, first.block_len(), first.noiob), (3, 1000, 4096, 32));
    assert_eq!((first.uuid, first.refusal, first.shared), (Some([9; 16]), None, true));
    assert_eq!((second.nsid, second.block_len()), (7, 512));
    let smart = {
        let model = rig.model.clone();
        block_on(rig.controller.smart(), || _ = model.step()).unwrap()
    };
    assert_eq!(smart.composite_temperature.get(), 310);
    let model = rig.model.clone();
    let slots = block_on(rig.controller.firmware_slots(), || _ = model.step()).unwrap();
    assert_eq!(&slots.revisions[0], b"1.0     ");
}

#[test]
fn all_commands_do_what_they_are_for() {
    for shift in [9u8, 12] {
        let mut rig = Rig::new(NamespaceOptions::memory(1, shift, 1024), ControllerOptions::default());
        rig.start().unwrap();
        let mut queue = rig.queue(8);
        let len = 8usize << shift;
        let data = rig.filled(len, 0xA5);
        let zeros = rig.filled(len, 0);
        let read = rig.pool.alloc(u32::try_from(len).unwrap()).unwrap();
        assert_eq!(rig.run(&mut queue, op(1, OpKind::Write { fua: true }, 16, 8, Some(data.clone()))), Ok(0));
        assert_eq!(rig.run(&mut queue, op(2, OpKind::Read, 16, 8, Some(read.clone()))), Ok(0));
        assert_eq!(bytes(&read), vec![0xA5; len]);
        assert_eq!(rig.run(&mut queue, op(3, OpKind::Compare, 16, 8, Some(data.clone()))), Ok(0));
        let differs = rig.run(&mut queue, op(4, OpKind::Compare, 17, 8, Some(data.clone())));
        assert_eq!(differs, Err(IoError::Status(Status::COMPARE_FAILURE.with_dnr())));
        assert_eq!(rig.run(&mut queue, op(5, OpKind::Verify, 0, 1024, None)), Ok(0));
        assert_eq!(rig.run(&mut queue, op(6, OpKind::Flush, 0, 0, None)), Ok(0));
        let zero = OpKind::WriteZeroes { deallocate: false, fua: true };
        assert_eq!(rig.run(&mut queue, op(7, zero, 16, 4, None)), Ok(0));
        assert_eq!(rig.run(&mut queue, op(8, OpKind::Deallocate, 20, 4, None)), Ok(0));
        assert_eq!(rig.run(&mut queue, op(9, OpKind::Compare, 16, 8, Some(zeros))), Ok(0));
        let raw = RawCommand { opcode: NvmOpcode::READ.0, cdw10_15: [16, 0, 7, 0, 0, 0] };
        read.write_from(0, &[1; 16]);
        assert_eq!(rig.run(&mut queue, op(10, OpKind::Raw(raw), 0, 0, Some(read.clone()))), Ok(0));
        assert_eq!(bytes(&read), vec![0; len]);
    }
}

#[test]
fn an_operation_that_cannot_be_is_given_back() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(2);
    let mut why = |operation| queue.submit(operation).unwrap_err().why;
    let invalid = |why: RefusedWhy| matches!(why, RefusedWhy::Invalid(_));
    let buf = |len: u32| rig.pool.alloc(len);
    assert!(invalid(why(op(1, OpKind::Read, 1024, 1, buf(512)))), "behind the end");
    assert!(invalid(why(op(1, OpKind::Read, u64::MAX, 1, buf(512)))));
    assert!(invalid(why(op(1, OpKind::Read, 0, 2, buf(512)))), "a short buffer");
    assert!(invalid(why(op(1, OpKind::Read, 0, 1, None))));
    assert!(invalid(why(op(1, OpKind::Read, 0, 0, buf(512)))));
    assert!(invalid(why(op(1, OpKind::Read, 0, 1, Some(buf(1024).unwrap().slice(2, 512))))), "not aligned");
    assert!(invalid(why(op(1, OpKind::Read, 0, 1, common::pool().alloc(512)))), "of another pool");
    queue.submit(op(1, OpKind::Flush, 0, 0, None)).unwrap();
    queue.submit(op(2, OpKind::Flush, 0, 0, None)).unwrap();
    let refused = queue.submit(op(3, OpKind::Flush, 0, 0, None)).unwrap_err();
    assert_eq!((refused.why, refused.op.token), (RefusedWhy::Full, 3));
    assert_eq!(rig.collect(&mut queue, 2, 100).len(), 2);
}

#[test]
fn namespaces_that_are_not_ours_are_refused_with_the_reason() {
    let mut namespace = NamespaceOptions::memory(1, 12, 8);
    namespace.metadata_bytes = 8;
    let mut rig = Rig::new(namespace, ControllerOptions::default());
    rig.subsystem.add_namespace(NamespaceOptions::memory(2, 13, 8)).unwrap();
    rig.start().unwrap();
    let text = |result: Result<async_nvme::QueueTicket, Error>| result.unwrap_err().to_string();
    assert!(text(rig.controller.queue_ticket(1, 8)).contains("metadata"));
    assert!(text(rig.controller.queue_ticket(2, 8)).contains("neither 512 nor 4096"));
    assert!(text(rig.controller.queue_ticket(3, 8)).contains("no such active namespace"));
}

#[test]
fn queues_run_out_and_come_back() {
    let options = ControllerOptions { io_queues_max: 2, mqes_z: 15, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 64), options);
    rig.start().unwrap();
    assert_eq!(rig.controller.info().io_queues, 2);
    let first = rig.queue(1000);
    assert_eq!(first.depth(), 15, "as much as MQES allows");
    let _second = rig.queue(4);
    assert!(matches!(rig.controller.queue_ticket(1, 4), Err(Error::Exhausted { .. })));
    drop(first);
    (0..20).for_each(|_| rig.turn());
    (0..3).for_each(|_| drop(rig.controller.queue_ticket(1, 4).unwrap()));
    let mut third = rig.queue(4);
    assert_eq!(rig.run(&mut third, op(1, OpKind::Flush, 0, 0, None)), Ok(0));
}

#[test]
fn long_operations_are_split_at_mdts_and_noiob() {
    let mut namespace = NamespaceOptions::memory(1, 9, 4096);
    namespace.noiob = 64;
    let options = ControllerOptions { mdts: 2, ..ControllerOptions::default() };
    let mut rig = Rig::new(namespace, options);
    rig.start().unwrap();
    // Two slots: most pieces have to wait.
    let mut queue = rig.queue(2);
    let buf = rig.pool.alloc(1000 * 512).unwrap();
    (0..1000u32).for_each(|block| buf.write_from(block as usize * 512, &block.to_le_bytes()));
    assert_eq!(rig.run(&mut queue, op(1, WRITE, 50, 1000, Some(buf.clone()))), Ok(0));
    let written = bytes(&buf);
    // MDTS is 32 blocks: 14 up to the first boundary, then 32 at a time.
    assert_eq!(queue.stats().commands, 1 + (1000u64 - 14).div_ceil(32));
    buf.zero();
    assert_eq!(rig.run(&mut queue, op(2, OpKind::Read, 50, 1000, Some(buf.clone()))), Ok(0));
    assert_eq!(bytes(&buf), written);
}

#[test]
fn queues_wrap_many_times() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(3);
    for token in 0..500 {
        let buf = rig.filled(512, u8::try_from(token % 251).unwrap());
        assert_eq!(rig.run(&mut queue, op(token, WRITE, token, 1, Some(buf))), Ok(0));
    }
    let stats = queue.stats();
    assert_eq!((stats.submitted, stats.completed, stats.violations, stats.resets), (500, 500, 0, 0));
}

#[test]
fn two_controllers_share_a_namespace_on_a_file() {
    let path = std::env::temp_dir().join(format!("async-nvme-{}", std::process::id()));
    let file =
        std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    let subsystem = Subsystem::new("SHARED");
    let backing = Backing::File(file);
    subsystem.add_namespace(NamespaceOptions { backing, ..NamespaceOptions::memory(1, 12, 256) }).unwrap();
    let rig = || Rig::over(&subsystem, ControllerOptions::default(), Options::default());
    let (mut one, mut two) = (rig(), rig());
    one.start().unwrap();
    two.start().unwrap();
    assert_ne!(one.controller.info().cntlid, two.controller.info().cntlid);
    assert_eq!(one.controller.namespaces()[0].nguid, two.controller.namespaces()[0].nguid);
    let (mut first, mut second) = (one.queue(4), two.queue(4));
    let data = one.filled(4096, 0x77);
    assert_eq!(one.run(&mut first, op(1, WRITE, 255, 1, Some(data))), Ok(0));
    let read = two.pool.alloc(4096).unwrap();
    assert_eq!(two.run(&mut second, op(1, OpKind::Read, 255, 1, Some(read.clone()))), Ok(0));
    assert_eq!(bytes(&read), vec![0x77; 4096]);
}

#[test]
fn a_change_of_namespaces_is_noticed() {
    let mut rig = Rig::ready();
    (0..20).for_each(|_| rig.turn());
    rig.subsystem.add_namespace(NamespaceOptions::memory(2, 12, 8)).unwrap();
    (0..50).for_each(|_| rig.turn());
    assert_eq!(rig.controller.namespaces().len(), 2);
    let events: Vec<Event> = std::iter::from_fn(|| rig.controller.take_event()).collect();
    assert!(events.iter().any(|event| matches!(event, Event::Asynchronous(0x0004_0002))));
    assert!(events.iter().any(|event| matches!(event, Event::NamespacesChanged)));
    assert!(rig.subsystem.remove_namespace(2));
    (0..50).for_each(|_| rig.turn());
    assert_eq!(rig.controller.namespaces().len(), 1, "the next event was asked for");
}

#[test]
fn a_queue_never_goes_on_with_another_namespace_under_its_identifier() {
    for by_reset in [false, true] {
        let mut rig = Rig::ready();
        let mut queue = rig.queue(4);
        // The same identifier, but blocks of 4096 bytes.
        rig.subsystem.add_namespace(NamespaceOptions::memory(1, 12, 1024)).unwrap();
        if by_reset {
            rig.controller.reset();
        }
        let mut none = Vec::with_capacity(4);
        for _ in 0..200 {
            rig.turn();
            queue.poll(rig.clock.now(), 4, &mut none);
        }
        assert!(queue.is_gone());
        assert_eq!(queue.refused_with(), Some(Status::INVALID_NAMESPACE));
        let mut again = rig.queue(4);
        assert_eq!(rig.run(&mut again, op(1, OpKind::Read, 0, 1, rig.pool.alloc(4096))), Ok(0));
    }
}

#[test]
fn admin_commands_are_answered_or_fail_with_a_status() {
    let mut rig = Rig::ready();
    let model = rig.model.clone();
    let unknown = AdminCommand { what: "Nonsense", opcode: 0xC1, ..AdminCommand::default() };
    let error = block_on(rig.controller.admin(&unknown), || _ = model.step()).unwrap_err();
    assert!(matches!(error, Error::Status { status, .. } if status.code() == Status::INVALID_OPCODE));
    // A future dropped half way leaves nothing behind.
    for _ in 0..100 {
        let keep_alive = AdminCommand { opcode: AdminOpcode::KEEP_ALIVE.0, ..AdminCommand::default() };
        rig.controller.submit_admin(&keep_alive).map(drop).ok();
        let mut waiting = Box::pin(rig.controller.admin(&keep_alive));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let _ = waiting.as_mut().poll(&mut context);
        drop(waiting);
        rig.turn();
    }
    let too_much = AdminCommand { data_in_len: 5000, ..AdminCommand::default() };
    assert!(matches!(rig.controller.submit_admin(&too_much), Err(Error::TooLarge { bytes: 5000 })));
}

#[test]
fn a_shutdown_ends_in_order() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(4);
    let (model, clock) = (rig.model.clone(), rig.clock.clone());
    let idle = || {
        model.step();
        clock.advance(Duration::from_millis(1));
    };
    block_on(rig.controller.shutdown(), idle).unwrap();
    assert_eq!(rig.controller.state(), State::Stopped);
    assert!(rig.controller.failure().is_none());
    assert!(queue.is_gone());
    assert_eq!(queue.submit(op(1, OpKind::Flush, 0, 0, None)).unwrap_err().why, RefusedWhy::Gone);
}

#[test]
fn driver_and_model_on_threads_of_their_own() {
    let subsystem = Subsystem::new("THREADS");
    subsystem.add_namespace(NamespaceOptions::memory(1, 12, 1024)).unwrap();
    let model = subsystem.controller(ControllerOptions::default());
    let _running = model.spawn().unwrap();
    let clock = Arc::new(SystemClock::default());
    let mut controller = Controller::new(model, Options::default(), clock.clone()).unwrap();
    block_on(controller.ready(), || ()).unwrap();
    let tickets: Vec<_> = (0..2).map(|_| controller.queue_ticket(1, 16).unwrap()).collect();
    let workers: Vec<_> = (0u64..)
        .zip(tickets)
        .map(|(number, ticket)| {
            let clock = clock.clone();
            std::thread::spawn(move || work(number, ticket, &*clock))
        })
        .collect();
    block_on(controller.until(|_| workers.iter().all(std::thread::JoinHandle::is_finished)), || ()).unwrap();
    for worker in workers {
        worker.join().unwrap();
    }
}

/// Writes blocks of its own half, and reads each back.
fn work(number: u64, ticket: async_nvme::QueueTicket, clock: &dyn Clock) {
    let pool = common::pool();
    let mut queue = ticket.open(&pool).unwrap();
    while !queue.is_ready() {
        std::thread::yield_now();
    }
    let mut done = Vec::with_capacity(16);
    for round in 0..500u64 {
        let lba = number * 512 + round % 512;
        let byte = u8::try_from((round + number) % 251).unwrap();
        let buf = pool.alloc(4096).unwrap();
        buf.write_from(0, &[byte; 4096]);
        for kind in [WRITE, OpKind::Read] {
            queue.submit(op(round, kind, lba, 1, Some(buf.clone()))).unwrap();
            queue.ring();
            while queue.poll(clock.now(), 16, &mut done) == 0 {
                std::thread::yield_now();
            }
            assert_eq!(done.pop().unwrap().result, Ok(0));
            if kind == WRITE {
                buf.zero();
            }
        }
        assert_eq!(bytes(&buf), vec![byte; 4096]);
    }
}

#[derive(Clone, Debug)]
struct Step {
    kind: u8,
    lba: u64,
    blocks: u64,
    offset: usize,
    byte: u8,
}

fn step() -> impl Strategy<Value = Step> {
    (0..6u8, 0..200u64, 1..56u64, 0..1024usize, any::<u8>())
        .prop_map(|(kind, lba, blocks, offset, byte)| Step { kind, lba, blocks, offset: offset * 4, byte })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: any sequence of operations, at any alignment, leaves what a plain array would hold.
    #[test]
    fn a_namespace_is_a_plain_array(
        steps in proptest::collection::vec(step(), 1..60), big in any::<bool>(), sgl in any::<bool>(), mdts in 1..6u8,
    ) {
        let shift = if big { 12u8 } else { 9 };
        let options = ControllerOptions { mdts, sgl, dstrd: mdts % 3, ..ControllerOptions::default() };
        let mut rig = Rig::new(NamespaceOptions::memory(1, shift, 256), options);
        rig.start().unwrap();
        let mut queue = rig.queue(4);
        let mut array = vec![0u8; 256 << shift];
        for step in steps {
            let range = usize::try_from(step.lba << shift).unwrap()..usize::try_from((step.lba + step.blocks) << shift).unwrap();
            let len = range.len();
            let buf = rig.pool.alloc(u32::try_from(len + 4096).unwrap()).unwrap().slice(step.offset, len);
            let fill: Vec<u8> = (0..len).map(|at| step.byte.wrapping_add((at / 4).to_le_bytes()[0])).collect();
            buf.write_from(0, &fill);
            let (kind, moves) = match step.kind {
                0 | 1 => (WRITE, true),
                2 | 3 => (OpKind::Read, true),
                4 => (OpKind::WriteZeroes { deallocate: false, fua: false }, false),
                _ => (OpKind::Deallocate, false),
            };
            let result = rig.run(&mut queue, op(0, kind, step.lba, step.blocks, moves.then(|| buf.clone())));
            prop_assert_eq!(result, Ok(0));
            match kind {
                OpKind::Write { .. } => array[range].copy_from_slice(&fill),
                OpKind::Read => prop_assert_eq!(&bytes(&buf)[..], &array[range]),
                _ => array[range].fill(0),
            }
        }
        prop_assert_eq!(queue.stats().violations, 0);
    }
}
