//! One look at one file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{Statx, StatxAttributes};
use rustix::time::{ClockId, clock_gettime};

use crate::chain::Chain;
use crate::extent::compare::{Difference, differences};
use crate::extent::device::Sysfs;
use crate::extent::error::ExtentError;
use crate::extent::facts::stat;
use crate::extent::fiemap::{self, Records};
use crate::extent::guard::{Baseline, Doubt, Post, RecallReason};
use crate::extent::identity::{DeviceNumber, MapIdentity};
use crate::extent::map::{Extent, FrozenMap};
use crate::extent::sys::{self, Lease};
use crate::units::ByteLen;

/// Differences that are kept of a map, of which there may be millions.
const DIFFERENCES_MAX: usize = 16;

/// The processor time of this thread.
pub(in crate::extent) fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// What a file is like now.
pub(in crate::extent) fn baseline_of(file: &File, path: &Path) -> Result<Baseline, ExtentError> {
    let stat = stat(file, path)?;
    Ok(Baseline { changed: changed(&stat), inode_generation: generation_of(file, path)? })
}

fn changed(stat: &Statx) -> (i64, u32) {
    (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec)
}

fn generation_of(file: &File, path: &Path) -> Result<Option<u32>, ExtentError> {
    match sys::inode_generation(file.as_fd()) {
        Ok(generation) => Ok(Some(generation)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP)) => Ok(None),
        Err(error) => Err(ExtentError::io("ask for the generation of", path, error)),
    }
}

/// What a look at a file that is not pinned costs in processor time: the same calls, by this thread.
pub(in crate::extent) fn cost_of(
    file: &File,
    path: &Path,
    identity: &MapIdentity,
    extents: &[Extent],
) -> Result<Duration, ExtentError> {
    let begun = cpu_time();
    baseline_of(file, path)?;
    let disk = &identity.disk;
    Sysfs::system()
        .len_of(disk.number)
        .map_err(|error| ExtentError::io("look at the disk under", path, error))?;
    moved_blocks(file, path, identity, extents)?;
    Ok(cpu_time().saturating_sub(begun))
}

/// What of the living map is not as it was frozen. The map is never held: it may have millions of extents.
fn moved_blocks(
    file: &File,
    path: &Path,
    identity: &MapIdentity,
    extents: &[Extent],
) -> Result<Vec<Difference>, ExtentError> {
    fiemap::patiently(|| {
        let mut living = Records::of(file.as_fd(), path);
        let start = identity.disk.partition_start;
        let found = differences(extents, living.by_ref(), start, identity.size, DIFFERENCES_MAX);
        living.end().map(|()| found)
    })
}

/// What differs, if anything does.
type Found = Option<(Doubt, String)>;

/// Looks at what the inode says of itself, and recalls the file when that differs. Not at its generation: nothing changes that
/// without the change time (`EXT4_IOC_SWAP_BOOT`).
pub(super) fn quick(post: &Post) {
    let Some(map) = post.map.get() else { return };
    match quick_look(post, map) {
        Ok(None) => {}
        Ok(Some((doubt, detail))) => {
            post.recall_with(RecallReason::Doubt(doubt), detail, Vec::new(), changed_at(post));
        }
        Err(error) => post.recall(RecallReason::Doubt(Doubt::NotReadable), Chain(&error).to_string()),
    }
}

fn quick_look(post: &Post, map: &FrozenMap) -> Result<Found, ExtentError> {
    let (file, path) = (&post.file, post.path.as_path());
    let stat = stat(file, path)?;
    let frozen = map.identity().size.get();
    if stat.stx_size != frozen {
        return Ok(Some((Doubt::Resized, format!("from {frozen} to {} bytes", stat.stx_size))));
    }
    if let Some(broken) = post.mode.broken(file, &stat, path)? {
        return Ok(Some(broken));
    }
    if post.mode.sets_flag() && !stat.stx_attributes.contains(StatxAttributes::IMMUTABLE) {
        return Ok(Some((Doubt::FlagCleared, String::new())));
    }
    let Some(was) = *post.baseline.lock().unwrap_or_else(PoisonError::into_inner) else { return Ok(None) };
    if post.mode.takes_lease() {
        let lease = sys::get_lease(file.as_fd())
            .map_err(|error| ExtentError::io("ask for the lease of", path, error))?;
        if lease != Lease::Read {
            return Ok(Some((Doubt::LeaseLost, String::new())));
        }
    }
    let (seconds, nanoseconds) = changed(&stat);
    if (seconds, nanoseconds) != was.changed {
        return Ok(Some((Doubt::Touched, format!("its change time is {seconds}.{nanoseconds:09}"))));
    }
    Ok(None)
}

/// When the inode was changed last; `None` when it was not since it was pinned, or found to be as it was.
fn changed_at(post: &Post) -> Option<SystemTime> {
    let was = post.baseline.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.changed;
    let ctime = stat(&post.file, &post.path).ok()?.stx_ctime;
    let since = Duration::new(u64::try_from(ctime.tv_sec).ok()?, ctime.tv_nsec);
    (was != (ctime.tv_sec, ctime.tv_nsec)).then(|| UNIX_EPOCH.checked_add(since))?
}

/// All that the inode says.
fn inode_look(post: &Post, map: &FrozenMap) -> Result<Found, ExtentError> {
    let was = *post.baseline.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(was) = was
        && was.inode_generation != generation_of(&post.file, &post.path)?
    {
        return Ok(Some((Doubt::OtherGeneration, String::new())));
    }
    quick_look(post, map)
}

/// How old what is known of a disk may be.
const DISK_AGE_MAX: Duration = Duration::from_millis(100);

/// The lengths of disks, as they were a moment ago: a thousand files are on a few disks.
#[derive(Debug)]
pub(super) struct Disks {
    /// Before the first of them was asked for.
    since: Instant,
    lens: BTreeMap<DeviceNumber, Option<ByteLen>>,
}

impl Default for Disks {
    fn default() -> Self {
        Self { since: Instant::now(), lens: BTreeMap::new() }
    }
}

impl Disks {
    /// Forgets what is old. Since when all is known that is known now.
    fn freshen(&mut self) -> Instant {
        if self.since.elapsed() > DISK_AGE_MAX {
            *self = Self::default();
        }
        self.since
    }

    fn len_of(&mut self, disk: DeviceNumber) -> io::Result<Option<ByteLen>> {
        if let Some(len) = self.lens.get(&disk) {
            return Ok(*len);
        }
        let len = Sysfs::system().len_of(disk)?;
        self.lens.insert(disk, len);
        Ok(len)
    }
}

/// Looks at everything, and recalls the file when anything differs. The processor time of this thread, which was `cpu` when the
/// look began: it costs what is between.
pub(super) fn look(post: &Post, disks: &mut Disks, cpu: Duration) -> Duration {
    let Some(map) = post.map.get() else { return cpu_time() };
    // What is known of its disk is a part of the look.
    let begun = disks.freshen();
    let found = look_at(post, map, disks, &|_| false);
    let now = cpu_time();
    match found {
        Ok(None) => post.watch.found_nothing(begun, now.saturating_sub(cpu)),
        Ok(Some(Differs { doubt, detail, blocks })) => {
            post.recall_with(RecallReason::Doubt(doubt), detail, blocks, changed_at(post));
        }
        Err(error) => post.recall(RecallReason::Doubt(Doubt::NotReadable), Chain(&error).to_string()),
    }
    now
}

/// What a full look found.
struct Differs {
    doubt: Doubt,
    detail: String,
    blocks: Vec<Difference>,
}

/// Looks at everything; of the inode, `pass_over` is no difference.
fn look_at(
    post: &Post,
    map: &FrozenMap,
    disks: &mut Disks,
    pass_over: &dyn Fn(&(Doubt, String)) -> bool,
) -> Result<Option<Differs>, ExtentError> {
    let inode = inode_look(post, map)?.filter(|found| !pass_over(found));
    let found = match inode {
        Some(found) => Some(found),
        None => disk_look(map, disks)
            .map_err(|error| ExtentError::io("look at the disk under", &post.path, error))?,
    };
    if let Some((doubt, detail)) = found {
        return Ok(Some(Differs { doubt, detail, blocks: Vec::new() }));
    }
    let blocks = moved_blocks(&post.file, &post.path, map.identity(), map.extents())?;
    let moved = |first: &Difference| Differs {
        doubt: Doubt::MapMoved,
        detail: first.to_string(),
        blocks: Vec::new(),
    };
    Ok(blocks.first().map(moved).map(|differs| Differs { blocks, ..differs }))
}

/// Looks at a file again after a doubt, with its export fenced.
#[derive(Clone, Debug)]
pub struct SecondLook(pub(in crate::extent) Arc<Post>);

impl SecondLook {
    /// Looks at everything but the change time, which a doubt may have been about. `Err` with what is not as it was.
    ///
    /// # Errors
    /// What differs, for people.
    pub fn look(&self) -> Result<Baseline, String> {
        let post = &*self.0;
        let Some(map) = post.map.get() else { return Err("it has no map yet".to_owned()) };
        let looked = baseline_of(&post.file, &post.path).map_err(|error| Chain(&error).to_string())?;
        let touched = |found: &(Doubt, String)| found.0 == Doubt::Touched;
        match look_at(post, map, &mut Disks::default(), &touched) {
            Ok(None) => Ok(looked),
            Ok(Some(Differs { doubt, detail, .. })) => {
                Err(format!("{}: {detail}", RecallReason::Doubt(doubt)))
            }
            Err(error) => Err(Chain(&error).to_string()),
        }
    }
}

fn disk_look(map: &FrozenMap, disks: &mut Disks) -> io::Result<Found> {
    let disk = &map.identity().disk;
    Ok(match disks.len_of(disk.number)? {
        None => Some((Doubt::DiskChanged, format!("there is no disk {} any more", disk.number))),
        Some(len) if len != disk.size => {
            Some((Doubt::DiskChanged, format!("{} has {len} bytes, not {}", disk.number, disk.size)))
        }
        Some(_) => None,
    })
}
