//! Root gets past the mark, by the server's own descriptor or by a call that opens nothing, and breaks the pin.
//!
//! What the lease delays, no remote write outlives. What nothing delays is noticed by the watch, within the bound that it
//! tells of: until then hosts write blocks that may be another's already, and after the fence there must be no more.
//!
//! Two breaks are out of reach of prevention, and lose what was acknowledged before anybody can notice: extents exchanged
//! for a stale copy by deduplication into the server's own descriptor, and a truncation after the lease was taken away
//! through it. Of these it is checked that the half of the file which was not touched is whole, that they are noticed in
//! time, and that nothing is written any more then.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fastice::extent::{PinEvent, PinStep, StateDir};
use fastice::initiator::bench::{BenchOptions, BenchReport, Ledger};
use fastice::units::{ByteLen, ByteOffset};
use rustix::fs::Advice;

use crate::daemon::{Daemon, Lab, any_port, eventually, namespaces};
use crate::disk::{Disk, FILE_LEN};
use crate::load::{Load, options, units_behind};
use crate::loopfs::Spec;
use crate::modes::{DEFAULT, Mode, READERS, SWAP_FILE};
use crate::ops::{CHANGES, Change, EXT4, Leaves, On, PLAIN, XFS, has_file_setattr};
use crate::script::{Outcome, Scene};
use crate::thief::Thief;

/// How often the guard thread looks whether the watch is late.
const OVERSIGHT: Duration = Duration::from_millis(500);

/// How a pin ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Hosts are stopped before the change can happen.
    Before,
    /// The change has happened when it is noticed, and has taken no blocks: nobody has them before the server lets go.
    Held,
    /// The change has taken blocks when it is noticed.
    Noticed,
    /// Noticed, found to be nothing, and served again.
    Cleared,
}

/// What breaks a pin: a script, what it leaves of the file, and the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Break {
    pub(crate) change: Change,
    pub(crate) end: End,
}

/// Serves `files` of `disk` with pins of this kind.
pub(crate) fn serve(disk: &mut Disk, mode: &Mode) -> Daemon {
    let paths = disk.paths();
    let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let namespaces = namespaces(&paths).replace("file = ", &format!("{}file = ", mode.namespace));
    let config = disk.lab.config("", any_port(), &format!("allow_any_host = true\n{namespaces}"));
    let text = fs::read_to_string(&config).expect("the configuration");
    fs::write(&config, text.replace("cores = 2", "cores = 1")).expect("a configuration");
    let daemon = disk.lab.serve(&config);
    disk.know_areas();
    daemon
}

/// A host that leaves the others some of the processor.
pub(crate) fn gentle(address: SocketAddr, nsid: u32, seed: u64) -> BenchOptions {
    BenchOptions { queues: 1, depth: 3, ..options(address, nsid, seed) }
}

/// What became of the pin with this key.
pub(crate) fn events_of(lab: &Lab, key: &str) -> Vec<PinEvent> {
    let state = StateDir::open(lab.place("state")).expect("a state directory");
    state.events(key).expect("readable")
}

/// How long a change that nothing delays may go unnoticed, by what the target tells of itself.
pub(crate) fn bound(lab: &Lab) -> Duration {
    let status = lab.json(&["status", "--json"], 0);
    let exports = status["targets"][0]["exports"].as_array().expect("a target");
    let bounds = exports.iter().filter_map(|export| export["watch"]["bound_ms"].as_u64());
    Duration::from_millis(bounds.max().expect("a watched export")) + OVERSIGHT
}

/// A served file under load in both halves. All changes are in the second.
pub(crate) struct Victim {
    pub(crate) path: PathBuf,
    key: String,
    reserved: u64,
    seeds: [u64; 2],
    loads: [Load; 2],
}

/// The same when hosts have given up.
pub(crate) struct Outlived {
    path: PathBuf,
    reserved: u64,
    seeds: [u64; 2],
    runs: [(BenchReport, Ledger); 2],
}

impl Victim {
    pub(crate) fn start(disk: &mut Disk, address: SocketAddr, number: usize, seed: u64) -> Self {
        let path = disk.path(number);
        let identity = disk.record(&path).identity;
        let (key, reserved) = (identity.key(), identity.reserved.get());
        let seeds = [seed, seed + 1];
        seeds.iter().for_each(|seed| disk.expect_run(*seed, &path));
        let nsid = u32::try_from(number).expect("small");
        let half = |index: u64| {
            Load::begin(BenchOptions {
                start: ByteOffset(index * (FILE_LEN / 2 - reserved)),
                span: (index == 0).then_some(ByteLen(FILE_LEN / 2 - reserved)),
                reconnect: None,
                ..gentle(address, nsid, seed + index)
            })
        };
        let loads = [half(0), half(1)];
        loads.iter().for_each(Load::goes_on);
        Self { path, key, reserved, seeds, loads }
    }

    /// Waits until it is `end`ed: what became of it.
    pub(crate) fn await_end(&self, lab: &Lab, end: End) -> Vec<PinEvent> {
        let mut events = Vec::new();
        eventually("the pin ends", || {
            events = events_of(lab, &self.key);
            match (end, events.last().map(|event| event.step)) {
                (End::Cleared, Some(PinStep::Cleared)) => true,
                (End::Before | End::Held | End::Noticed, Some(PinStep::Kept | PinStep::Released)) => true,
                (_, Some(PinStep::NotDrained)) => panic!("not drained: {events:?}"),
                _ => false,
            }
        });
        // A fence that is up again after a moment may meet no command.
        if end != End::Cleared {
            self.loads.iter().for_each(Load::is_refused);
        }
        events
    }

    pub(crate) fn end_hosts(self, what: &str) -> Outlived {
        let runs = self.loads.map(|load| load.end().unwrap_or_else(|error| panic!("{what}: {error}")));
        Outlived { path: self.path, reserved: self.reserved, seeds: self.seeds, runs }
    }
}

impl Outlived {
    /// What was acknowledged must be in the file, as far as `change` leaves it there.
    pub(crate) fn check(self, disk: &mut Disk, what: &str, end: End, change: &Change) {
        let donor = self.path.with_file_name("donor");
        let is_deduped = change.name == DEDUPED;
        if change.copies {
            let to = if is_deduped { &donor } else { &self.path };
            disk.copied(self.seeds[1], to);
        }
        for (half, (report, mut ledger)) in self.runs.into_iter().enumerate() {
            // Until it is noticed, a host may read what is another's.
            let excused = end == End::Noticed && half == 1;
            assert!(report.verify.faults == 0 || excused, "{what}: {report:?}");
            assert!(report.errors > 0 || end == End::Cleared, "{what}: nobody told the host: {report:?}");
            let path = match (change.leaves, half) {
                (Leaves::Both, _) | (Leaves::First, 0) => &self.path,
                (Leaves::InDonor, _) => &donor,
                (Leaves::First | Leaves::Nothing, _) => {
                    if is_deduped {
                        let (lost, known) = units_lost(&mut ledger, &self.path);
                        println!("{what}: of {known} units, {lost} were exchanged for older ones");
                    }
                    continue;
                }
            };
            // Still served, it is read through fastice, which leaves out what is reserved.
            let read = (end == End::Cleared).then(|| read_served(&disk.lab, path));
            let units = match read {
                Some(read) => units_behind(&mut ledger, &read, 0),
                None => units_behind(&mut ledger, path, self.reserved),
            };
            assert!(units > 0, "{what}: {report:?}");
        }
    }
}

/// How many units are not what was acknowledged, and of how many that is known.
fn units_lost(ledger: &mut Ledger, path: &Path) -> (u64, u64) {
    let file = fs::File::open(path).expect("the file is free");
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("advice");
    let audit = ledger.audit(|offset, data| file.read_exact_at(data, offset.get())).expect("readable");
    (audit.faults, audit.units_checked)
}

/// A copy of what a served file holds, which nobody but fastice can read.
fn read_served(lab: &Lab, path: &Path) -> PathBuf {
    let copy = lab.place("read");
    fs::write(&copy, lab.fastice(&["read"], &[path], 0).stdout).expect("room");
    copy
}

/// The one way in which the filesystem itself takes acknowledged writes from a file before it is noticed.
const DEDUPED: &str = "dedupe_into_rdonly, flag cleared";

/// What breaks the default pin past the mark, before any change through a descriptor of its own.
pub(crate) const BREAKS: &[Break] = &[
    broken(
        "truncate_shrink, flag cleared",
        Leaves::First,
        End::Before,
        "cleared(); truncate($f, H) or fail();",
    ),
    broken("truncate_same, flag cleared", Leaves::Both, End::Before, "cleared(); truncate($f, L) or fail();"),
    broken(
        "truncate_grow, flag cleared",
        Leaves::Both,
        End::Before,
        "cleared(); truncate($f, L + Q) or fail();",
    ),
    broken(
        "truncate_shrink, file_setattr",
        Leaves::First,
        End::Before,
        "clear_flag_by_path(); truncate($f, H) or fail();",
    ),
    // The blocks of a file without a name go with the last descriptor, and that is the server's.
    broken("unlink, flag cleared", Leaves::Nothing, End::Held, "cleared(); unlink($f) or fail();"),
    broken("chattr_-i", Leaves::Both, End::Held, "cleared();"),
    broken("chattr_-i, file_setattr", Leaves::Both, End::Held, "clear_flag_by_path();"),
    broken(
        "touched",
        Leaves::Both,
        End::Cleared,
        "my $s = stolen(); my $was = flags($s); clear_flag($s); set_flags($s, $was);",
    ),
    on(
        On::Xfs,
        broken("chattr_+d", Leaves::Both, End::Cleared, "my $s = stolen(); set_flags($s, flags($s) | 0x40);"),
    ),
    on(
        On::Reflink,
        broken(
            "ficlone_from",
            Leaves::Both,
            End::Held,
            "cloned(stolen(), opened(\"$dir/clone\", O_RDWR | O_CREAT));",
        ),
    ),
    on(
        On::Reflink,
        broken(
            DEDUPED,
            Leaves::First,
            End::Noticed,
            "my ($s, $d, $unit) = (stolen(), opened(\"$dir/donor\", O_RDWR | O_CREAT), 65536); \
             for my $i (H / $unit .. L / $unit - 1) { \
                 sysseek($s, $i * $unit, 0); sysread($s, my $data, $unit); written($d, $i * $unit, $data); \
             } \
             synced($d); clear_flag($s); \
             for my $i (H / $unit .. L / $unit - 1) { deduped($d, $s, $i * $unit, $unit); }",
        ),
    ),
    broken(
        "truncate_shrink, lease taken away",
        Leaves::First,
        End::Noticed,
        "my $s = stolen(); fcntl($s, 1024, 2) or fail(); clear_flag($s); truncate($f, H) or fail();",
    ),
];

/// What breaks the swap-file pin, as far as anything does: the area refuses what the cleared flag would let through.
pub(crate) const SWAP_BREAKS: &[Break] = &[
    broken("chattr_-i", Leaves::Both, End::Held, "cleared();"),
    broken("chattr_-i, file_setattr", Leaves::Both, End::Held, "clear_flag_by_path();"),
    in_vain("truncate_shrink, flag cleared", On::All, "cleared_unseen(); truncate($f, H) or fail();"),
    in_vain(
        "dedupe_into_rdonly, flag cleared",
        On::Reflink,
        "my $d = donor(); deduped($d, cleared_unseen(), H, Q);",
    ),
    in_vain("unlink, flag cleared", On::All, "cleared_unseen(); unlink($f) or fail();"),
    broken(
        "touched",
        Leaves::Both,
        End::Cleared,
        "my $s = stolen(); my $was = flags($s); clear_flag($s); set_flags($s, $was);",
    ),
    broken(
        "bind mount over it",
        Leaves::Both,
        End::Held,
        "system(\"mount --bind '$dir/../filler' '$f' && sleep 0.3; umount '$f'\") == 0 or die;",
    ),
];

/// What breaks the default pin by a descriptor of a reader, where readers are let in.
pub(crate) const READER_BREAKS: &[Break] = &[
    broken("chattr_-i", Leaves::Both, End::Held, "clear_flag(opened($f, O_RDONLY));"),
    broken("chattr_-i, file_setattr", Leaves::Both, End::Held, "clear_flag_by_path();"),
    broken(
        "chattr_+a",
        Leaves::Both,
        End::Held,
        "my $r = opened($f, O_RDONLY); set_flags($r, flags($r) & ~0x10 | 0x20);",
    ),
    broken(
        "fssetx_extsize",
        Leaves::Both,
        End::Held,
        "my $attr = pack('LLLLLx8', 0, 0, 0, 0, 0); told(ioctl(opened($f, O_RDONLY), 0x401c5820, $attr));",
    ),
    broken(
        "touched",
        Leaves::Both,
        End::Cleared,
        "my $r = opened($f, O_RDONLY); my $was = flags($r); clear_flag($r); set_flags($r, $was);",
    ),
    broken(
        "truncate_shrink, flag cleared",
        Leaves::First,
        End::Before,
        "clear_flag(opened($f, O_RDONLY)); truncate($f, H) or fail();",
    ),
    broken(
        "open_trunc, flag cleared",
        Leaves::Nothing,
        End::Before,
        "clear_flag(opened($f, O_RDONLY)); broken_in($f, O_RDWR | O_TRUNC);",
    ),
    broken(
        "unlink, flag cleared",
        Leaves::Nothing,
        End::Held,
        "clear_flag(opened($f, O_RDONLY)); unlink($f) or fail();",
    ),
    // A descriptor to read moves no blocks, whatever the flags.
    refused_by(
        libc::EBADF,
        on(
            On::Ext4,
            broken(
                "ext4_swapboot by a reader, flag cleared",
                Leaves::Both,
                End::Held,
                "my $r = opened($f, O_RDONLY); clear_flag($r); told(ioctl($r, 0x6611, 0));",
            ),
        ),
    ),
];

const fn refused_by(errno: i32, broken: Break) -> Break {
    Break { change: Change { must_fail: true, may_fail: Some(errno), ..broken.change }, ..broken }
}

/// Nothing comes of it but that the pin ends, and that only later: the area is ended then, and refuses nothing any more.
const fn in_vain(name: &'static str, on: On, perl: &'static str) -> Break {
    let broken = broken(name, Leaves::Both, End::Held, perl);
    let errno = if matches!(name.as_bytes()[0], b'u') { libc::EPERM } else { libc::ETXTBSY };
    Break { change: Change { on, must_fail: true, may_fail: Some(errno), ..broken.change }, ..broken }
}

pub(crate) const fn broken(name: &'static str, leaves: Leaves, end: End, perl: &'static str) -> Break {
    let change = Change { name, on: On::All, perl, leaves, copies: false, must_fail: false, may_fail: None };
    Break { change, end }
}

const fn on(on: On, broken: Break) -> Break {
    // Deduplication writes what hosts wrote to another file first.
    let copies = matches!((on, broken.change.leaves), (On::Reflink, Leaves::First));
    Break { change: Change { on, copies, ..broken.change }, ..broken }
}

/// One break of the pin of file `number`, by this script.
pub(crate) fn break_pin(
    disk: &mut Disk,
    daemon: (&Daemon, Duration),
    number: usize,
    broken: &Break,
    perl: &str,
) {
    break_it(disk, daemon, number, broken, perl, false);
}

/// The same for a guard that must be `lifted` by the script before anybody can write to the filesystem.
pub(crate) fn break_it(
    disk: &mut Disk,
    (daemon, bound): (&Daemon, Duration),
    number: usize,
    broken: &Break,
    perl: &str,
    is_lifted: bool,
) {
    let Break { change, end } = broken;
    let victim = Victim::start(disk, daemon.address(), number, 1000 * number as u64);
    let what = format!("{}, file {number}: {}", disk.spec().kind, change.name);
    // Where nobody can write before the break, nobody waits for it.
    let waiting = (!is_lifted).then(|| Thief::waiting_on(disk, *end));
    let outcome = Scene::new(disk, daemon, &victim.path).run(perl, None);
    let done = SystemTime::now();
    let may_fail = change.may_fail.map(Outcome::Errno);
    let is_done = outcome == Outcome::Done && !change.must_fail;
    assert!(is_done || Some(outcome) == may_fail, "{what}: {outcome:?}: {}", daemon.log());
    let mut thief = waiting.unwrap_or_else(|| Thief::waiting_on(disk, *end));
    thief.grow();
    let events = victim.await_end(&disk.lab, *end);
    assert_fenced_by(&what, &events, done + if *end == End::Before { Duration::ZERO } else { bound });
    let outlived = thief.assert_alone(&what, *end, || victim.end_hosts(&what));
    outlived.check(disk, &what, *end, change);
    assert_eq!(disk.strays(), [], "{what}");
    drop(thief);
    clean(&disk.directory());
}

/// The fence was down at this time.
pub(crate) fn assert_fenced_by(what: &str, events: &[PinEvent], by: SystemTime) {
    let at = |step| events.iter().find(|event| event.step == step).map(|event| event.at_ms);
    let told: Vec<_> = events.iter().map(|event| (event.step, event.at_ms, event.detail.as_str())).collect();
    println!("{what}: {told:?}");
    let by = u64::try_from(by.duration_since(UNIX_EPOCH).expect("a time").as_millis()).expect("small");
    assert!(
        at(PinStep::Fenced).is_some_and(|fenced| fenced <= by),
        "{what}: fenced later than {by}: {told:?}"
    );
    assert!(at(PinStep::Drained).is_some(), "{what}: {told:?}");
}

pub(crate) fn clean(directory: &Path) {
    for name in ["donor", "clone", "copy"] {
        let _ = fs::remove_file(directory.join(name));
    }
}

/// All breaks that `spec` knows, and their scripts: what gets past the guards, and what is possible once they let go.
pub(crate) fn breaks_of(mode: &Mode, spec: &Spec) -> Vec<(Break, String)> {
    let past_the_guards = mode.breaks.iter().map(|broken| (*broken, broken.change.perl.to_owned()));
    let is_chosen = |change: &&Change| mode.changes.is_empty() || mode.changes.contains(&change.name);
    let when_let_go = CHANGES.iter().filter(is_chosen).map(|change| {
        let perl = format!("{} {}", mode.broken_in, change.perl);
        (Break { change: *change, end: End::Before }, perl)
    });
    let by_path = has_file_setattr();
    past_the_guards
        .chain(when_let_go)
        .filter(|(broken, perl)| broken.change.on.fits(spec) && (by_path || !perl.contains("by_path")))
        .collect()
}

/// Every `parts`-th break from the `part`-th on.
fn every_break_is_met(mode: &Mode, spec: &Spec, (part, parts): (usize, usize)) {
    let breaks: Vec<_> = breaks_of(mode, spec).into_iter().skip(part).step_by(parts).collect();
    let Some(mut disk) = Disk::new(mode.name, spec, breaks.len()) else { return };
    let daemon = serve(&mut disk, mode);
    let bound = bound(&disk.lab);
    for (number, (broken, perl)) in (1..).zip(&breaks) {
        break_pin(&mut disk, (&daemon, bound), number, broken, perl);
    }
    daemon.stop();
    disk.unpin_all();
    disk.check();
}

#[test]
fn every_break_is_met_on_xfs_with_reflink_1() {
    every_break_is_met(&DEFAULT, &XFS, (0, 2));
}

#[test]
fn every_break_is_met_on_xfs_with_reflink_2() {
    every_break_is_met(&DEFAULT, &XFS, (1, 2));
}

#[test]
fn every_break_is_met_on_xfs_without_reflink_1() {
    every_break_is_met(&DEFAULT, &PLAIN, (0, 2));
}

#[test]
fn every_break_is_met_on_xfs_without_reflink_2() {
    every_break_is_met(&DEFAULT, &PLAIN, (1, 2));
}

#[test]
fn every_break_is_met_on_ext4_1() {
    every_break_is_met(&DEFAULT, &EXT4, (0, 2));
}

#[test]
fn every_break_is_met_on_ext4_2() {
    every_break_is_met(&DEFAULT, &EXT4, (1, 2));
}

#[test]
fn every_break_of_a_swap_file_is_met_on_xfs_with_reflink() {
    every_break_is_met(&SWAP_FILE, &XFS, (0, 1));
}

#[test]
fn every_break_of_a_swap_file_is_met_on_ext4() {
    every_break_is_met(&SWAP_FILE, &EXT4, (0, 1));
}

#[test]
fn every_break_beside_readers_is_met_on_ext4() {
    every_break_is_met(&READERS, &EXT4, (0, 1));
}
