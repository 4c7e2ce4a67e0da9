//! The map against what other tools say of the same file, and large maps.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use fastice::extent::{Extent, LookupCursor, RawExtent, StateDir, read_map};
use fastice::units::{ByteLen, ByteOffset};

use super::files::{BOTH, fragmented};
use super::loopfs::{self, Spec};
use super::pin::pinned;

/// File offset, device offset, length.
type Place = (u64, u64, u64);

/// Joins neighbours that are contiguous in file and device, since tools cut extents as they like.
fn joined(places: impl IntoIterator<Item = Place>) -> Vec<Place> {
    let mut all: Vec<Place> = Vec::new();
    for place in places {
        match all.last_mut() {
            Some(last) if last.0 + last.2 == place.0 && last.1 + last.2 == place.1 => last.2 += place.2,
            _ => all.push(place),
        }
    }
    all
}

fn of_extents(extents: &[Extent], partition: u64) -> Vec<Place> {
    joined(extents.iter().map(|e| (e.file_offset.get(), e.device_offset.get() - partition, e.len.get())))
}

fn of_records(records: &[RawExtent]) -> Vec<Place> {
    joined(records.iter().map(|r| (r.file_offset.get(), r.device_offset.get(), r.len.get())))
}

/// `xfs_io fiemap -v` and `bmap -v`: `N: [from..to]: from..to ...` in sectors of 512 bytes.
fn of_xfs_io(path: &Path, what: &str) -> Vec<Place> {
    let text = loopfs::run(Command::new("xfs_io").args(["-r", "-c", what]).arg(path)).unwrap();
    let range = |text: &str| {
        let (from, to) = text.trim_matches(['[', ']', ':']).split_once("..")?;
        Some((from.parse::<u64>().ok()?, to.parse::<u64>().ok()?))
    };
    joined(text.lines().filter_map(|line| {
        let line = line.split_once(": [")?.1;
        let (file, rest) = line.split_once("]:")?;
        let (from, to) = range(file)?;
        let (device, _) = range(rest.split_ascii_whitespace().next()?)?;
        Some((from * 512, device * 512, (to - from + 1) * 512))
    }))
}

/// `filefrag -v -b512`: `N: from.. to: from.. to: length: ...`.
fn of_filefrag(path: &Path) -> Vec<Place> {
    let text = loopfs::run(Command::new("filefrag").args(["-v", "-b512"]).arg(path)).unwrap();
    joined(text.lines().filter_map(|line| {
        let mut fields = line.split(':').map(str::trim);
        fields.next()?.parse::<u64>().ok()?;
        let first = |field: &str| field.split_once("..")?.0.trim().parse::<u64>().ok();
        let (file, device) = (first(fields.next()?)?, first(fields.next()?)?);
        Some((file * 512, device * 512, fields.next()?.parse::<u64>().ok()? * 512))
    }))
}

#[test]
fn other_tools_see_the_same_map() {
    let partitioned = Spec { partition_start: Some(8192), ..Spec::XFS };
    for spec in BOTH.into_iter().chain([partitioned]) {
        let Some(fs) = loopfs::make_or_skip("other tools", &spec) else { return };
        let path = fs.path("file");
        drop(fragmented(&path, 2000, 4096));
        let (identity, records) = read_map(&path).unwrap();
        let records = of_records(&records);
        let mut tools = vec![("filefrag", of_filefrag(&path)), ("fiemap", of_xfs_io(&path, "fiemap -v"))];
        if spec.kind == "xfs" {
            tools.push(("bmap", of_xfs_io(&path, "bmap -v")));
        }
        let partition = identity.disk.partition_start.get();
        let file = pinned(&fs, &path);
        assert_eq!(of_extents(file.map().extents(), partition), records);
        file.release().unwrap();
        for (tool, told) in tools {
            assert_eq!(told, records, "{tool} on {}", spec.kind);
        }
        if spec.kind == "xfs" {
            assert!(records.len() >= 1000, "only {} extents", records.len());
        }
    }
}

#[test]
fn a_file_of_many_extents_is_pinned_looked_up_and_adopted() {
    let spec = Spec { mkfs: &["-q", "-m", "reflink=1", "-b", "size=1024"], size_mib: 4096, ..Spec::XFS };
    let Some(fs) = loopfs::make_or_skip("100k extents", &spec) else { return };
    let path = fs.path("file");
    // A million takes minutes to make, most of it in the filesystem: `FASTICE_TEST_EXTENTS=1000000`.
    let blocks = std::env::var("FASTICE_TEST_EXTENTS").map_or(100_000, |text| text.parse().unwrap());
    drop(fragmented(&path, blocks, 1024));
    let start = Instant::now();
    let file = pinned(&fs, &path);
    let took = start.elapsed();
    let count = file.map().extent_count();
    println!("{count} extents pinned in {took:?}");
    assert!(count as u64 >= blocks, "only {count} extents");
    let mut cursor = LookupCursor::default();
    let len = ByteLen(blocks * 1024);
    let whole: u64 = file
        .map()
        .segments(&mut cursor, ByteOffset(0), len)
        .unwrap()
        .map(|segment| {
            file.map().check(&segment).unwrap();
            segment.len.get()
        })
        .sum();
    assert_eq!(whole, len.get());
    assert!(file.verify().unwrap().is_sound());
    file.keep();
    let again = pinned(&fs, &path);
    assert_eq!(again.map().extent_count(), count);
    again.release().unwrap();
    assert_eq!(StateDir::open(fs.outside()).unwrap().records().unwrap().len(), 0);
    assert!(took.as_secs() < 20, "pinning {count} extents took {took:?}");
}
