//! Stored pins: whatever is written is read again, and whatever is damaged is seen. The directory that keeps them.

use proptest::prelude::*;

use super::super::record;
use super::super::*;
use super::{BLOCK, extents, layouts, map_of, reserving};

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

pub(super) fn stored(layout: Vec<Extent>, generation: u64, frozen: bool) -> StoredPin {
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
