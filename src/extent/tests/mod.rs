//! Unit and property tests of the parts together: maps against naive models.

mod records;

use std::io::Write as _;

use proptest::prelude::*;

use super::compare::Place;
use super::fiemap::{FiemapFlags, RawExtent};
use super::lookup::LookupHint;
use super::map::validate;
use super::stretches::Stretch;
use super::survey::{fit_part, joined, to_extents};
use super::*;
use crate::units::{BlockSize, ByteLen, ByteOffset};
use records::stored;

const BLOCK: u64 = 512;
const PARTITION: u64 = 1 << 20;

pub(super) fn identity(size: u64) -> MapIdentity {
    MapIdentity {
        path: "/srv/images/\u{1f9ca} a\\b.img".into(),
        inode: 131,
        inode_generation: 0xDEAD_BEEF,
        size: ByteLen(size),
        reserved: ByteLen(0),
        filesystem: FilesystemIdentity {
            kind: FilesystemKind::Xfs,
            uuid: *b"0123456789abcdef",
            block_size: 4096,
            device: DeviceNumber { major: 259, minor: 2 },
        },
        disk: DiskIdentity {
            number: DeviceNumber { major: 259, minor: 0 },
            name: "nvme0n1".to_owned(),
            node: "/dev/nvme0n1".into(),
            size: ByteLen(1 << 44),
            logical_block_size: BlockSize::B512,
            partition_start: ByteOffset(PARTITION),
            partition_len: ByteLen((1 << 44) - PARTITION),
            serial: Some("S3R1AL".to_owned()),
            wwid: Some("eui.0001".to_owned()),
            model: None,
            nguid: None,
            eui64: None,
            uuid: None,
            nsid: Some(1),
        },
    }
}

/// Extents of these lengths in blocks, laid on the disk in the order of the given ranks, one block apart.
fn extents(lens_and_ranks: &[(u64, u32)]) -> Vec<Extent> {
    let mut order: Vec<usize> = (0..lens_and_ranks.len()).collect();
    order.sort_by_key(|at| lens_and_ranks[*at].1);
    let mut device = vec![0; lens_and_ranks.len()];
    let mut at = PARTITION + BLOCK;
    for index in order {
        device[index] = at;
        at += (lens_and_ranks[index].0 + 1) * BLOCK;
    }
    let mut file_offset = 0;
    let mut made = Vec::new();
    for ((blocks, _), device_offset) in lens_and_ranks.iter().zip(device) {
        let (file, len) = (ByteOffset(file_offset), ByteLen(blocks * BLOCK));
        made.push(Extent { file_offset: file, device_offset: ByteOffset(device_offset), len });
        file_offset += len.get();
    }
    made
}

fn map_of(extents: Vec<Extent>) -> FrozenMap {
    reserving(extents, 0)
}

/// A map whose first `reserved` bytes are not served.
fn reserving(extents: Vec<Extent>, reserved: u64) -> FrozenMap {
    let size = extents.iter().map(|extent| extent.len.get()).sum();
    let identity = MapIdentity { reserved: ByteLen(reserved), ..identity(size) };
    FrozenMap::from_extents(identity, 1, extents).unwrap()
}

fn layouts() -> impl Strategy<Value = Vec<Extent>> {
    // Some large ones among small ones, which then crowd; so few that no lookup is prefetched, and more.
    let len = prop_oneof![9 => 1..9_u64, 1 => 100..3000_u64];
    proptest::collection::vec((len, any::<u32>()), 1..120).prop_map(|layout| extents(&layout))
}

/// Block by block: device block and extent index.
fn model(extents: &[Extent]) -> Vec<(u64, u32)> {
    let mut blocks = Vec::new();
    for (index, extent) in extents.iter().enumerate() {
        for block in 0..extent.len.get() / BLOCK {
            blocks.push((extent.device_offset.get() / BLOCK + block, u32::try_from(index).unwrap()));
        }
    }
    blocks
}

proptest! {
    #[test]
    fn a_file_that_is_read_in_stretches_has_the_extents_that_it_has_as_a_whole(
        layout in layouts(),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20),
        stretches in proptest::collection::vec(any::<prop::sample::Index>(), 0..5),
        unfit in proptest::option::of(any::<prop::sample::Index>()),
        missing in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let blocks = model(&layout).len();
        let mut living = records(&layout);
        for cut in cuts {
            split(&mut living, cut.index(blocks) as u64 * BLOCK);
        }
        if let Some(unfit) = unfit {
            unfit.get_mut(&mut living).flags |= FiemapFlags::SHARED;
        }
        if let Some(missing) = missing {
            living.remove(missing.index(living.len()));
        }
        let size = blocks as u64 * BLOCK;
        let mut ends: Vec<_> = stretches.iter().map(|cut| cut.index(blocks) as u64 * BLOCK).collect();
        ends.extend([0, size]);
        ends.sort_unstable();
        let parts = ends.windows(2).map(|cut| {
            let stretch = Stretch { start: cut[0], end: cut[1] };
            // As FIEMAP gives them: whole, where they reach into the stretch.
            let asked = living.iter().filter(|r| r.file_end() > cut[0]).copied();
            fit_part(stretch, ByteOffset(PARTITION), asked, |r| !r.flags.contains(FiemapFlags::SHARED))
        });
        let is_whole = living.iter().map(|r| r.len.get()).sum::<u64>() == size;
        let is_fit = living.iter().all(|r| !r.flags.contains(FiemapFlags::SHARED));
        prop_assert_eq!(joined(parts.collect()), (is_whole && is_fit).then_some(layout));
    }

    #[test]
    fn lookup_says_what_the_naive_model_says(
        layout in layouts(),
        ranges in proptest::collection::vec((any::<prop::sample::Index>(), 0..30_u64), 1..20),
    ) {
        let model = model(&layout);
        let map = map_of(layout);
        let mut cursor = LookupCursor::default();
        for (start, blocks) in ranges {
            let start = start.index(model.len());
            let (offset, len) = (ByteOffset(start as u64 * BLOCK), ByteLen(blocks * BLOCK));
            let fits = start as u64 + blocks <= model.len() as u64;
            // What needs one segment gets the same one in one step, whatever the cursor guesses; and nothing else does.
            for index in [0, cursor.index, map.extent_count() - 1, usize::MAX] {
                let all = map.segments(&mut cursor, offset, len).map(Iterator::collect::<Vec<_>>);
                let expected = all.ok().and_then(|all| <[Segment; 1]>::try_from(all).ok());
                let expected = expected.map(|[segment]| segment);
                // Whatever is hinted: nothing, this byte, another one, or what no map has.
                for hint in [LookupHint::NONE, map.prefetch(offset), map.prefetch(ByteOffset(0)), LookupHint::window(index)] {
                    let mut guess = LookupCursor { index };
                    prop_assert_eq!(map.segment(&mut guess, hint, offset, len), expected);
                }
            }
            let Ok(segments) = map.segments(&mut cursor, offset, len) else {
                prop_assert!(!fits);
                continue;
            };
            prop_assert!(fits);
            let mut at = start;
            for segment in segments {
                prop_assert_eq!(map.check(&segment), Ok(()));
                prop_assert_eq!(segment.file_offset.get(), at as u64 * BLOCK);
                prop_assert!(segment.len.get() > 0);
                for block in 0..segment.len.get() / BLOCK {
                    let expected = (segment.device_offset.get() / BLOCK + block, segment.extent_index);
                    prop_assert_eq!(model[at], expected);
                    at += 1;
                }
            }
            prop_assert_eq!(at as u64, start as u64 + blocks);
        }
    }

    #[test]
    fn what_is_reserved_is_no_part_of_what_is_served(
        layout in layouts(),
        reserved in any::<prop::sample::Index>(),
        ranges in proptest::collection::vec((any::<prop::sample::Index>(), 1..30_u64), 1..20),
    ) {
        let whole = map_of(layout.clone());
        let blocks = whole.len().get() / BLOCK;
        prop_assume!(blocks > 1);
        let reserved = (1 + reserved.index(usize::try_from(blocks).unwrap() - 1) as u64) * BLOCK;
        let map = reserving(layout, reserved);
        prop_assert_eq!(map.len().get() + reserved, whole.len().get());
        prop_assert_ne!(map.checksum(), whole.checksum());
        let (mut cursor, mut other) = (LookupCursor::default(), LookupCursor::default());
        for (start, count) in ranges {
            let start = start.index(usize::try_from(blocks).unwrap()) as u64 * BLOCK;
            let len = ByteLen(count * BLOCK);
            let from_file: Result<Vec<_>, _> =
                whole.segments(&mut cursor, ByteOffset(start + reserved), len).map(Iterator::collect);
            let served = map.segments(&mut other, ByteOffset(start), len).map(Iterator::collect);
            prop_assert_eq!(served.is_ok(), start + len.get() <= map.len().get());
            // In one step it is the same.
            let at = ByteOffset(start);
            let whole_one = served.as_ref().ok().and_then(|all: &Vec<Segment>| <[Segment; 1]>::try_from(&**all).ok());
            prop_assert_eq!(map.segment(&mut other, map.prefetch(at), at, len), whole_one.map(|[segment]| segment));
            prop_assert_eq!(served.ok(), from_file.ok(), "the same bytes of the file, counted from behind the reserve");
        }
        // Whatever a lookup may say: no segment that begins in it passes.
        for segment in whole.segments(&mut cursor, ByteOffset(0), whole.len()).unwrap() {
            for at in (0..segment.len.get()).step_by(512) {
                let piece = Segment {
                    file_offset: ByteOffset(segment.file_offset.get() + at),
                    device_offset: ByteOffset(segment.device_offset.get() + at),
                    len: ByteLen(segment.len.get() - at),
                    ..segment
                };
                prop_assert_eq!(map.check(&piece).is_ok(), piece.file_offset.get() >= reserved);
                prop_assert_eq!(map.served_offset(piece.file_offset).is_some(), piece.file_offset.get() >= reserved);
            }
        }
    }

    #[test]
    fn check_accepts_a_segment_only_if_every_block_of_it_is_in_the_model(
        layout in layouts(),
        start in any::<prop::sample::Index>(),
        changes in [-6_i64..7, -6..7, -6..7, -2..3],
        fine in [0..3_i64, 0..3, 0..3],
    ) {
        let model = model(&layout);
        let map = map_of(layout);
        let start = ByteOffset(start.index(model.len()) as u64 * BLOCK);
        let mut cursor = LookupCursor::default();
        let segment = map.segments(&mut cursor, start, ByteLen(BLOCK)).unwrap().next().unwrap();
        let change = |value: u64, at: usize| value.wrapping_add_signed(changes[at] * 512 + fine[at] / 2);
        let tampered = Segment {
            file_offset: ByteOffset(change(segment.file_offset.get(), 0)),
            device_offset: ByteOffset(change(segment.device_offset.get(), 1)),
            len: ByteLen(change(segment.len.get(), 2)),
            extent_index: segment.extent_index.wrapping_add_signed(i32::try_from(changes[3]).unwrap()),
        };
        prop_assert_eq!(map.check(&tampered).is_ok(), is_true(&model, &tampered), "{:?}", tampered);
    }

    #[test]
    fn how_records_are_cut_does_not_matter_to_a_comparison(
        layout in layouts(),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20),
        moved in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let blocks = model(&layout);
        let size = ByteLen(blocks.len() as u64 * BLOCK);
        let mut living = records(&layout);
        for cut in cuts {
            split(&mut living, cut.index(blocks.len()) as u64 * BLOCK);
        }
        prop_assert_eq!(to_extents(&living, ByteOffset(PARTITION), size), layout.clone());
        // What lies beyond the size is nobody's business.
        let beyond = RawExtent { file_offset: ByteOffset(size.get() + BLOCK), ..record_at(0, FiemapFlags::UNWRITTEN) };
        living.push(beyond);
        if let Some(moved) = moved {
            let at = moved.index(blocks.len()) as u64 * BLOCK;
            split(&mut living, at);
            split(&mut living, at + BLOCK);
            let block = living.iter_mut().find(|record| record.file_offset.get() == at).unwrap();
            block.device_offset = ByteOffset(block.device_offset.get() + (1 << 30));
            let result = compare(&layout, &living, ByteOffset(PARTITION), size);
            prop_assert_eq!(result.differing, ByteLen(BLOCK));
            prop_assert_eq!(result.first.unwrap().file_offset, ByteOffset(at));
        } else {
            prop_assert!(compare(&layout, &living, ByteOffset(PARTITION), size).is_equal());
        }
    }
}

fn is_true(model: &[(u64, u32)], segment: &Segment) -> bool {
    let Segment { file_offset, device_offset, len, extent_index } = *segment;
    let whole = [file_offset.get(), device_offset.get(), len.get()].iter().all(|value| value % BLOCK == 0);
    let (first, count) = (file_offset.get() / BLOCK, len.get() / BLOCK);
    whole
        && count > 0
        && (0..count).all(|block| {
            let at = usize::try_from(first + block).ok();
            let expected = (device_offset.get() / BLOCK + block, extent_index);
            at.and_then(|at| model.get(at)) == Some(&expected)
        })
}

fn record_at(file_offset: u64, flags: FiemapFlags) -> RawExtent {
    let device_offset = ByteOffset(1 << 30);
    RawExtent { file_offset: ByteOffset(file_offset), device_offset, len: ByteLen(BLOCK), flags }
}

fn records(extents: &[Extent]) -> Vec<RawExtent> {
    let record = |extent: &Extent| RawExtent {
        file_offset: extent.file_offset,
        device_offset: ByteOffset(extent.device_offset.get() - PARTITION),
        len: extent.len,
        flags: FiemapFlags::MERGED,
    };
    extents.iter().map(record).collect()
}

/// Cuts the record that holds file offset `at` in two there.
fn split(records: &mut Vec<RawExtent>, at: u64) {
    let Some(index) = records.iter().position(|r| r.file_offset.get() < at && at < r.file_end()) else {
        return;
    };
    let head = at - records[index].file_offset.get();
    let mut tail = records[index];
    tail.file_offset = ByteOffset(at);
    tail.device_offset = ByteOffset(tail.device_offset.get() + head);
    tail.len = ByteLen(tail.len.get() - head);
    records[index].len = ByteLen(head);
    records.insert(index + 1, tail);
}

#[test]
fn a_reserve_must_be_whole_blocks_and_leave_something() {
    let layout = extents(&[(4, 0)]);
    for (reserved, fits) in [(0, true), (BLOCK, true), (3 * BLOCK, true), (4 * BLOCK, false), (100, false)] {
        let identity = MapIdentity { reserved: ByteLen(reserved), ..identity(4 * BLOCK) };
        assert_eq!(validate(&identity, &layout).is_ok(), fits, "{reserved}");
    }
}

#[test]
fn sealed_memory_that_fills_huge_pages_has_the_same_content() {
    let [front, behind] = [(2 << 20) + 4097, (1 << 21) - 1]
        .map(|len: usize| (0..len).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect::<Vec<_>>());
    let memory = sys::SealedMemory::seal(&[&front, &behind]).unwrap();
    assert!(memory.bytes().iter().eq(front.iter().chain(&behind)));
    memory.collapse();
    assert!(memory.bytes().iter().eq(front.iter().chain(&behind)));
    let mut file = std::fs::File::from(memory.file().try_clone_to_owned().unwrap());
    assert!(file.write_all(b"x").is_err(), "sealed all the same");
}

#[test]
fn sealed_memory_can_be_changed_by_nobody() {
    let memory = sys::SealedMemory::seal(&[b"the ", b"map"]).unwrap();
    let mut file = std::fs::File::from(memory.file().try_clone_to_owned().unwrap());
    assert_eq!(file.write(b"x").unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert_eq!(file.set_len(1).unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert_eq!(file.set_len(1 << 20).unwrap_err().raw_os_error(), Some(libc::EPERM));
    let more = rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE);
    assert_eq!(more, Err(rustix::io::Errno::PERM));
    assert_eq!(memory.bytes(), b"the map");
}

#[test]
fn lists_that_are_no_map_are_refused_by_name() {
    let good = extents(&[(2, 1), (2, 0), (2, 2)]);
    assert_eq!(validate(&identity(6 * BLOCK), &good), Ok(()));
    type Spoil = fn(&mut Vec<Extent>);
    type Expected = fn(&MapFault) -> bool;
    let faults: [(Spoil, Expected); 9] = [
        (Vec::clear, |fault| matches!(fault, MapFault::Empty)),
        (|list| list[1].file_offset.0 += BLOCK, |fault| matches!(fault, MapFault::Gap { .. })),
        (|list| list[1].file_offset.0 -= BLOCK, |fault| matches!(fault, MapFault::OverlapInFile { .. })),
        (|list| list[1].device_offset.0 += 8, |fault| matches!(fault, MapFault::Misaligned { .. })),
        (|list| list[2].len.0 = 0, |fault| matches!(fault, MapFault::Misaligned { .. })),
        (
            |list| list[1].device_offset.0 = PARTITION - BLOCK,
            |fault| matches!(fault, MapFault::OutsideDevice { .. }),
        ),
        (
            |list| list[2].device_offset.0 = u64::MAX - 511,
            |fault| matches!(fault, MapFault::OutsideDevice { .. }),
        ),
        (|list| list.truncate(2), |fault| matches!(fault, MapFault::WrongLength { .. })),
        (
            |list| list[2].device_offset.0 = list[0].device_offset.0 + BLOCK,
            |fault| matches!(fault, MapFault::OverlapOnDevice { .. }),
        ),
    ];
    for (at, (spoil, expected)) in faults.into_iter().enumerate() {
        let mut list = good.clone();
        spoil(&mut list);
        let fault = validate(&identity(6 * BLOCK), &list).unwrap_err();
        assert!(expected(&fault), "case {at}: {fault:?}");
    }
    let mut outside = identity(6 * BLOCK);
    outside.disk.partition_start = ByteOffset(1 << 44);
    assert_eq!(validate(&outside, &good), Err(MapFault::PartitionOutsideDisk));
}

#[test]
fn ranges_that_the_map_cannot_serve_are_refused() {
    let map = map_of(extents(&[(2, 0)]));
    let mut cursor = LookupCursor::default();
    for (offset, len) in [(0, 1536), (1024, 512), (u64::MAX, 2), (1 << 63, 1 << 63)] {
        let result = map.segments(&mut cursor, ByteOffset(offset), ByteLen(len));
        assert!(matches!(result, Err(LookupError::OutOfRange { .. })), "{offset} {len}");
        assert_eq!(map.segment(&mut cursor, LookupHint::NONE, ByteOffset(offset), ByteLen(len)), None);
    }
    for (offset, len) in [(1, 512), (0, 511)] {
        let result = map.segments(&mut cursor, ByteOffset(offset), ByteLen(len));
        assert!(matches!(result, Err(LookupError::Misaligned { .. })), "{offset} {len}");
        assert_eq!(map.segment(&mut cursor, LookupHint::NONE, ByteOffset(offset), ByteLen(len)), None);
    }
    assert_eq!(map.segments(&mut cursor, ByteOffset(1024), ByteLen(0)).unwrap().count(), 0);
    let mut of_4k = identity(8192);
    of_4k.disk.logical_block_size = BlockSize::B4096;
    let extent = Extent { device_offset: ByteOffset(PARTITION), len: ByteLen(8192), ..Extent::default() };
    let map = FrozenMap::from_extents(of_4k, 1, [extent]).unwrap();
    for (offset, len, is_served) in [(4096, 4096, true), (512, 4096, false), (0, 512, false)] {
        let (offset, len) = (ByteOffset(offset), ByteLen(len));
        assert_eq!(map.segments(&mut cursor, offset, len).is_ok(), is_served);
        assert_eq!(map.segment(&mut cursor, LookupHint::NONE, offset, len).is_some(), is_served);
    }
}

#[test]
fn the_checksum_is_of_the_layout_and_not_of_names() {
    let layout = extents(&[(2, 1), (2, 0)]);
    let of = |identity, layout: &[Extent]| {
        FrozenMap::from_extents(identity, 1, layout.to_vec()).unwrap().checksum()
    };
    let base = of(identity(4 * BLOCK), &layout);
    let mut renamed = identity(4 * BLOCK);
    renamed.path = "/elsewhere".into();
    renamed.disk.name = "nvme1n1".into();
    renamed.filesystem.device.minor = 77;
    assert_eq!(of(renamed, &layout), base);
    let mut other = identity(4 * BLOCK);
    other.inode_generation += 1;
    assert_ne!(of(other, &layout), base);
    assert_ne!(of(identity(4 * BLOCK), &extents(&[(2, 0), (2, 1)])), base);
}

#[test]
fn differences_say_what_was_and_what_is() {
    let layout = extents(&[(2, 0)]);
    let size = ByteLen(2 * BLOCK);
    let mut living = records(&layout);
    living[0].flags |= FiemapFlags::SHARED;
    let difference = compare(&layout, &living, ByteOffset(PARTITION), size).first.unwrap();
    assert!(difference.to_string().contains("flagged SHARED"), "{difference}");
    let difference = compare(&layout, &[], ByteOffset(PARTITION), size).first.unwrap();
    assert_eq!(difference.living, Place::Hole);
    assert!(difference.to_string().ends_with("now nowhere"), "{difference}");
    let wrapped = RawExtent { device_offset: ByteOffset(u64::MAX - 1024), ..living[0] };
    assert!(!compare(&layout, &[wrapped], ByteOffset(PARTITION), size).is_equal());
}

#[test]
fn a_million_extents_are_frozen_looked_up_and_stored() {
    const COUNT: u32 = 1_000_000;
    // Ranks by a multiplicative hash: a file as fragmented as can be.
    let layout: Vec<(u64, u32)> = (0..COUNT).map(|at| (1, at.wrapping_mul(2_654_435_761))).collect();
    let layout = extents(&layout);
    let map = map_of(layout.clone());
    assert_eq!(map.extent_count(), COUNT as usize);
    let mut cursor = LookupCursor::default();
    let mut at = 1_u64;
    for _ in 0..200_000 {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let block = (at >> 33) % u64::from(COUNT - 4);
        for segment in map.segments(&mut cursor, ByteOffset(block * BLOCK), ByteLen(4 * BLOCK)).unwrap() {
            map.check(&segment).unwrap();
            let index = usize::try_from(segment.file_offset.get() / BLOCK).unwrap();
            assert_eq!(segment.device_offset, layout[index].device_offset);
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let state = StateDir::open(directory.path().join("state")).unwrap();
    let pin = stored(layout, 1, true);
    state.store(&pin).unwrap();
    assert_eq!(state.load(&pin.identity.key()).unwrap().unwrap(), pin);
}
