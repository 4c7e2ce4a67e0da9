//! I/O commands: what is handed to devices, and what never is.

use super::super::*;
use super::harness::*;
use crate::units::{BlockSize, ByteLen, ByteOffset};
use nvme_spec::{SglDescriptor, Status};
use zerocopy::little_endian::U32;

const BLOCKS: u64 = LEN / 512;

fn queue() -> (std::sync::Arc<Target>, Queue, Queue) {
    let target = target();
    let (admin, cntlid) = ready(&target);
    let io = io_queue(&target, cntlid, 1);
    (target, admin, io)
}

#[test]
fn good_commands_become_byte_ranges() {
    let (target, _admin, mut queue) = queue();
    let slot = target.exports()[0].slot;
    let command = |kind, start, len, fua| {
        Begin::Io(IoCommand { slot, kind, start: ByteOffset(start), len: ByteLen(len), fua })
    };
    assert_eq!(queue.begin(io(2, 1, 8, 2)), command(IoKind::Read, 4096, 1024, false));
    assert_eq!(queue.begin(io(1, 1, BLOCKS - 1, 1)), command(IoKind::Write, LEN - 512, 512, false));
    let mut fua = io(1, 1, 0, 2048);
    fua.cdw12 = U32::new(fua.cdw12.get() | 1 << 30);
    assert_eq!(queue.begin(fua), command(IoKind::Write, 0, 1 << 20, true));
    let mut in_capsule = io(1, 1, 0, 1);
    in_capsule.dptr = SglDescriptor::in_capsule(512, 512);
    assert_eq!(queue.begin(in_capsule), command(IoKind::Write, 0, 512, false));
    assert_eq!(queue.begin(self::command(0, 1, 0, [0; 3])), command(IoKind::Flush, 0, 0, false));
    let zeroes = IoKind::WriteZeroes { deallocate: false };
    assert_eq!(queue.begin(io(8, 1, 0, u32::try_from(BLOCKS).unwrap())), command(zeroes, 0, LEN, false));
    assert_eq!(queue.begin(io(2, 3, 0, 1)), {
        let slot = target.exports()[1].slot;
        Begin::Io(IoCommand { slot, kind: IoKind::Read, start: ByteOffset(0), len: ByteLen(512), fua: false })
    });
}

#[test]
fn a_transfer_is_the_same_whichever_way_it_is_begun() {
    let target = target();
    let (_admin, cntlid) = ready(&target);
    let (mut one, mut other) = (io_queue(&target, cntlid, 1), io_queue(&target, cntlid, 2));
    for opcode in [1, 2, 8] {
        for nsid in [1, 2, 3] {
            for (slba, blocks) in [(0, 1), (8, 2048), (BLOCKS - 1, 1), (BLOCKS, 1), (0, 2049)] {
                let sqe = io(opcode, nsid, slba, blocks);
                assert_eq!(one.begin(sqe), other.begin_at_length(&sqe), "{opcode} {nsid} {slba} {blocks}");
                assert_eq!(one.session.sqhd(), other.session.sqhd());
            }
        }
    }
}

#[test]
fn bad_commands_get_their_status_and_no_device_sees_them() {
    let (_target, _admin, mut queue) = queue();
    let range = (Status::LBA_OUT_OF_RANGE, true);
    for (slba, blocks) in [(BLOCKS, 1), (BLOCKS - 1, 2), (u64::MAX, 1), (u64::MAX / 512, 512), (1 << 55, 1)] {
        for opcode in [1, 2, 8] {
            assert_eq!(queue.status(io(opcode, 1, slba, blocks)), range, "{opcode} {slba} {blocks}");
        }
    }
    assert_eq!(queue.status(io(2, 1, 0, 2049)), (Status::INVALID_FIELD, true), "MDTS");
    for nsid in [0, 2, 4, 1025, u32::MAX] {
        let invalid = (Status::INVALID_NAMESPACE, true);
        assert_eq!(queue.status(io(2, nsid, 0, 1)), invalid);
        assert_eq!(queue.status(command(0, nsid, 0, [0; 3])), invalid, "flush of all is not supported");
    }
    let protected = (Status::NAMESPACE_WRITE_PROTECTED, true);
    assert_eq!(queue.status(io(1, 3, 0, 1)), protected);
    assert_eq!(queue.status(io(8, 3, 0, 1)), protected);
    assert_eq!(queue.status(command(9, 3, 16, [0, 4, 0])), protected);
    for len in [0, 511, 513, 1024] {
        let sqe = command(2, 1, len, [0; 3]);
        assert_eq!(queue.status(sqe), (Status::DATA_SGL_LENGTH_INVALID, true), "{len}");
    }
    for flags in [0x00, 0x80, 0xC0, 0x41, 0x42] {
        let sqe = nvme_spec::SubmissionQueueEntry { flags, ..io(2, 1, 0, 1) };
        assert_eq!(queue.status(sqe), (Status::INVALID_FIELD, true), "{flags:#x}");
    }
    let mut capsule = io(2, 1, 0, 1);
    capsule.dptr = SglDescriptor::in_capsule(0, 512);
    assert_eq!(queue.status(capsule), (Status::SGL_TYPE_INVALID, true), "reads never fit a capsule");
    for opcode in 0..=255 {
        if ![0, 1, 2, 8, 9, 0x7F].contains(&opcode) {
            assert_eq!(queue.status(command(opcode, 1, 0, [0; 3])), (Status::INVALID_OPCODE, true));
        }
    }
}

#[test]
fn errors_are_logged_with_the_byte_at_fault() {
    let (_target, mut admin, mut queue) = queue();
    queue.status(io(2, 1, BLOCKS, 1));
    let cid = queue.cid();
    admin.status(command(0x06, 0, 4096, [0xFE, 0, 0]));
    let page = admin.data(log(1, 128, 0, false));
    assert_eq!(page[..8], 2u64.to_le_bytes(), "newest first");
    assert_eq!(page[14..16], 40u16.to_le_bytes());
    let entry = &page[64..];
    assert_eq!(entry[..8], 1u64.to_le_bytes());
    assert_eq!(entry[8..10], 1u16.to_le_bytes(), "SQID");
    assert_eq!(entry[10..12], cid.to_le_bytes());
    assert_eq!(entry[12..14], (0x6080u16 << 1).to_le_bytes(), "DNR and More");
    assert_eq!(entry[14..16], 40u16.to_le_bytes(), "SLBA");
    assert_eq!(entry[16..24], BLOCKS.to_le_bytes());
    assert_eq!(entry[24..28], 1u32.to_le_bytes());
    queue.session.note_error(&io(2, 1, 9, 1), Status::UNRECOVERED_READ_ERROR.with_dnr(), None);
    let page = admin.data(log(1, 64, 0, false));
    assert_eq!(page[14..16], [0xFF, 0xFF], "no field is at fault");
    let smart = admin.data(log(2, 512, 0, false));
    assert_eq!(smart[176..184], 3u64.to_le_bytes());
}

fn range(slba: u64, blocks: u32) -> Vec<u8> {
    [&0u32.to_le_bytes()[..], &blocks.to_le_bytes(), &slba.to_le_bytes()].concat()
}

#[test]
fn dataset_management_ranges_are_checked_before_any_is_used() {
    let (target, _admin, mut queue) = queue();
    // As Linux does it: room for 256 ranges, two of them used.
    let mut data = [range(8, 8), range(BLOCKS - 1, 1)].concat();
    data.resize(4096, 0xFF);
    let sqe = command(9, 1, 4096, [1, 4, 0]);
    let begin = queue.send(sqe, &data);
    let kind = IoKind::DatasetManagement { ranges: 2 };
    let slot = target.exports()[0].slot;
    assert_eq!(begin, Begin::Io(IoCommand { slot, kind, start: ByteOffset(0), len: ByteLen(0), fua: false }));
    let ranges: Vec<_> = dsm_ranges(&data, 2, BlockSize::B512).collect();
    assert_eq!(ranges, [(ByteOffset(4096), ByteLen(4096)), (ByteOffset(LEN - 512), ByteLen(512))]);

    let beyond = queue.send(command(9, 1, 32, [1, 4, 0]), &[range(0, 1), range(BLOCKS, 1)].concat());
    assert!(
        matches!(beyond, Begin::Respond(completion) if completion.status.code() == Status::LBA_OUT_OF_RANGE)
    );
    let hint = queue.send(command(9, 1, 16, [0, 1, 0]), &range(0, 1));
    assert_eq!(hint, Begin::Respond(Completion::SUCCESS));
    for len in [0, 16, 4112] {
        let status = queue.status(command(9, 1, len, [1, 4, 0]));
        assert_eq!(status, (Status::DATA_SGL_LENGTH_INVALID, true), "{len}");
    }
}

#[test]
fn a_host_that_takes_delays_is_told_when_to_try_again() {
    let (target, mut admin, mut queue) = queue();
    let export = target.exports()[0].clone();
    let mut crd = |reason: FenceReason| {
        target.fence(&export, reason);
        let Begin::Respond(completion) = queue.begin(io(2, 1, 0, 1)) else { panic!("it is fenced") };
        target.unfence(&export, reason);
        let told = queue.session.told(completion.status);
        assert_eq!((told.code(), told.dnr()), (Status::NAMESPACE_NOT_READY, false));
        told.crd()
    };
    assert_eq!(
        (crd(FenceReason::MapInDoubt), crd(FenceReason::DeviceFailed)),
        (0, 0),
        "reserved until asked for"
    );
    let mut behavior = vec![0; 512];
    behavior[0] = 1;
    let set = command(0x09, 0, 512, [0x16, 0, 0]);
    assert_eq!(admin.send(set, &behavior), Begin::Respond(Completion::SUCCESS));
    assert_eq!((crd(FenceReason::MapInDoubt), crd(FenceReason::DeviceFailed)), (2, 3));
    let delays = &admin.data(identify(1, 0))[128..134];
    assert_eq!(delays, [1, 0, 10, 0, 50, 0], "CRDT1 to CRDT3");
    admin.set_cc(ENABLE & !1);
    admin.set_cc(ENABLE);
}

#[test]
fn a_fence_refuses_for_now_and_removal_for_ever() {
    let (target, mut admin, mut queue) = queue();
    let export = target.exports()[0].clone();
    target.fence(&export, FenceReason::MapInDoubt);
    assert_eq!(export.grant(), Grant::Fenced(FenceReason::MapInDoubt));
    assert_eq!(queue.status(io(2, 1, 0, 1)), (Status::NAMESPACE_NOT_READY, false));
    assert_eq!(queue.status(command(0, 1, 0, [0; 3])), (Status::NAMESPACE_NOT_READY, false));
    assert!(matches!(queue.begin(io(2, 3, 0, 1)), Begin::Io(_)), "others go on");
    assert_eq!(admin.data(identify(8, 1))[14], 0, "NRDY");
    target.unfence(&export, FenceReason::MapInDoubt);
    assert!(matches!(queue.begin(io(2, 1, 0, 1)), Begin::Io(_)));
    assert_eq!(admin.data(identify(8, 1))[14], 1);
    target.publish(vec![subsystem(vec![])], ports()).unwrap();
    assert_eq!(queue.status(io(2, 1, 0, 1)), (Status::INVALID_NAMESPACE, true));
    target.unfence(&export, FenceReason::MapInDoubt);
    assert_eq!(export.grant(), Grant::Removed);
}

#[test]
fn every_reason_of_a_fence_is_taken_back_by_itself() {
    let (target, _admin, _queue) = queue();
    let export = target.exports()[0].clone();
    target.fence(&export, FenceReason::DeviceFailed);
    assert_eq!(export.grant(), Grant::Fenced(FenceReason::DeviceFailed));
    target.fence(&export, FenceReason::MapInDoubt);
    assert_eq!(export.grant(), Grant::Fenced(FenceReason::MapInDoubt));
    target.unfence(&export, FenceReason::DeviceFailed);
    assert_eq!(export.grant(), Grant::Fenced(FenceReason::MapInDoubt), "the device alone is back");
    target.unfence(&export, FenceReason::MapInDoubt);
    assert_eq!(export.grant(), Grant::Live);
}

#[test]
fn a_queue_can_be_disconnected_alone() {
    let (target, _admin, mut queue) = queue();
    let disconnect = command(0x7F, 8, 0, [0; 3]);
    assert_eq!(queue.status(command(0x7F, 8, 0, [1, 0, 0])), (Status::CONNECT_INCOMPATIBLE_FORMAT, true));
    assert_eq!(queue.begin(disconnect), Begin::RespondThenClose(Completion::SUCCESS));
    assert_eq!(queue.close_reason(), Some(CloseReason::Disconnected));
    assert_eq!(queue.status(io(2, 1, 0, 1)), (Status::ABORTED_SQ_DELETION, false));
    queue.session.closed();
    io_queue(&target, 1, 1);
}

#[test]
fn traffic_is_counted_for_smart() {
    let (target, mut admin, mut queue) = queue();
    for _ in 0..3 {
        queue.begin(io(2, 1, 0, 2048));
    }
    queue.begin(io(1, 1, 0, 1));
    drop(queue);
    let smart = admin.data(log(2, 512, 0, false));
    assert_eq!(smart[32..40], 7u64.to_le_bytes(), "3 MiB in thousands of sectors, rounded up");
    assert_eq!(smart[48..56], 1u64.to_le_bytes());
    assert_eq!(smart[64..72], 3u64.to_le_bytes());
    assert_eq!(smart[80..88], 1u64.to_le_bytes());
    let info = &target.controllers()[0];
    assert_eq!((info.read_bytes, info.written_bytes, info.io_queues), (3 << 20, 512, 0));
}
