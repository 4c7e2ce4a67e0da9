//! What can go wrong with a file that is to be pinned, and what to do about it.
//!
//! ```text
//!   ExtentError  --kind()-->    ExtentErrorKind   stable, for scripts and for code that decides
//!                --Display-->   what is wrong, and where (path, offset, flag)
//!                --remedy()-->  what to do
//!                --source()-->  the system's own error, never repeated in the text
//! ```

mod others;

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use others::{ClaimText, Holders, claim_remedy};
pub use others::{Claimant, Holder};

use super::accept::Violation;
use super::compare::Difference;
use super::lookup::Segment;
use super::ondisk::OnDiskError;
use super::owner::Owner;
use crate::units::{ByteLen, ByteOffset};

/// The stable classes of [`ExtentError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExtentErrorKind {
    /// A system call failed.
    Io,
    /// The file, its layout, its filesystem or its disk cannot be served.
    NotAccepted,
    /// Another process, or the kernel, has the file open.
    InUse,
    /// A living process holds a pin on the file.
    AlreadyPinned,
    /// The living map differs from the frozen or stored one, or changed while it was read.
    Changed,
    /// A guard could not be set, or is gone.
    Guard,
    /// The extent list contradicts itself or its identity.
    Map,
    /// The stored record is missing, damaged or of another version.
    State,
    /// The filesystem has too little room to prepare the file.
    NoSpace,
}

impl ExtentErrorKind {
    /// The name that `--json` output uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::NotAccepted => "not-accepted",
            Self::InUse => "in-use",
            Self::AlreadyPinned => "already-pinned",
            Self::Changed => "changed",
            Self::Guard => "guard",
            Self::Map => "map",
            Self::State => "state",
            Self::NoSpace => "no-space",
        }
    }
}

impl fmt::Display for ExtentErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Any failure of this module but a lookup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtentError {
    /// A system call failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, in the infinitive.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file breaks at least one acceptance rule.
    #[error("{} cannot be served: {first}{}", path.display(), AndMore(*count))]
    NotAccepted {
        /// The file.
        path: PathBuf,
        /// The first broken rule.
        first: Box<Violation>,
        /// How many times a rule is broken in all; [`accept`](super::accept) lists them.
        count: usize,
    },
    /// Somebody has the file open.
    #[error("{} is open elsewhere: {}", path.display(), Holders(holders))]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who was found to have it open; empty when nobody was found in `/proc`.
        holders: Vec<Holder>,
    },
    /// The page cache has older blocks of the file than the disk, and somebody keeps it from dropping them.
    #[error(
        "the page cache holds an older byte {offset} of {} than the disk, and cannot drop it: {}",
        path.display(), Holders(holders)
    )]
    StaleCache {
        /// The file.
        path: PathBuf,
        /// Where the first of them is.
        offset: u64,
        /// Who was found to have it open, or mapped.
        holders: Vec<Holder>,
    },
    /// A living process holds a pin on the file.
    #[error("{} is already pinned by {owner}", path.display())]
    AlreadyPinned {
        /// The file.
        path: PathBuf,
        /// Who.
        owner: Box<Owner>,
    },
    /// Another process has the file locked: mostly a fastice that pins it, with another state directory.
    #[error("{} is {}", path.display(), ClaimText(by.as_ref()))]
    HeldElsewhere {
        /// The file.
        path: PathBuf,
        /// Who; none when nobody is seen to, as a process of another container.
        by: Option<Claimant>,
    },
    /// A process that served the file is gone, but not its last commands.
    #[error("commands of {owner}, which is gone, are still on the device under {}", path.display())]
    CommandsLeft {
        /// The file.
        path: PathBuf,
        /// Whose.
        owner: Box<Owner>,
    },
    /// A process that served the file is gone, but a controller that it drove may still execute its commands.
    #[error(
        "{owner}, which is gone, drove {place} under {}, which may still execute its commands",
        path.display()
    )]
    ControllerLeft {
        /// The file.
        path: PathBuf,
        /// Who drove it.
        owner: Box<Owner>,
        /// The controller.
        place: String,
        /// Why it could not be stilled.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The living map is not the one that was frozen or stored.
    #[error("the extent map of {} changed: {difference}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// The first difference.
        difference: Difference,
    },
    /// The size is not the one that was frozen or stored.
    #[error("the size of {} changed from {frozen} to {living} bytes", path.display())]
    Resized {
        /// The file.
        path: PathBuf,
        /// The size of the frozen or stored map.
        frozen: ByteLen,
        /// The size of the living file.
        living: ByteLen,
    },
    /// A guard could not be set, or was lost before the pin was complete.
    #[error("cannot hold {} with the {guard} guard: {problem}", path.display())]
    Guard {
        /// The file.
        path: PathBuf,
        /// Which guard.
        guard: &'static str,
        /// What is wrong with it.
        problem: &'static str,
        /// What the system said, if it was asked.
        source: Option<io::Error>,
    },
    /// FIEMAP's answer, or a stored extent list, is no map of a file.
    #[error("the extent list of {} is not a map: {fault}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// In what way.
        fault: MapFault,
    },
    /// A record of the state directory cannot be used.
    #[error("{}", StateText(path, problem))]
    State {
        /// The record, or the file that has none.
        path: PathBuf,
        /// In what way.
        problem: StateProblem,
    },
    /// A file that is to be served without its filesystem, which the kernel still has.
    #[error("{} cannot be taken over: {by}", path.display())]
    KernelHasIt {
        /// The file.
        path: PathBuf,
        /// How it has it.
        by: String,
    },
    /// The unmounted device does not tell the map of the file.
    #[error("{} cannot be taken over", path.display())]
    OnDisk {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<OnDiskError>,
    },
    /// The filesystem has too little room to prepare the file.
    #[error("preparing {} needs {needed} bytes, its filesystem has {available} left", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes that must be allocated.
        needed: ByteLen,
        /// Bytes that are free.
        available: ByteLen,
    },
}

impl ExtentError {
    pub(crate) fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { action, path: path.to_path_buf(), source: source.into() }
    }

    /// The stable class.
    #[must_use]
    pub const fn kind(&self) -> ExtentErrorKind {
        match self {
            Self::Io { .. } => ExtentErrorKind::Io,
            Self::NotAccepted { .. } => ExtentErrorKind::NotAccepted,
            Self::InUse { .. }
            | Self::StaleCache { .. }
            | Self::HeldElsewhere { .. }
            | Self::CommandsLeft { .. }
            | Self::ControllerLeft { .. }
            | Self::KernelHasIt { .. } => ExtentErrorKind::InUse,
            Self::OnDisk { source, .. } => match **source {
                OnDiskError::Io { .. } => ExtentErrorKind::Io,
                _ => ExtentErrorKind::NotAccepted,
            },
            Self::AlreadyPinned { .. } => ExtentErrorKind::AlreadyPinned,
            Self::Changed { .. } | Self::Resized { .. } => ExtentErrorKind::Changed,
            Self::Guard { .. } => ExtentErrorKind::Guard,
            Self::Map { .. } => ExtentErrorKind::Map,
            Self::State { .. } => ExtentErrorKind::State,
            Self::NoSpace { .. } => ExtentErrorKind::NoSpace,
        }
    }

    /// What the operator can do about it: one sentence, without the path where the message has it already.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Io { action, source, .. }
                if is_of_state(action) && source.kind() == io::ErrorKind::PermissionDenied =>
            {
                "run as root, as whoever pins files has to be".to_owned()
            }
            Self::Io { source, .. } => io_remedy(source).to_owned(),
            Self::NotAccepted { first, .. } => first.remedy(),
            Self::InUse { holders, .. } if holders.is_empty() => {
                "find the kernel user (an NFS or SMB export, a process of another container) and stop it"
                    .to_owned()
            }
            Self::InUse { .. } => "stop these processes, or detach the loop device or swap file".to_owned(),
            Self::StaleCache { .. } => {
                "end these readers, who have it mapped, then `fastice unpin` it: else a local write beside an old byte would \
                 put it back over what hosts wrote"
                    .to_owned()
            }
            Self::HeldElsewhere { by, .. } => claim_remedy(by.as_ref()),
            Self::CommandsLeft { .. } => {
                "the device does not answer: look into the kernel log; try again when it does, or after a reboot"
                    .to_owned()
            }
            Self::ControllerLeft { .. } => {
                "let it be disabled: end whoever uses it and try again; a PCI controller can also be given back to \
                 the kernel (`fastice device unbind`), which resets it; a reboot clears all"
                    .to_owned()
            }
            Self::AlreadyPinned { .. } => {
                "take the file out of the configuration of that process and reload it (SIGHUP), or end that process; either \
                 lets it go"
                    .to_owned()
            }
            Self::Changed { path, .. } | Self::Resized { path, .. } => format!(
                "find out who changed the file; to accept the map that it has now, `fastice pin --resume {}`; to give the pin \
                 up, `fastice unpin --force {}`",
                path.display(),
                path.display()
            ),
            Self::Guard { guard, problem, source, .. } => guard_remedy(guard, problem, source.as_ref()),
            Self::KernelHasIt { .. } => {
                "serve it while it is mounted; or unmount it, and serve it with device = \"unmounted\", or give its controller to \
                 fastice (`fastice device bind`)"
                    .to_owned()
            }
            Self::OnDisk { source, .. } => source.remedy().to_owned(),
            Self::Map { .. } => "report it: the filesystem told a map that no file can have".to_owned(),
            Self::State { path, problem } => problem.remedy(path),
            Self::NoSpace { .. } => "free space on the filesystem; the file was left as it was".to_owned(),
        }
    }
}

/// Whether an action is one on the state directory, and not on the file.
fn is_of_state(action: &str) -> bool {
    action.contains("state directory") || action.contains("lock")
}

fn io_remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "check the path, and whether its filesystem is mounted",
        io::ErrorKind::AlreadyExists => "choose another path, or remove what is there",
        io::ErrorKind::NotADirectory => "check the path: a part of it is no directory",
        io::ErrorKind::PermissionDenied => {
            "run as root; if you are, the file is pinned or sealed by somebody else"
        }
        io::ErrorKind::ReadOnlyFilesystem => "remount the filesystem read-write while pinning",
        io::ErrorKind::StorageFull => "free space on the filesystem",
        io::ErrorKind::WouldBlock => "another process holds a lease on the file, e.g. a file server: stop it",
        _ => "see the system's message and the kernel log",
    }
}

/// The name of the guard that is the immutable flag.
pub(super) const IMMUTABLE: &str = "immutable flag";

fn guard_remedy(guard: &str, problem: &str, source: Option<&io::Error>) -> String {
    if let Some(remedy) = super::mode::frozen::remedy(problem) {
        return remedy.to_owned();
    }
    if problem == super::pin::OTHER_GUARDS {
        return "leave the guard out to keep those that it has (`fastice pins` shows them), or `fastice unpin` it first"
            .to_owned();
    }
    match source.map(io::Error::kind) {
        Some(io::ErrorKind::PermissionDenied) => {
            format!(
                "run as root with CAP_SYS_ADMIN, CAP_LINUX_IMMUTABLE and CAP_LEASE (for the {guard} guard)"
            )
        }
        Some(io::ErrorKind::ReadOnlyFilesystem) => {
            "remount the filesystem read-write while pinning, or pin the file with the read-only-mount guard"
                .to_owned()
        }
        _ if super::mode::GuardMode::ALL.iter().any(|mode| mode.name() == guard) => {
            "see \"Guards\" in the manual; another guard may do: --guard, or `guard` of the namespace"
                .to_owned()
        }
        None if guard == super::readers::LOCAL_READERS => {
            "leave --local-readers (`local_readers` of the namespace) out; see \"Local readers\" in the manual".to_owned()
        }
        None if guard == IMMUTABLE => {
            "see whether it is pinned (`fastice pins`); otherwise `chattr -i` it and try again".to_owned()
        }
        _ => "pin again; if it repeats, see who opens or changes the file".to_owned(),
    }
}

struct AndMore(usize);

impl fmt::Display for AndMore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 | 1 => Ok(()),
            count => write!(f, " (and {} more)", count - 1),
        }
    }
}

/// In what way an extent list is no map. Offsets are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each message says it all")]
#[non_exhaustive]
pub enum MapFault {
    #[error("it is empty")]
    Empty,
    #[error("{count} extents are more than an index can name")]
    TooMany { count: usize },
    #[error("the partition does not lie inside the disk")]
    PartitionOutsideDisk,
    #[error("nothing is mapped at file offset {file_offset}")]
    Gap { file_offset: ByteOffset },
    #[error("file offset {file_offset} is mapped twice or out of order")]
    OverlapInFile { file_offset: ByteOffset },
    #[error(
        "the extent at file offset {file_offset} (device offset {device_offset}, length {len}) is not aligned to the logical block"
    )]
    Misaligned { file_offset: ByteOffset, device_offset: ByteOffset, len: ByteLen },
    #[error(
        "the extent at file offset {file_offset} lies outside the partition (device offset {device_offset})"
    )]
    OutsideDevice { file_offset: ByteOffset, device_offset: ByteOffset },
    #[error("the extent at file offset {file_offset} ends beyond 64 bits")]
    Overflow { file_offset: ByteOffset },
    #[error("{mapped} bytes are mapped, the file has {size}")]
    WrongLength { mapped: ByteLen, size: ByteLen },
    #[error("device offset {device_offset} belongs to file offsets {} and {}", file_offsets[0], file_offsets[1])]
    OverlapOnDevice { device_offset: ByteOffset, file_offsets: [ByteOffset; 2] },
    #[error(
        "the first {reserved} bytes, which are never served, are not whole logical blocks, or leave nothing of {size}"
    )]
    Reserved { reserved: ByteLen, size: ByteLen },
    #[error("the kernel's answer is cut short: {got} of {expected} bytes")]
    Truncated { expected: usize, got: usize },
    #[error("the record at file offset {file_offset} has no length or goes backwards")]
    NoProgress { file_offset: ByteOffset },
}

/// Some problems are of a record, some of the file that it is of.
struct StateText<'a>(&'a Path, &'a StateProblem);

impl fmt::Display for StateText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, problem) = (self.0.display(), self.1);
        match problem {
            StateProblem::Missing => write!(f, "{path} is not pinned: {problem}"),
            StateProblem::FileGone
            | StateProblem::NotMounted
            | StateProblem::OtherFile
            | StateProblem::Copy => {
                write!(f, "the pin record of {path} {problem}")
            }
            _ => write!(f, "the pin record {path} {problem}"),
        }
    }
}

/// In what way a record of the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each message says it all")]
#[non_exhaustive]
pub enum StateProblem {
    #[error("is no fastice pin record")]
    Malformed(#[source] serde_json::Error),
    #[error("has version {found}, this fastice knows version {known}")]
    Version { found: u64, known: u64 },
    #[error("does not match its own checksum")]
    Checksum,
    #[error("holds a map that contradicts itself: {0}")]
    Map(MapFault),
    #[error("is larger than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("there is no record of it")]
    Missing,
    #[error("belongs to a file that is no longer at that path")]
    FileGone,
    #[error("belongs to a filesystem that is not mounted there")]
    NotMounted,
    #[error("belongs to another file than the one now at that path")]
    OtherFile,
    #[error("is of the same file of another filesystem with the same UUID, which is mounted too")]
    Copy,
}

impl StateProblem {
    fn remedy(&self, path: &Path) -> String {
        match self {
            Self::Version { .. } => {
                "use the fastice release that wrote it, or unpin with that one first".to_owned()
            }
            Self::Missing => {
                "`fastice pins` lists what is; another state directory may have its record (--state-dir)".to_owned()
            }
            Self::NotMounted => {
                "mount it and try again; `fastice unpin --force` would only forget the record, and leave the file immutable"
                    .to_owned()
            }
            Self::Copy => "a copy of a filesystem needs a UUID of its own: `xfs_admin -U generate`, `tune2fs -U random`; or \
                           unmount the original first"
                .to_owned(),
            Self::OtherFile | Self::FileGone => {
                "the pinned file was moved away or removed: `fastice unpin` it at its new path, or forget its record with \
                 `fastice unpin --force`"
                    .to_owned()
            }
            _ => format!(
                "the record is damaged: check the disk, then `fastice unpin --force` the file, or remove {} and clear \
                 the file's immutable flag by hand (chattr -i)",
                path.display()
            ),
        }
    }
}

/// Why a lookup, or the check of a segment, failed. In the data path, so small and free of allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LookupError {
    /// The range leaves the map.
    #[error("{len} bytes at {file_offset} are beyond the end of the map, {map_len}")]
    OutOfRange {
        /// Where the range begins.
        file_offset: ByteOffset,
        /// Its length.
        len: ByteLen,
        /// The length of the map.
        map_len: ByteLen,
    },
    /// The range does not begin and end on logical blocks.
    #[error("{len} bytes at {file_offset} are not whole logical blocks")]
    Misaligned {
        /// Where the range begins.
        file_offset: ByteOffset,
        /// Its length.
        len: ByteLen,
    },
    /// The sealed extents do not hold a byte that they must hold.
    #[error("file offset {file_offset} is in no extent")]
    NotInMap {
        /// The byte.
        file_offset: ByteOffset,
    },
    /// The segment is not what the frozen map says. Whoever made it must not be trusted further.
    #[error("segment {segment:?} is not in the frozen map")]
    Disagrees {
        /// The segment.
        segment: Segment,
    },
}
