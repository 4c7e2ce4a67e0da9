//! Profiles of what is not met: `bench/profile.sh` runs the cases under perf and other tools, this makes their text.
//!
//! ```text
//!   table     which profile explains which rows
//!   windows   which side was measured when, noted by the bench while it runs
//!   samples   the processor of a target at work, by function, and the limit that follows
//!   host      the processor of SPDK's initiator beside each target, and what it can do at most
//!   shares    whose time the processors' is beside the kernel's initiator: target, initiator, fio
//!   lookups   the lookups of a turn among many extents, beside the same memory read bare
//!   pins      the processors while a large file is pinned, beside its map read bare
//!   wakes     the thread of a target under a light load: sleeps, wakes, who pushed it aside
//! ```
//!
//! What it does not do: run perf.

pub mod host;
pub mod lookups;
pub mod pins;
pub mod samples;
pub mod shares;
pub mod table;
pub mod wakes;
pub mod windows;

/// Begins the line of a profile that tells what its rows cannot get beyond.
pub const LIMIT: &str = "# limit: ";

/// A time that perf printed with nine places.
fn nanoseconds(text: &str) -> Option<u64> {
    let (seconds, rest) = text.split_once('.')?;
    if rest.len() != 9 {
        return None;
    }
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(rest.parse().ok()?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_time_has_nine_places() {
        assert_eq!(super::nanoseconds("849.988050200"), Some(849_988_050_200));
        assert_eq!(super::nanoseconds("849.988050"), None);
        assert_eq!(super::nanoseconds("x"), None);
    }
}
