//! What this process may do, and how much time it has when somebody wants a file back.

use super::limits::{CAP_IPC_LOCK, has_capability};
use super::{Check, Status, read_trimmed};

/// Capabilities by their bit (linux/capability.h), and what each is for.
const CAPABILITIES: [(u8, &str, &str, Status); 4] = [
    (21, "CAP_SYS_ADMIN", "to deny opens of pinned files", Status::Fail),
    (9, "CAP_LINUX_IMMUTABLE", "to make pinned files immutable", Status::Fail),
    (28, "CAP_LEASE", "to hold leases on files of other users", Status::Fail),
    (CAP_IPC_LOCK, "CAP_IPC_LOCK", "to lock I/O buffers", Status::Warn),
];
/// With less than this there is hardly time to drain and fence.
const LEASE_BREAK_SECONDS_MIN: u64 = 10;

pub(super) fn check(checks: &mut Vec<Check>) {
    checks.push(capabilities());
    checks.push(lease_break_time());
}

fn capabilities() -> Check {
    const ID: &str = "capabilities";
    let mut missing = Vec::new();
    let mut worst = Status::Ok;
    for (bit, name, purpose, status) in CAPABILITIES {
        match has_capability(bit) {
            Some(true) => {}
            None => return Check::unknown(ID, "/proc/self/status does not tell"),
            Some(false) => {
                missing.push(format!("{name} ({purpose})"));
                worst = if worst == Status::Fail { worst } else { status };
            }
        }
    }
    let detail = format!("missing: {}", missing.join(", "));
    let remedy = "run as root, or with AmbientCapabilities= in the systemd unit";
    match worst {
        Status::Ok => Check::ok(ID, "all that pinning needs"),
        Status::Fail => Check::fail(ID, detail, remedy),
        _ => Check::warn(ID, detail, remedy),
    }
}

fn lease_break_time() -> Check {
    let text = read_trimmed("/proc/sys/fs/lease-break-time");
    lease_break_check(text.and_then(|text| text.parse::<u64>().ok()))
}

fn lease_break_check(seconds: Option<u64>) -> Check {
    const ID: &str = "lease-break";
    match seconds {
        None => Check::unknown(ID, "/proc/sys/fs/lease-break-time cannot be read"),
        // To the kernel that is no limit (`fs/locks.c`).
        Some(0) => Check::ok(ID, "no limit of time to let a file go when somebody forces it open"),
        Some(seconds) if seconds >= LEASE_BREAK_SECONDS_MIN => {
            Check::ok(ID, format!("{seconds} s to let a file go when somebody forces it open"))
        }
        Some(seconds) => Check::warn(
            ID,
            format!("only {seconds} s to let a file go when somebody forces it open"),
            "sysctl -w fs.lease-break-time=45",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_break_time_of_0_is_no_limit_and_a_short_one_is_warned_of() {
        let told = lease_break_check(Some(0));
        assert_eq!(told.status, Status::Ok);
        assert!(told.detail.contains("no limit"), "{}", told.detail);
        assert_eq!(lease_break_check(Some(LEASE_BREAK_SECONDS_MIN)).status, Status::Ok);
        let short = lease_break_check(Some(1));
        assert_eq!(short.status, Status::Warn);
        assert!(short.remedy.is_some_and(|remedy| remedy.contains("45")));
        assert_eq!(lease_break_check(None).status, Status::Unknown);
    }
}
