//! A filesystem of which every block is accounted for.
//!
//! ```text
//!   | file | neighbour | file | neighbour | ...    16 KiB each      | filler: all that is left but a reserve | reserve |
//! ```
//!
//! Neighbours hold a pattern of their own. The filler was never written and is all zeros. Whoever is given freed blocks,
//! the [thief](super::thief), takes the reserve and them, and holds another pattern. A block of a remote host says which run
//! it is of and where it belongs, so that a scan of the raw disk finds each one that is elsewhere: in another file, in free
//! space, in the filesystem's own blocks, or at another place of its own file. The filesystem's own blocks are looked at by
//! its checker in the end.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use fastice::extent::{StateDir, StoredPin, survey};
use rustix::fs::{Advice, FallocateFlags, SeekFrom};

use crate::daemon::{Lab, create};
use crate::loopfs::{self, LoopFs, Spec};

/// The size of a pinned file.
pub(crate) const FILE_LEN: u64 = 1 << 20;
const FRAGMENT_LEN: u64 = 16384;
/// No guard takes more of the beginning of a file.
const RESERVED_MAX: usize = 8192;
/// Where in a swap area of one page that page lies, behind the header.
const SWAPPED_AT: u64 = 4096;
/// What is left free.
const RESERVE_LEN: u64 = 5 << 20;
pub(crate) const SECTOR: usize = 512;
pub(crate) const PIECE: usize = 1 << 16;
/// The first word of a block of `fastice::initiator::bench::verify`.
const REMOTE: &[u8; 8] = b"fastice\x01";

/// Runs of (byte offset of the file, of the disk, length).
type Runs = Vec<(u64, u64, u64)>;

/// Where the blocks of a run belong.
#[derive(Default)]
struct Home {
    /// Where the file begins that hosts see.
    begin: u64,
    runs: Runs,
}

impl Home {
    /// The frozen map of a pinned file.
    fn of(record: StoredPin) -> Self {
        let map = record.map.expect("a map");
        let runs = map.extents.iter().map(|it| (it.file_offset.get(), it.device_offset.get(), it.len.get()));
        Self { begin: record.identity.reserved.get(), runs: runs.collect() }
    }
}

/// A sector that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// A remote block at this offset of the disk, where it does not belong.
    Stray { offset: u64, run: u64, block: u64 },
    /// Another sector than was written to this file, at this offset; of a remote host, or of nobody knows whom.
    Changed { file: PathBuf, offset: u64, remote: bool },
    /// Something at this offset of the disk, which nobody was given to write.
    Filler { offset: u64 },
}

pub(crate) struct Disk {
    pub(crate) lab: Lab,
    spec: Spec,
    /// Files with a pattern, and its number.
    neighbours: Vec<(PathBuf, u64)>,
    /// Runs of (byte offset of the disk, length).
    filler: Vec<(u64, u64)>,
    homes: HashMap<u64, Home>,
    /// Swap areas, of which nobody need be the host.
    areas: Vec<Home>,
}

/// What file `number` of the pattern holds from `at` on.
pub(crate) fn piece(number: u64, at: u64) -> Vec<u8> {
    let mut piece = vec![u8::try_from(number % 251).expect("small") | 1; PIECE];
    for (index, sector) in (0..).zip(piece.chunks_exact_mut(SECTOR)) {
        sector[..8].copy_from_slice(b"WITNESS.");
        sector[8..16].copy_from_slice(&number.to_le_bytes());
        sector[16..24].copy_from_slice(&(at + index * SECTOR as u64).to_le_bytes());
    }
    piece
}

/// Where images are: in memory, if there is enough, for all of this is about the order of things and not about a slow disk.
fn place() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let free = |stat: rustix::fs::StatVfs| stat.f_bavail * stat.f_frsize;
    let is_enough = rustix::fs::statvfs(memory).is_ok_and(|stat| free(stat) > 2 << 30);
    if is_enough { memory.to_owned() } else { std::env::temp_dir() }
}

/// Gives `file` all the room there is, in whole pieces, from `at` on; where it ends then.
pub(crate) fn take_all_room(file: &File, mut at: u64) -> u64 {
    let mut step: u64 = 64 << 20;
    while step >= PIECE as u64 {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), at, step) {
            Ok(()) => at += step,
            Err(_) => step /= 2,
        }
    }
    at
}

impl Disk {
    /// A filesystem with so many pinnable files, `file-1` and so on, and no more room than the reserve.
    pub(crate) fn new(test: &str, spec: &Spec, files: usize) -> Option<Self> {
        let fs = LoopFs::make_in(&place(), spec).map_err(|reason| loopfs::skip(test, &reason)).ok()?;
        let state = fs.outside();
        fs::create_dir(&state).expect("a directory for the state");
        let lab = Lab::with_places_in(fs, &state);
        let mut disk = Self {
            lab,
            spec: spec.clone(),
            neighbours: Vec::new(),
            filler: Vec::new(),
            homes: HashMap::new(),
            areas: Vec::new(),
        };
        fs::create_dir(disk.lab.fs.path("d")).expect("a directory");
        for number in 1..=files {
            disk.fragmented(number);
        }
        disk.fill();
        Some(disk)
    }

    pub(crate) const fn spec(&self) -> &Spec {
        &self.spec
    }

    pub(crate) fn path(&self, number: usize) -> PathBuf {
        self.lab.fs.path(&format!("d/file-{number}"))
    }

    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        (1..=self.neighbours.len()).map(|number| self.path(number)).collect()
    }

    pub(crate) fn neighbour(&self, number: usize) -> PathBuf {
        self.path(number).with_extension("neighbour")
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.lab.fs.path("d")
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.lab.fs.root().with_file_name("image")
    }

    fn fragmented(&mut self, number: usize) {
        let (path, pattern) = (self.path(number), number as u64);
        let neighbour = self.neighbour(number);
        let (file, other) = (create(&path), create(&neighbour));
        for at in (0..FILE_LEN).step_by(16384) {
            for file in [&file, &other] {
                rustix::fs::fallocate(file, FallocateFlags::empty(), at, FRAGMENT_LEN).expect("room");
            }
        }
        // Some guards take the first blocks, if these are zeros, and want a file that is root's alone.
        let mut content = vec![0x5A; usize::try_from(FILE_LEN).expect("small")];
        content[..RESERVED_MAX].fill(0);
        file.write_all_at(&content, 0).expect("room");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("ours");
        for at in (0..FILE_LEN).step_by(PIECE) {
            other.write_all_at(&piece(pattern, at), at).expect("room");
        }
        file.sync_all().and_then(|()| other.sync_all()).expect("a disk");
        self.neighbours.push((neighbour, pattern));
    }

    fn fill(&mut self) {
        let filler = self.hoard("filler", RESERVE_LEN);
        self.filler = self.extents(&filler).into_iter().map(|(_, disk, len)| (disk, len)).collect();
        assert!(!self.filler.is_empty());
    }

    /// A new file that has all free room but so much, unwritten.
    pub(crate) fn hoard(&self, name: &str, leave: u64) -> PathBuf {
        let [path, reserved] = [name, "reserve"].map(|name| self.lab.fs.path(name));
        let reserve = create(&reserved);
        rustix::fs::fallocate(&reserve, FallocateFlags::empty(), 0, leave).expect("room");
        let file = create(&path);
        take_all_room(&file, 0);
        file.sync_all().expect("a disk");
        fs::remove_file(reserved).expect("removed");
        path
    }

    /// Where the file at `path` is now.
    pub(crate) fn extents(&self, path: &Path) -> Runs {
        let survey = survey(path).expect("a file that tells its map");
        let runs = survey.records.iter();
        runs.map(|it| (it.file_offset.get(), it.device_offset.get(), it.len.get())).collect()
    }

    /// The record of a pinned file.
    pub(crate) fn record(&self, path: &Path) -> StoredPin {
        let state = StateDir::open(self.lab.place("state")).expect("a state directory");
        let mut records = state.records().expect("readable").into_iter().map(|record| record.expect("sound"));
        records.find(|record| record.path() == path).expect("it is pinned")
    }

    /// Files are pinned: those that are swap areas may be written by the kernel from now on, whether hosts write to them or not.
    pub(crate) fn know_areas(&mut self) {
        let records = self.paths().into_iter().map(|path| self.record(&path));
        self.areas = records.filter(|record| record.identity.reserved.get() > 0).map(Home::of).collect();
    }

    /// The blocks of run `seed` belong to the frozen map of `path`, and nowhere else.
    pub(crate) fn expect_run(&mut self, seed: u64, path: &Path) {
        self.homes.insert(seed, Home::of(self.record(path)));
    }

    /// The filesystem itself has copied blocks of run `seed` to the file at `path`: they may also be where it is now.
    pub(crate) fn copied(&mut self, seed: u64, path: &Path) {
        let copies = self.extents(path);
        self.homes.entry(seed).or_default().runs.extend(copies);
    }

    /// All that is not as it should be in the neighbours and on the raw disk.
    pub(crate) fn wrongs(&self) -> Vec<Wrong> {
        let mut wrongs = self.strays();
        for (path, pattern) in &self.neighbours {
            let file = File::open(path).expect("a file");
            let changed = damage(&file, *pattern, FILE_LEN).into_iter();
            wrongs.extend(changed.map(|(offset, remote)| Wrong::Changed {
                file: path.clone(),
                offset,
                remote,
            }));
        }
        wrongs
    }

    /// What is on the raw disk and does not belong there.
    pub(crate) fn strays(&self) -> Vec<Wrong> {
        rustix::fs::syncfs(File::open(self.lab.fs.root()).expect("a directory")).expect("a disk");
        let image = File::open(self.image()).expect("the image");
        let len = image.metadata().expect("the image").len();
        let (mut buffer, mut at, mut strays, mut seen) = (vec![0; PIECE], 0, Vec::new(), 0);
        while let Ok(data) = rustix::fs::seek(&image, SeekFrom::Data(at)) {
            let end = rustix::fs::seek(&image, SeekFrom::Hole(data)).expect("data ends");
            let begin = seen.max(data - data % PIECE as u64);
            for piece in (begin..end.min(len)).step_by(PIECE) {
                image.read_exact_at(&mut buffer, piece).expect("whole pieces");
                seen = piece + PIECE as u64;
                let sectors = (piece..).step_by(SECTOR).zip(buffer.chunks(SECTOR));
                strays.extend(sectors.filter_map(|(offset, sector)| self.judged(offset, sector)));
            }
            at = end;
        }
        strays
    }

    fn judged(&self, offset: u64, sector: &[u8]) -> Option<Wrong> {
        if sector.starts_with(REMOTE) {
            let (run, block) = (word(sector, 8), word(sector, 16));
            let belongs = self.is_at_home(run, block, offset) || self.is_swapped(offset);
            return (!belongs).then_some(Wrong::Stray { offset, run, block });
        }
        let is_filler = || self.filler.iter().any(|(disk, len)| (*disk..disk + len).contains(&offset));
        (sector.iter().any(|byte| *byte != 0) && is_filler()).then_some(Wrong::Filler { offset })
    }

    /// Whether the kernel may have put a page of somebody's memory there: the one page of a swap area that it writes. The
    /// memory of this very test is full of remote blocks, and seen there when the kernel reclaims it.
    fn is_swapped(&self, offset: u64) -> bool {
        let swapped = |home: &Home| SWAPPED_AT..home.begin.max(SWAPPED_AT);
        self.homes.values().chain(&self.areas).any(|home| {
            home.runs.iter().any(|(file, disk, len)| {
                let is_in = (*disk..disk + len).contains(&offset);
                is_in && swapped(home).contains(&(file + (offset - disk)))
            })
        })
    }

    fn is_at_home(&self, run: u64, block: u64, offset: u64) -> bool {
        let Some(home) = self.homes.get(&run) else { return false };
        let file_offset = block.saturating_mul(SECTOR as u64).saturating_add(home.begin);
        home.runs.iter().any(|(file, disk, len)| {
            (*file..file + len).contains(&file_offset) && disk + (file_offset - file) == offset
        })
    }

    /// Gives back what a broken pin has left.
    pub(crate) fn unpin_all(&self) {
        let state = StateDir::open(self.lab.place("state")).expect("a state directory");
        for record in state.records().expect("readable") {
            self.lab.fastice(&["unpin", "--force"], &[record.expect("sound").path()], 0);
        }
    }

    /// Looks at everything, and unmounts it; the filesystem must find itself sound.
    pub(crate) fn check(self) {
        let wrongs = self.wrongs();
        assert!(
            wrongs.is_empty(),
            "{} sectors are wrong: {:?}",
            wrongs.len(),
            wrongs.get(..16).unwrap_or(&wrongs)
        );
        let device = self.lab.fs.device();
        loopfs::unmount(&self.lab.fs.root()).expect("nobody uses it");
        let (check, how) = if self.spec.kind == "xfs" { ("xfs_repair", "-n") } else { ("e2fsck", "-fn") };
        let found = Command::new(check).args([how, device]).output().expect("it is installed");
        let said = String::from_utf8_lossy(&found.stdout);
        // That an extent tree could be narrower is no fault, though e2fsck ends as if it were.
        let fault = said.lines().any(|line| line.ends_with("? no") && !line.contains("Optimize"));
        let is_sound = found.status.success() || !fault && said.contains("Optimize");
        assert!(is_sound, "the filesystem is not sound: {said}");
    }
}

impl Drop for Disk {
    /// No swap area, and no freeze, may outlive its filesystem, whatever a test came to.
    fn drop(&mut self) {
        let root = self.lab.fs.root();
        // Frozen only where a test has failed.
        let _ = loopfs::run(Command::new("fsfreeze").arg("--unfreeze").arg(&root));
        let areas = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let mine = areas.lines().filter_map(|line| line.split_whitespace().next()).map(Path::new);
        for area in mine.filter(|area| area.starts_with(&root)) {
            for (command, how) in [("chattr", &["-i"][..]), ("swapoff", &[])] {
                if let Err(error) = loopfs::run(Command::new(command).args(how).arg(area)) {
                    println!("LEFT BEHIND: swap area {}: {error}", area.display());
                }
            }
        }
    }
}

fn word(sector: &[u8], at: usize) -> u64 {
    sector[at..].first_chunk::<8>().map_or(0, |word| u64::from_le_bytes(*word))
}

/// Sectors of `file` that are not what its pattern says: their offsets, and whether a remote host wrote them.
pub(crate) fn damage(file: &File, pattern: u64, len: u64) -> Vec<(u64, bool)> {
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).expect("advice");
    let mut found = vec![0; PIECE];
    let mut damaged = Vec::new();
    for at in (0..len).step_by(PIECE) {
        file.read_exact_at(&mut found, at).expect("the file is read");
        let expected = piece(pattern, at);
        if found != expected {
            let sectors = (0..).zip(found.chunks(SECTOR).zip(expected.chunks(SECTOR)));
            let wrong = sectors.filter(|(_, (found, expected))| found != expected);
            damaged.extend(
                wrong.map(|(index, (found, _))| (at + index * SECTOR as u64, found.starts_with(REMOTE))),
            );
        }
    }
    damaged
}
