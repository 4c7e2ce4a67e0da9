//! Fuzz targets: what the kernel tells and what a state directory holds, as any bytes at all. They must not panic.
//! Their corpora, in `tests/corpus/`, are replayed by an ordinary test.

use super::accept::{Violation, violations};
use super::compare::compare;
use super::facts::FileFacts;
use super::fiemap::{RawExtent, parse_page};
use super::identity::{DeviceNumber, FilesystemKind};
use super::record;
use super::survey::to_extents;
use crate::units::{ByteLen, ByteOffset};

/// Takes `data` as an answer of FIEMAP, through parsing, acceptance and comparison.
///
/// # Panics
/// When the parts contradict each other: that is what the fuzzer looks for.
pub fn fuzz_fiemap(data: &[u8]) {
    let mut records = Vec::new();
    if parse_page(data, 0, &mut records).is_err() {
        return;
    }
    let size = ByteLen(records.last().map_or(0, RawExtent::file_end));
    let found = violations(&facts(size), &records);
    let extents = to_extents(&records, ByteOffset(1 << 20), size);
    let comparison = compare(&extents, &records, ByteOffset(1 << 20), size);
    let harmless = |violation: &Violation| !matches!(violation, Violation::NoDisk { .. } | Violation::Empty);
    if !found.iter().any(harmless) {
        let end = |r: &RawExtent| r.device_offset.get().checked_add(r.len.get())?.checked_add(1 << 20);
        let beyond = records.iter().any(|r| end(r).is_none());
        assert!(beyond || comparison.is_equal(), "an accepted map differs from itself: {comparison:?}");
    }
}

/// Takes `data` as a stored pin.
///
/// # Panics
/// When what was read does not survive being written and read again: that is what the fuzzer looks for.
pub fn fuzz_stored_map(data: &[u8]) {
    let head = record::parse_head(data);
    let Ok(pin) = record::parse(data) else { return };
    if let Some(head) = head {
        assert_eq!(head.ok(), Some(pin.clone().into()), "the head of a record is not that of the whole");
    }
    let mut written = Vec::new();
    let again = record::write(&pin, &mut written).ok().and_then(|()| record::parse(&written).ok());
    assert_eq!(again, Some(pin), "a stored pin changed by being stored again");
}

/// An ordinary file of this size, but for its disk.
fn facts(size: ByteLen) -> FileFacts {
    let device = DeviceNumber { major: 259, minor: 0 };
    FileFacts {
        path: "/fuzz".into(),
        not_regular: None,
        size,
        inode: 1,
        inode_generation: 1,
        device,
        filesystem_name: "xfs".to_owned(),
        filesystem: Some(FilesystemKind::Xfs),
        filesystem_uuid: Some([1; 16]),
        filesystem_block_size: 4096,
        disk: Err(Violation::NoDisk { device }),
        immutable: false,
        encrypted: false,
        verity: false,
        dax: false,
        realtime: false,
        swap: false,
        journaled_data: None,
        no_direct_io: false,
    }
}
