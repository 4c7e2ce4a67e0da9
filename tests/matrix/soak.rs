//! The operations in random order, at random moments, from a seed that repeats them.
//!
//! `SOAK_SECONDS` makes it run for so long, with a seed of its own that is told; `SOAK_SEED` repeats one round.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::broken::{bound, break_pin, breaks_of, gentle, serve};
use crate::daemon::Daemon;
use crate::disk::Disk;
use crate::load::{Load, units_behind};
use crate::modes::{DEFAULT, Mode, READERS, SWAP_FILE};
use crate::ops::{EXT4, PLAIN, XFS};
use crate::refused::try_one;

/// Files of one round: one that nobody breaks, and victims.
const FILES: usize = 4;
/// The seeds of a short run: each filesystem twice.
const SHORT: std::ops::Range<u64> = 1..7;

/// Small and good enough: splitmix64.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((word ^ (word >> 31)) % sides as u64).expect("small")
    }

    fn pause(&mut self) {
        std::thread::sleep(Duration::from_millis(self.throw(100) as u64));
    }
}

/// A filesystem, one daemon, and as many breaks as there are victims, with vain attempts before each.
fn round(seed: u64) {
    let mut dice = Dice(seed);
    let specs = [&XFS, &PLAIN, &EXT4];
    // Neighbours among seeds have different filesystems.
    let spec = specs[usize::try_from(seed % 3).expect("small")];
    let mode = match dice.throw(4) {
        0 => &SWAP_FILE,
        1 if spec.kind == "ext4" => &READERS,
        _ => &DEFAULT,
    };
    let Some(mut disk) = Disk::new("random operations", spec, FILES) else { return };
    let daemon = serve(&mut disk, mode);
    let bound = bound(&disk.lab);
    let (bystander_seed, path) = (900_000, disk.path(1));
    disk.expect_run(bystander_seed, &path);
    let bystander = Load::start(gentle(daemon.address(), 1, bystander_seed));
    let breaks = breaks_of(mode, spec);
    for number in 2..=FILES {
        for _ in 0..dice.throw(4) {
            vain_attempt(&mut dice, mode, &disk, &daemon, &path);
        }
        dice.pause();
        let (broken, perl) = &breaks[dice.throw(breaks.len())];
        println!("seed {seed}, {}, {}: {} on file {number}", spec.kind, mode.name, broken.change.name);
        break_pin(&mut disk, (&daemon, bound), number, broken, perl);
    }
    let (_, mut ledger) = bystander.end_clean();
    daemon.stop();
    assert!(units_behind(&mut ledger, &path, mode.reserved) > 100);
    disk.unpin_all();
    disk.check();
}

fn vain_attempt(dice: &mut Dice, mode: &Mode, disk: &Disk, daemon: &Daemon, path: &Path) {
    try_one(dice.throw(usize::MAX), mode, disk, daemon, path);
    dice.pause();
}

/// A round that tells how it is repeated when it fails.
fn told_round(seed: u64) {
    if let Err(panic) = std::panic::catch_unwind(|| round(seed)) {
        println!("FAILED: to repeat it: SOAK_SEED={seed} make soak");
        std::panic::resume_unwind(panic);
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn random_operations_in_random_order_harm_nobody() {
    if let Some(seed) = number("SOAK_SEED") {
        return round(seed);
    }
    let Some(seconds) = number("SOAK_SECONDS") else {
        return SHORT.for_each(told_round);
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time").as_secs();
    let (started, patience) = (Instant::now(), Duration::from_secs(seconds));
    println!("seeds from {now} on, for {patience:?}");
    let rounds =
        (now..).take_while(|_| started.elapsed() < patience).inspect(|seed| told_round(*seed)).count();
    println!("{rounds} rounds in {:?}", started.elapsed());
}
