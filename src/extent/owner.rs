//! Who holds a pin: a process, told apart from a later one with the same id by its start time and the boot.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The process that made a pin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// Its process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_time_ticks: u64,
    /// The boot in which it ran (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

impl Owner {
    /// This process.
    #[must_use]
    pub fn this_process() -> Self {
        let pid = std::process::id();
        Self { pid, start_time_ticks: start_time(pid).unwrap_or_default(), boot_id: boot_id() }
    }

    /// Whether that very process still runs. One that is being taken apart does not, though it may still have files open.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.is_of_this_boot() && start_time(self.pid) == Some(self.start_time_ticks)
    }

    /// Whether it ran since the last boot, as far as `/proc` tells.
    #[must_use]
    pub fn is_of_this_boot(&self) -> bool {
        let now = boot_id();
        now.is_empty() || self.boot_id.is_empty() || self.boot_id == now
    }

    /// The process of this boot that a file of the state directory is named after: PID-START, and what may follow.
    #[must_use]
    pub fn named_by(path: &Path) -> Option<Self> {
        let mut words = path.file_stem()?.to_str()?.split('-');
        let (pid, start_time_ticks) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Self { pid, start_time_ticks, boot_id: boot_id() })
    }

    /// What files of the process are named after.
    pub(super) const fn number(&self) -> (u32, u64) {
        (self.pid, self.start_time_ticks)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)
    }
}

/// The id of the running boot; empty when `/proc` does not tell.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// The flag of a task that is on its way out (`PF_EXITING` of `include/linux/sched.h`).
const EXITING: u64 = 4;

/// When process `pid` started, in ticks since boot; `None` when it has ended, or is about to.
fn start_time(pid: u32) -> Option<u64> {
    start_of(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The same, of what `/proc/PID/stat` holds.
fn start_of(stat: &str) -> Option<u64> {
    // The command name, field 2, may hold anything, also parentheses and spaces: count from the last one.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?;
    // A zombie, or dead: it runs no more, whether its parent has asked for its end or not.
    if matches!(state, "Z" | "X") {
        return None;
    }
    let flags: u64 = fields.nth(5)?.parse().ok()?;
    if flags & EXITING != 0 {
        return None;
    }
    fields.nth(12)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_its_past_and_future_selves_are_not() {
        let me = Owner::this_process();
        assert!(me.is_alive());
        assert!(!Owner { start_time_ticks: me.start_time_ticks + 1, ..me.clone() }.is_alive());
        assert!(!Owner { boot_id: "another".to_owned(), ..me.clone() }.is_alive());
        assert!(!Owner { pid: u32::MAX, ..me }.is_alive());
    }

    #[test]
    fn a_process_on_its_way_out_has_ended() {
        let stat = |state: &str, flags: u64| {
            let before_start =
                "1 2 3 4 -1 FLAGS 6 7 8 9 10 11 12 13 20 0 3 0".replace("FLAGS", &flags.to_string());
            format!("77 (a (b) c) {state} {before_start} 4711 18 19")
        };
        assert_eq!(start_of(&stat("S", 0x0040_0000)), Some(4711));
        assert_eq!(start_of(&stat("D", 0x0040_0004)), None);
        assert_eq!(start_of(&stat("Z", 0)), None);
        assert_eq!(start_of("77 (cut"), None);
    }

    #[test]
    fn a_process_that_nobody_has_asked_for_its_end_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let zombie = || fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap().contains(") Z ");
        while !zombie() {
            std::thread::yield_now();
        }
        assert_eq!(start_time(child.id()), None);
        child.wait().unwrap();
    }
}
