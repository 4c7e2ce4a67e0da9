//! Goal: every kind of operation does what it says, at every alignment and within every limit that a controller has.

mod common;

use async_nvme::{IoError, OpKind, RefusedWhy};
use common::{Rig, bytes, op};
use nvme_model::{ControllerOptions, NamespaceOptions};
use nvme_spec::Status;
use nvme_spec::nvm::{DatasetManagementRange, dsm};
use proptest::prelude::*;
use zerocopy::IntoBytes;

const WRITE: OpKind = OpKind::Write { fua: false };

fn why(rig: &Rig, queue: &mut async_nvme::IoQueue, operation: async_nvme::Op) -> &'static str {
    let _ = rig;
    match queue.submit(operation).unwrap_err().why {
        RefusedWhy::Invalid(why) => why,
        other => panic!("{other:?}"),
    }
}

/// Blocks numbered from `lba`, each full of its number.
fn fill(rig: &mut Rig, queue: &mut async_nvme::IoQueue, lba: u64, blocks: u64) {
    let buf = rig.pool.alloc(u32::try_from(blocks * 512).unwrap()).unwrap();
    for block in 0..blocks {
        let words: Vec<u8> = std::iter::repeat_n((lba + block).to_le_bytes(), 64).flatten().collect();
        buf.write_from(usize::try_from(block * 512).unwrap(), &words);
    }
    assert_eq!(rig.run(queue, op(0, WRITE, lba, blocks, Some(buf))), Ok(0));
}

fn numbers(rig: &mut Rig, queue: &mut async_nvme::IoQueue, lba: u64, blocks: u64) -> Vec<u64> {
    let buf = rig.pool.alloc(u32::try_from(blocks * 512).unwrap()).unwrap();
    assert_eq!(rig.run(queue, op(0, OpKind::Read, lba, blocks, Some(buf.clone()))), Ok(0));
    let bytes = bytes(&buf);
    bytes.chunks(512).map(|block| u64::from_le_bytes(block[504..].try_into().unwrap())).collect()
}

#[test]
fn a_copy_is_split_by_the_limits_of_the_namespace() {
    // Range, all, ranges zero-based; and how many commands 100 blocks are.
    for (limits, commands) in
        [((128, 1024, 127), 1), ((8, 1024, 127), 1), ((8, 1024, 1), 7), ((7, 20, 127), 5)]
    {
        let mut options = NamespaceOptions::memory(1, 9, 1024);
        options.copy_limits = limits;
        let mut rig = Rig::new(options, ControllerOptions::default());
        rig.start().unwrap();
        let mut queue = rig.queue(2);
        fill(&mut rig, &mut queue, 10, 100);
        let before = queue.stats().commands;
        let copy = OpKind::Copy { to: 500, fua: true };
        assert_eq!(rig.run(&mut queue, op(1, copy, 10, 100, None)), Ok(0));
        // 512 bytes of list are 16 ranges.
        assert_eq!(queue.stats().commands - before, commands, "{limits:?}");
        assert_eq!(numbers(&mut rig, &mut queue, 500, 100), (10..110).collect::<Vec<_>>());
        assert_eq!(numbers(&mut rig, &mut queue, 499, 1), [0]);
        assert_eq!(numbers(&mut rig, &mut queue, 600, 1), [0]);
    }
}

#[test]
fn a_copy_that_cannot_be_is_refused() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(2);
    let copy = |to, lba, blocks| op(1, OpKind::Copy { to, fua: false }, lba, blocks, None);
    assert!(why(&rig, &mut queue, copy(9, 5, 5)).contains("overlap"));
    assert!(why(&rig, &mut queue, copy(5, 9, 5)).contains("overlap"));
    assert!(why(&rig, &mut queue, copy(1020, 0, 5)).contains("leaves the namespace"));
    assert!(why(&rig, &mut queue, copy(u64::MAX, 0, 5)).contains("leaves the namespace"));
    let mut options = NamespaceOptions::memory(1, 9, 1024);
    options.copy_limits = (0, 0, 0);
    let mut rig = Rig::new(options, ControllerOptions::default());
    rig.start().unwrap();
    let mut queue = rig.queue(2);
    assert!(why(&rig, &mut queue, copy(100, 0, 5)).contains("no limits"));
    let options = ControllerOptions { oncs: 0, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 1024), options);
    rig.start().unwrap();
    let mut queue = rig.queue(2);
    for kind in [OpKind::Copy { to: 100, fua: false }, OpKind::Verify, OpKind::Compare, OpKind::Deallocate] {
        assert!(why(&rig, &mut queue, op(1, kind, 0, 1, None)).contains("does not offer"));
    }
}

fn ranges(rig: &Rig, ranges: &[(u64, u32)]) -> hugepage_alloc::DmaBuf {
    let len = u32::try_from(ranges.len().max(1) * 16).unwrap();
    let buf = rig.pool.alloc(len).unwrap();
    for (index, &(lba, blocks)) in ranges.iter().enumerate() {
        let range = DatasetManagementRange { slba: lba.into(), length: blocks.into(), ..Default::default() };
        buf.write_from(index * 16, range.as_bytes());
    }
    buf
}

#[test]
fn several_ranges_are_given_up_at_once() {
    let options = ControllerOptions { dmrl: 3, dmrsl: 10, dmsl: 25, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 1024), options);
    rig.start().unwrap();
    let mut queue = rig.queue(2);
    fill(&mut rig, &mut queue, 1, 99);
    let manage = |buf| op(1, OpKind::DatasetManagement { attributes: dsm::AD }, 0, 0, Some(buf));
    let list = ranges(&rig, &[(5, 2), (20, 10), (50, 1)]);
    assert_eq!(rig.run(&mut queue, manage(list)), Ok(0));
    let gone: Vec<u64> = (1..100).filter(|&lba| numbers(&mut rig, &mut queue, lba, 1) == [0]).collect();
    assert_eq!(gone, [5, 6, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 50]);
    let hint = OpKind::DatasetManagement { attributes: dsm::IDR };
    let list = ranges(&rig, &[(60, 2)]);
    assert_eq!(rig.run(&mut queue, op(2, hint, 0, 0, Some(list))), Ok(0));
    assert_eq!(numbers(&mut rig, &mut queue, 60, 1), [60], "a hint changes nothing");
    for (list, text) in [
        (vec![(0, 1); 4], "more than the controller takes"),
        (vec![(0, 11)], "a range is longer"),
        (vec![(0, 10), (10, 10), (20, 10)], "together longer"),
        (vec![(1020, 5)], "leaves the namespace"),
    ] {
        let list = ranges(&rig, &list);
        let said = why(&rig, &mut queue, manage(list));
        assert!(said.contains(text), "{said}");
    }
    let odd = ranges(&rig, &[(0, 1)]).slice(0, 15);
    assert!(why(&rig, &mut queue, manage(odd)).contains("no ranges"));
    // A single range is split by the same limits.
    let before = queue.stats().commands;
    assert_eq!(rig.run(&mut queue, op(3, OpKind::Deallocate, 0, 100, None)), Ok(0));
    assert_eq!(queue.stats().commands - before, 10);
    assert_eq!(numbers(&mut rig, &mut queue, 0, 100), [0; 100]);
}

#[test]
fn verify_and_write_zeroes_keep_their_own_limits() {
    let options = ControllerOptions { vsl: 1, wzsl: 2, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 1024), options);
    rig.start().unwrap();
    let mut queue = rig.queue(4);
    let zeroes = OpKind::WriteZeroes { deallocate: false, fua: false };
    for (kind, commands) in [(OpKind::Verify, 1024 / 16), (zeroes, 1024 / 32)] {
        let before = queue.stats().commands;
        assert_eq!(rig.run(&mut queue, op(1, kind, 0, 1024, None)), Ok(0));
        assert_eq!(queue.stats().commands - before, commands);
    }
}

#[test]
fn data_may_lie_anywhere_where_sgls_may() {
    for (sgl_by_dwords, odd_taken) in [(false, true), (true, false)] {
        let options = ControllerOptions { sgl: true, sgl_by_dwords, ..ControllerOptions::default() };
        let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 1024), options);
        rig.start().unwrap();
        let mut queue = rig.queue(4);
        let whole = rig.pool.alloc(128 * 512).unwrap();
        for offset in [0usize, 1, 2, 3, 4, 511, 4095, 4096] {
            for blocks in [1u64, 8, 64] {
                let len = usize::try_from(blocks).unwrap() * 512;
                let buf = whole.slice(offset, len);
                let fill: Vec<u8> = (0..len).map(|at| (at * 7 + offset).to_le_bytes()[0]).collect();
                buf.write_from(0, &fill);
                let write = op(1, WRITE, 3, blocks, Some(buf.clone()));
                if offset % 4 != 0 && !odd_taken {
                    assert!(why(&rig, &mut queue, write).contains("multiple of 4"));
                    continue;
                }
                assert_eq!(rig.run(&mut queue, write), Ok(0));
                buf.zero();
                assert_eq!(rig.run(&mut queue, op(2, OpKind::Read, 3, blocks, Some(buf.clone()))), Ok(0));
                assert_eq!(bytes(&buf), fill, "offset {offset}, {blocks} blocks");
            }
        }
    }
}

#[test]
fn queues_are_as_deep_as_the_controller_allows() {
    let options = ControllerOptions { mqes_z: u16::MAX, burst: 5000, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 1024), options);
    rig.start().unwrap();
    for (wanted, got) in [(u16::MAX, 65534), (40_000, 40_000), (4096, 4096)] {
        let mut queue = rig.queue(wanted);
        assert_eq!(queue.depth(), got);
        for round in 0..2u64 {
            for token in 0..got as u64 {
                queue.submit(op(token, OpKind::Verify, (token + round) % 1024, 1, None)).unwrap();
            }
            let full = queue.submit(op(0, OpKind::Flush, 0, 0, None)).unwrap_err();
            assert_eq!(full.why, RefusedWhy::Full);
            let mut seen = vec![false; got];
            let done = rig.collect(&mut queue, got, 10_000);
            for done in done {
                assert_eq!(done.result, Ok(0));
                let place = &mut seen[usize::try_from(done.token).unwrap()];
                assert!(!std::mem::replace(place, true), "{} twice", done.token);
            }
        }
        assert_eq!(queue.stats().violations, 0);
        drop(queue);
        (0..20).for_each(|_| rig.turn());
    }
}

#[test]
fn a_namespace_that_is_write_protected_is_not_written() {
    let mut options = NamespaceOptions::memory(1, 9, 64);
    options.read_only = true;
    let mut rig = Rig::new(options, ControllerOptions::default());
    rig.start().unwrap();
    let mut queue = rig.queue(4);
    let zeroes = OpKind::WriteZeroes { deallocate: false, fua: false };
    for kind in [WRITE, zeroes, OpKind::Deallocate, OpKind::Copy { to: 8, fua: false }] {
        let said = why(&rig, &mut queue, op(1, kind, 0, 1, rig.pool.alloc(512)));
        assert!(said.contains("write protected"), "{said}");
    }
    assert_eq!(rig.run(&mut queue, op(1, OpKind::Read, 0, 1, rig.pool.alloc(512))), Ok(0));
}

#[test]
fn an_error_in_a_piece_is_the_operations_error() {
    use nvme_model::{CommandMatch, Fault, FaultAction};
    let mut options = NamespaceOptions::memory(1, 9, 1024);
    options.copy_limits = (4, 8, 1);
    let mut rig = Rig::new(options, ControllerOptions::default());
    rig.start().unwrap();
    let mut queue = rig.queue(2);
    let status = Status::WRITE_FAULT.with_dnr();
    let fault = Fault::once(CommandMatch::io(0x19), FaultAction::Status(status));
    rig.model.add_fault(Fault { skip: 1, ..fault });
    let copy = OpKind::Copy { to: 500, fua: false };
    assert_eq!(rig.run(&mut queue, op(1, copy, 0, 100, None)), Err(IoError::Status(status)));
    assert!(queue.stats().commands < 100 / 8, "what was not begun is not");
    assert_eq!(queue.outstanding(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: with any limits, a Copy leaves what copying a slice would.
    #[test]
    fn a_copy_is_a_copy(
        range in 1..9u16, all in 1..40u32, ranges_z in 0..5u8, lba in 0..60u64, blocks in 1..60u64, to in 130..200u64,
    ) {
        let mut options = NamespaceOptions::memory(1, 9, 1024);
        options.copy_limits = (range, all, ranges_z);
        let mut rig = Rig::new(options, ControllerOptions::default());
        rig.start().unwrap();
        let mut queue = rig.queue(3);
        fill(&mut rig, &mut queue, 0, 128);
        prop_assert_eq!(rig.run(&mut queue, op(1, OpKind::Copy { to, fua: false }, lba, blocks, None)), Ok(0));
        let expected: Vec<u64> = (lba..lba + blocks).collect();
        prop_assert_eq!(numbers(&mut rig, &mut queue, to, blocks), expected);
        prop_assert_eq!(numbers(&mut rig, &mut queue, to + blocks, 1), [0]);
    }
}
