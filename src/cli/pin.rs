//! `fastice pin`: pins files, so that they stay as they are until they are served, or unpinned.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::StateDirArg;
use super::exit::{Exit, Failure, Outcome};
use super::explain;
use super::files::{Stages, named_state, required_record};
use super::many::each;
use super::map::hex;
use super::out::{JsonFlag, Out};
use super::sys::{StopSignals, Wake};
use crate::config::format_size;
use crate::control::open_state;
use crate::extent::{
    GuardMode, LocalReaders, PinOptions, PinnedFile, RecallWatch, Warden, WatchOptions, pin,
};
use crate::units::BlockSize;

/// Pin files: prove that they are fit, and make them immutable
///
/// Afterwards the immutable flag and a record remain, over a reboot too. What needs a process, the denial of opens
/// and the lease, is held while `fastice serve` runs, or with --hold.
#[derive(Clone, Debug, Args)]
pub struct PinArgs {
    /// The files, on XFS or ext4
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// First make them fit: write zeros where nothing was written, unshare, pad to the block
    #[arg(long)]
    pub prepare: bool,
    /// Which guards hold the file [default: those of its record, or `default`]
    ///
    /// default: open-permission mark, immutable flag, lease.
    ///
    /// swap-file: the file becomes a swap area of one page, so that the kernel refuses every change of its map, also through
    /// descriptors and mappings from before the pin, and goes on to do so when fastice is killed. THE FIRST 8 KiB OF THE FILE ARE
    /// DESTROYED AND NEVER SERVED: the namespace begins at byte 8192 (--prepare gives up what they hold; zeros are given up
    /// without). Limits: the whole system takes some 28 swap areas; the filesystem cannot be unmounted or remounted
    /// read-only while the file is pinned; it takes CAP_SYS_ADMIN; the pin ends with a reboot, and the next start sets it again.
    /// Hazards: if the filesystem or its disk fails meanwhile, only a reboot ends the swap area, so removable and
    /// network disks, filesystems with errors and the one that the host hibernates to are refused, and a loop device is
    /// warned of; memory of this host may be swapped to the second page, when all other swap is full: it is never served,
    /// and wiped at the end. Holes and shared blocks are refused, encryption and copy-on-write filesystems too.
    ///
    /// read-only-mount: the filesystem is mounted read-only (its superblock, not a bind mount only), with its log replayed and without
    /// recorded errors; hosts write to its blocks all the same. Nothing on it changes, so no flag is set; denial of opens and lease are as by
    /// default. A remount read-write is noticed within 100 ms or so and ends the grant. The state directory must be elsewhere. --prepare the
    /// file before; its modification time cannot be set.
    ///
    /// frozen-filesystem: the default guards, and on top of them THE WHOLE FILESYSTEM IS FROZEN: whoever writes to any file of it waits until
    /// the pin ends, and cannot be killed meanwhile. It stays when fastice is killed, until `fastice unpin`; a reboot thaws it. All files that are
    /// pinned so on one filesystem share the freeze, which ends with the last. A thaw by somebody else ends the grant. Refused: a
    /// filesystem that holds the state directory, this program, its log, swap files, or a directory that every host writes to
    /// (/, /var, /tmp, ...); one that somebody else has frozen.
    #[arg(long, value_name = "MODE")]
    pub guard: Option<GuardMode>,
    /// Whether local processes may open the file for reading while it is served [default: as its record says, or `refuse`]
    ///
    /// refuse: nobody can open it; `fastice read` reads it as hosts see it.
    ///
    /// allow: whoever may read the file by its mode can; writers are kept out all the same. WHAT A READER SEES MAY BE OLD: hosts write
    /// past the page cache, which keeps a block as it was when it was last read. Each open drops what is cached, so a reader sees
    /// no block older than its open, but for those that another reader has mapped or is reading at that moment: these may be as
    /// old as that reader. A block that was read once stays so: it is not read anew, and a file mapped is as old as its pages. Direct
    /// I/O (O_DIRECT: `dd iflag=direct`) always reads the disk; so does `fastice read`. posix_fadvise(DONTNEED) drops what nobody has
    /// mapped. What is read while hosts write is no snapshot, whichever way.
    ///
    /// Allowed where nothing but reading can come of it: on ext4 with the default guards, and with the swap-file guard. On XFS any reader could clone
    /// the file (reflink), and hosts would write into the clone; or root could write beside old blocks that a reader has mapped. It takes Linux 6.5. At the end the file is given back
    /// only when no old block is cached; until then (somebody has it mapped) it stays immutable and recorded, for `fastice unpin`.
    #[arg(long, value_name = "WHETHER")]
    pub local_readers: Option<LocalReaders>,
    /// With --prepare: pad the size to a multiple of this [default: the device's logical block]
    #[arg(long, value_name = "BYTES", requires = "prepare", value_parser = block_size)]
    pub block_size: Option<BlockSize>,
    /// Take the map that the file has now, as its next generation, though the record has another one
    ///
    /// For a file whose grant was ended because its map had changed: look at `fastice pins` first, and be sure that the
    /// file is what hosts shall see. A running `fastice serve` takes it up with its next reload.
    #[arg(long)]
    pub resume: bool,
    /// Stay in the foreground and hold all guards, until Ctrl-C
    #[arg(long)]
    pub hold: bool,
    /// Pin nothing, and tell what a pin would refuse, delay or only detect here, and what is out of its reach
    ///
    /// Tries it on a scratch file in a directory of its own beside the file (`.fastice-explain-*`), which is gone
    /// afterwards, also after Ctrl-C; only a `kill -9` leaves it. The file itself is only looked at. Takes some seconds.
    #[arg(long, conflicts_with_all = ["prepare", "resume", "hold"])]
    pub explain: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub state: StateDirArg,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub json: JsonFlag,
}

fn block_size(text: &str) -> Result<BlockSize, String> {
    match text {
        "512" => Ok(BlockSize::B512),
        "4096" => Ok(BlockSize::B4096),
        _ => Err("it is 512 or 4096".to_owned()),
    }
}

/// One pinned file, as `--json` prints it.
#[derive(Serialize)]
struct Pinned {
    path: String,
    generation: u64,
    size_bytes: u64,
    extents: usize,
    checksum: String,
    guard: GuardMode,
    local_readers: LocalReaders,
    /// At the beginning of the file, and not served.
    reserved_bytes: u64,
    guards: Vec<GuardDocument>,
}

#[derive(Serialize)]
struct GuardDocument {
    name: &'static str,
    /// Whether it is in force after this command.
    remains: bool,
    refuses: &'static str,
    delays: &'static str,
    detects: &'static str,
}

/// Pins the files, and with `--hold` waits.
///
/// # Errors
/// When the state directory cannot be used; what is wrong with single files is told, and decides the exit status.
pub fn run(args: &PinArgs) -> Outcome {
    if args.explain {
        let kind = (args.guard.unwrap_or_default(), args.local_readers.unwrap_or_default());
        return explain::run(&args.files, kind, &args.state.state_dir, args.json.json);
    }
    // Before any thread starts.
    let signals = if args.hold { Some(StopSignals::take()?) } else { None };
    let json = args.json.json;
    if args.resume {
        // Not to make one in which there is nothing to resume.
        named_state(&args.state.state_dir)?;
    }
    let state = open_state(&args.state.state_dir)?;
    let options = PinOptions {
        prepare: args.prepare,
        guard: args.guard,
        local_readers: args.local_readers,
        block_size: args.block_size,
        // What the operator had not pinned by himself goes on to end with whoever serves it.
        keep: !args.resume,
        accept_change: args.resume,
        warden: if args.hold { Some(start_warden()?) } else { None },
        update_mtime: false,
        on_recall: None,
    };
    let mut out = Out::stdout();
    let results = each(&args.files, json, |path| {
        if args.resume {
            required_record(&args.state.state_dir, path)?;
        }
        let pinned = pin(path, &options, &state, &mut Stages::of(path, json))?;
        let document = describe(&pinned, args.hold);
        if !json {
            tell(&document, &mut out)?;
        }
        Ok((pinned, document))
    });
    let (exit, errors) = (results.exit(), results.errors("path"));
    let (pins, documents): (Vec<PinnedFile>, Vec<Pinned>) = results.done.into_iter().unzip();
    if json {
        out.json(&serde_json::json!({ "pins": documents, "held": args.hold, "errors": errors }))?;
    } else if let Some(first) = documents.first() {
        tell_guards(first, args.hold, &mut out)?;
    }
    out.flush()?;
    let exit = match signals {
        Some(signals) if !pins.is_empty() => hold(&pins, &signals, json, &mut out)?.unwrap_or(exit),
        _ => exit,
    };
    pins.into_iter().for_each(PinnedFile::keep);
    Ok(exit)
}

/// One for all files of the command.
fn start_warden() -> Result<Arc<Warden>, Failure> {
    Warden::start(WatchOptions::default()).map_err(|error| {
        let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
        let (exit, remedy) = match denied {
            true => (Exit::Permission, "run as root: fanotify takes CAP_SYS_ADMIN"),
            false => (
                Exit::Refused,
                "see the system's message; the limits of fanotify are in /proc/sys/fs/fanotify",
            ),
        };
        Failure::new(exit, anyhow::Error::new(error).context("the guards cannot be started"))
            .with_remedy(remedy)
    })
}

fn describe(pinned: &PinnedFile, held: bool) -> Pinned {
    let map = pinned.map();
    let guards = pinned.guards().into_iter().map(|guard| GuardDocument {
        name: guard.name,
        remains: held || guard.outlives_process,
        refuses: guard.refuses,
        delays: guard.delays,
        detects: guard.detects,
    });
    Pinned {
        path: pinned.path().display().to_string(),
        generation: map.generation(),
        size_bytes: map.identity().size.get(),
        extents: map.extent_count(),
        checksum: hex(&map.checksum()),
        guard: pinned.guard_mode(),
        local_readers: pinned.local_readers(),
        reserved_bytes: map.identity().reserved.get(),
        guards: guards.collect(),
    }
}

fn tell(pinned: &Pinned, out: &mut Out) -> std::io::Result<()> {
    let (size, count) = (format_size(pinned.size_bytes), pinned.extents);
    out.line(format!(
        "{}: pinned, {size} in {count} extent(s), generation {}",
        pinned.path, pinned.generation
    ))?;
    if pinned.reserved_bytes > 0 {
        let (reserved, guard) = (pinned.reserved_bytes, pinned.guard);
        out.line(format!("    served from byte {reserved} on: what is before is the {guard} guard's"))?;
    }
    out.flush()
}

/// What keeps the files as they are from now on, and what not.
fn tell_guards(pinned: &Pinned, held: bool, out: &mut Out) -> std::io::Result<()> {
    out.line("")?;
    for guard in &pinned.guards {
        let state = if guard.remains { "in force now" } else { "while served" };
        out.line(format!("{state}  {}", guard.name))?;
        for (verb, what) in [("refuses", guard.refuses), ("delays", guard.delays), ("detects", guard.detects)]
        {
            if !what.is_empty() {
                out.line(format!("              {verb} {what}"))?;
            }
        }
    }
    if !held {
        out.line("\nWhat is in force now remains, and the record with it. `fastice serve` adds the rest, `fastice unpin` undoes it.")?;
    }
    out.flush()
}

/// Waits for Ctrl-C, or until a pin is recalled.
fn hold(
    pins: &[PinnedFile],
    signals: &StopSignals,
    json: bool,
    out: &mut Out,
) -> Result<Option<Exit>, Failure> {
    let watches: Vec<(RecallWatch, &Path)> =
        pins.iter().filter_map(|pin| Some((pin.recall()?, pin.path()))).collect();
    if !json {
        out.line("holding all guards; Ctrl-C lets go of those that need this process")?;
        out.flush()?;
    }
    let descriptors: Vec<_> = watches.iter().map(|(watch, _)| watch.as_fd()).collect();
    loop {
        match signals.wait(&descriptors, None)? {
            Wake::Asked(_) => return Ok(None),
            Wake::Timeout => {}
            Wake::Readable(index) => {
                let Some((watch, path)) = watches.get(index) else { continue };
                let why = watch.reason().map_or_else(String::new, |reason| format!(": {reason}"));
                let error = anyhow::anyhow!("the pin of {} was recalled{why}", path.display());
                let remedy = "find out who; `fastice map verify` tells whether the map is still the same";
                return Err(Failure::new(Exit::Differs, error).with_remedy(remedy));
            }
        }
    }
}
