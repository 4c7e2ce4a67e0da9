//! Unit and property tests of the parts together: maps against naive models, stored pins against damage.

use std::io::Write as _;

use proptest::prelude::*;

use super::compare::Place;
use super::fiemap::{FiemapFlags, RawExtent};
use super::map::validate;
use super::record;
use super::stretches::Stretch;
use super::survey::{fit_part, joined, to_extents};
use super::*;
use crate::units::{BlockSize, ByteLen, ByteOffset};

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
    // Some large ones among small ones, which then crowd.
    let len = prop_oneof![9 => 1..9_u64, 1 => 100..3000_u64];
    proptest::collection::vec((len, any::<u32>()), 1..40).prop_map(|layout| extents(&layout))
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
    fn records_of_every_version_are_read(layout in layouts(), generation in 1..100_u64, frozen in any::<bool>()) {
        let pin = stored(layout, generation, frozen);
        for version in 1..=2 {
            let mut bytes = Vec::new();
            record::write_as(version, &pin, &mut bytes).unwrap();
            prop_assert_eq!(&record::parse(&bytes).unwrap(), &pin, "version {}", version);
        }
        // What is written extent by extent is what the fields come to.
        let mut field_by_field = Vec::new();
        record::write_as(2, &pin, &mut field_by_field).unwrap();
        prop_assert_eq!(written(&pin), field_by_field);
    }

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

    #[test]
    fn stored_pins_survive_being_stored(layout in layouts(), generation in any::<u64>(), frozen in any::<bool>()) {
        let pin = stored(layout, generation, frozen);
        let bytes = written(&pin);
        prop_assert_eq!(record::parse(&bytes).unwrap(), pin);
    }
}

proptest! {
    #[test]
    fn the_head_of_a_stored_pin_is_told_by_as_much_as_reaches_to_the_extents(
        layout in layouts(), frozen in any::<bool>(), part in 0_usize..=100,
    ) {
        let pin = stored(layout, 1, frozen);
        let bytes = written(&pin);
        let text = String::from_utf8(bytes.clone()).unwrap();
        let reach = text.find("\"extents\": [").map(|at| at + "\"extents\": [".len());
        let cut = bytes.len() * part / 100;
        let head = record::parse_head(&bytes[..cut]).transpose().unwrap();
        prop_assert_eq!(head, reach.filter(|reach| cut >= *reach).map(|_| pin.into()));
    }
}

#[test]
fn a_head_is_proven_whatever_follows_it() {
    let pin = stored(extents(&[(1, 0), (2, 1)]), 1, true);
    let text = String::from_utf8(written(&pin)).unwrap();
    let (front, behind) = text.split_at(text.find("\"extents\": [").unwrap() + 12);
    let head = |text: String| record::parse_head(text.as_bytes());
    assert_eq!(head(format!("{front}, nonsense")).unwrap().unwrap(), pin.clone().into());
    let other = front.replace("4711", "4712");
    assert!(matches!(head(other.clone()), Some(Err(StateProblem::Checksum))));
    assert!(matches!(record::parse((other + behind).as_bytes()), Err(StateProblem::Checksum)));
    let newer = front.replace("\"version\": 2", "\"version\": 3");
    assert!(matches!(head(newer), Some(Err(StateProblem::Version { found: 3, .. }))));
    // All of these take the whole document.
    let mut first = Vec::new();
    record::write_as(1, &pin, &mut first).unwrap();
    assert!(record::parse_head(&first).is_none(), "its only checksum covers the extents too");
    assert!(head(front.replace("\"kept\"", "\"later\"")).is_none());
    assert!(record::parse_head(&written(&stored(extents(&[(1, 0)]), 1, false))).is_none(), "there is no map");
}

#[test]
fn a_record_is_found_by_its_head_and_believed_when_it_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let state = StateDir::open(directory.path()).unwrap();
    let pin = stored(extents(&[(1, 0), (2, 1)]), 1, true);
    let dead = Owner { pid: u32::MAX, ..Owner::this_process() };
    let place = |name: &str| state.path().join(name);
    state.store(&StoredPin { owner: dead.clone(), ..pin.clone() }).unwrap();
    let path = place(&format!("{}.json", pin.identity.key()));
    assert_eq!(state.record_at(&pin.identity.path).unwrap().unwrap().identity, pin.identity);
    assert_eq!(state.last_owners_at(&pin.identity.path).unwrap(), [], "it left nothing on a device");
    std::fs::create_dir_all(state.processes()).unwrap();
    let mark = state.processes().join(format!("{}-{}-0.places", dead.pid, dead.start_time_ticks));
    std::fs::write(mark, "{}").unwrap();
    assert_eq!(state.last_owners_at(&pin.identity.path).unwrap(), std::slice::from_ref(&dead));
    // Whatever became of the extents, its head says whose it was; but nothing else is done by what it says.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(2 << 30).unwrap();
    assert_eq!(state.last_owners_at(&pin.identity.path).unwrap(), [dead]);
    assert_eq!(state.record_at(&pin.identity.path).unwrap(), None);
    assert_eq!(state.record_by_path(&pin.identity.path).unwrap(), None);
    let records = state.records().unwrap();
    assert!(matches!(&records[..], [Err(ExtentError::State { problem: StateProblem::TooLarge { .. }, .. })]));
    assert!(matches!(&orphans(&state).unwrap()[..], [Orphan { path: None, .. }]), "it is told all the same");
    assert_eq!(left_behind(&state).unwrap(), [pin.identity.path]);
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

fn stored(layout: Vec<Extent>, generation: u64, frozen: bool) -> StoredPin {
    let map = map_of(layout);
    StoredPin {
        kept: false,
        guard: GuardMode::Default,
        local_readers: LocalReaders::Refuse,
        header_written: false,
        update_mtime: false,
        identity: map.identity().clone(),
        generation,
        owner: Owner { pid: 4711, start_time_ticks: 99, boot_id: "b00t".to_owned() },
        immutable_was_set_before: false,
        map: frozen.then(|| StoredMap::from(&map)),
    }
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
fn records_of_the_default_guards_are_those_of_releases_that_knew_no_others() {
    let pin = stored(extents(&[(20, 1), (4, 0)]), 2, true);
    let text = String::from_utf8(written(&pin)).unwrap();
    for word in ["guard", "header_written", "update_mtime", "reserved", "local_readers"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
    let map = reserving(pin.map.as_ref().unwrap().extents.clone(), 16 * BLOCK);
    let swap = StoredPin {
        guard: GuardMode::SwapFile,
        local_readers: LocalReaders::Allow,
        header_written: true,
        identity: map.identity().clone(),
        map: Some(StoredMap::from(&map)),
        ..pin
    };
    let bytes = written(&swap);
    assert_eq!(record::parse(&bytes).unwrap(), swap);
    let less = String::from_utf8(bytes).unwrap().replace("\"reserved\": 8192", "\"reserved\": 4096");
    assert!(record::parse(less.as_bytes()).is_err(), "the checksum is over the reserve too");
}

fn written(pin: &StoredPin) -> Vec<u8> {
    let mut bytes = Vec::new();
    record::write(pin, &mut bytes).unwrap();
    bytes
}

#[test]
fn any_changed_byte_of_a_stored_pin_is_detected_or_harmless() {
    let pin = stored(extents(&[(3, 7), (1, 2), (8, 5)]), 3, true);
    let bytes = written(&pin);
    let mut harmless = 0;
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            if let Ok(read) = record::parse(&changed) {
                assert_eq!(read, pin, "byte {at} bit {bit}");
                harmless += 1;
            }
        }
    }
    // Blanks for other blanks, and letters of equal meaning in escapes: a small part.
    assert!(harmless * 20 < bytes.len() * 8, "{harmless} of {}", bytes.len() * 8);
}

#[test]
fn a_stored_pin_cut_anywhere_is_an_error() {
    let bytes = written(&stored(extents(&[(3, 7), (1, 2)]), 3, true));
    // The last byte is the newline.
    for len in 0..bytes.len() - 1 {
        assert!(record::parse(&bytes[..len]).is_err(), "{len}");
    }
}

#[test]
fn stored_pins_of_other_versions_say_so() {
    let text = String::from_utf8(written(&stored(extents(&[(1, 0)]), 1, true))).unwrap();
    let newer = text.replace("\"version\": 2", "\"version\": 3, \"more\": []");
    let error = record::parse(newer.as_bytes()).unwrap_err();
    assert!(matches!(error, StateProblem::Version { found: 3, known: 2 }), "{error}");
    let older = text.replace("\"version\": 2", "\"version\": 0");
    assert!(matches!(record::parse(older.as_bytes()), Err(StateProblem::Version { found: 0, .. })));
    // The versions have different checksums, so none is taken for another.
    let mistaken = text.replace("\"version\": 2", "\"version\": 1");
    assert!(matches!(record::parse(mistaken.as_bytes()), Err(StateProblem::Checksum)));
    let other = text.replace("fastice-pin", "fastice-pig");
    assert!(matches!(record::parse(other.as_bytes()), Err(StateProblem::Malformed(_))));
}

#[test]
fn a_stored_pin_can_be_read_by_a_person() {
    let text = String::from_utf8(written(&stored(extents(&[(3, 7), (1, 2)]), 3, true))).unwrap();
    insta::assert_snapshot!(text);
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
    }
    for (offset, len) in [(1, 512), (0, 511)] {
        let result = map.segments(&mut cursor, ByteOffset(offset), ByteLen(len));
        assert!(matches!(result, Err(LookupError::Misaligned { .. })), "{offset} {len}");
    }
    assert_eq!(map.segments(&mut cursor, ByteOffset(1024), ByteLen(0)).unwrap().count(), 0);
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

#[test]
fn the_state_directory_keeps_generations_beyond_the_records() {
    let directory = tempfile::tempdir().unwrap();
    let state = StateDir::open(directory.path().join("a/state")).unwrap();
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(state.path()).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    let pin = stored(extents(&[(1, 0)]), 7, true);
    let key = pin.identity.key();
    assert_eq!(state.next_generation(&key).unwrap(), 1);
    state.store(&pin).unwrap();
    state.store(&StoredPin { generation: 3, ..pin.clone() }).unwrap();
    assert_eq!(state.records().unwrap().len(), 1);
    state.remove(&key).unwrap();
    state.remove(&key).unwrap();
    assert!(state.load(&key).unwrap().is_none());
    assert_eq!(state.next_generation(&key).unwrap(), 8);
    std::fs::write(state.path().join(format!("{key}.json")), b"{").unwrap();
    let records = state.records().unwrap();
    assert_eq!(records[0].as_ref().unwrap_err().kind(), ExtentErrorKind::State);
}

#[test]
fn a_pin_lock_names_its_owner_until_it_goes() {
    let directory = tempfile::tempdir().unwrap();
    let state = StateDir::open(directory.path()).unwrap();
    assert_eq!(state.holder("key").unwrap(), None);
    let lock = state.lock_pin("key").unwrap().unwrap();
    assert_eq!(state.holder("key").unwrap(), Some(Owner::this_process()));
    assert_eq!(state.lock_pin("key").unwrap().unwrap_err(), Owner::this_process());
    drop(lock);
    assert_eq!(state.holder("key").unwrap(), None);
}
