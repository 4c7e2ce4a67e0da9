//! Memory and limits: hugepages, locked memory, open files.

use rustix::process::{Resource, getrlimit};

use super::{Check, read_trimmed};
use crate::config::{Config, DEFAULT_BUFFER_MEMORY, HostFacts, format_size};

const HUGEPAGE_BYTES: u64 = 2 << 20;
/// Connections, files, rings and a reserve.
const OPEN_FILES_WANTED: u64 = 4096;
/// Bit of `CAP_IPC_LOCK`, which lifts the limit on locked memory (linux/capability.h).
pub(super) const CAP_IPC_LOCK: u8 = 14;

pub(super) fn check(checks: &mut Vec<Check>, config: Option<&Config>) {
    // Without a configuration, what `serve` takes by default: every allowed CPU.
    let cores = config
        .map_or_else(|| HostFacts::of_this_process().allowed_cores.len(), |config| config.cores.len())
        as u64;
    let a_core = config.map_or(DEFAULT_BUFFER_MEMORY, |config| config.buffer_memory).get();
    let needed = cores.saturating_mul(a_core);
    checks.push(hugepages(needed, cores));
    if let Some(free) = pages("1048576kB", "free_hugepages") {
        checks.push(Check::info("hugepages-1g", format!("{free} free")));
    }
    checks.push(locked_memory(needed));
    checks.push(open_files());
}

fn pages(size: &str, what: &str) -> Option<u64> {
    read_trimmed(&format!("/sys/kernel/mm/hugepages/hugepages-{size}/{what}"))?.parse().ok()
}

fn hugepages(needed: u64, cores: u64) -> Check {
    const ID: &str = "hugepages-2m";
    let (Some(free), Some(all)) = (pages("2048kB", "free_hugepages"), pages("2048kB", "nr_hugepages")) else {
        return Check::unknown(ID, "this kernel has no 2 MiB hugepages; ordinary pages will be used");
    };
    let wanted = needed.div_ceil(HUGEPAGE_BYTES);
    let what = format!("{free} of {all} free; {cores} core(s) use {wanted}");
    if free >= wanted {
        return Check::ok(ID, what);
    }
    let more = all.saturating_add(wanted.saturating_sub(free));
    let remedy = format!(
        "sysctl -w vm.nr_hugepages={more}   (without, ordinary locked pages are used, somewhat slower)"
    );
    Check::warn(ID, what, remedy)
}

fn locked_memory(needed: u64) -> Check {
    const ID: &str = "memlock";
    if has_capability(CAP_IPC_LOCK) == Some(true) {
        return Check::ok(ID, "no limit for this process (CAP_IPC_LOCK)");
    }
    match getrlimit(Resource::Memlock).current {
        None => Check::ok(ID, "no limit"),
        Some(limit) if limit >= needed => Check::ok(ID, format!("limit {}", format_size(limit))),
        Some(limit) => Check::warn(
            ID,
            format!("limit {}, buffers are {}", format_size(limit), format_size(needed)),
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit",
        ),
    }
}

fn open_files() -> Check {
    const ID: &str = "open-files";
    match getrlimit(Resource::Nofile).current {
        None => Check::ok(ID, "no limit"),
        Some(limit) if limit >= OPEN_FILES_WANTED => Check::ok(ID, format!("limit {limit}")),
        Some(limit) => Check::warn(
            ID,
            format!("limit {limit}: few connections fit"),
            format!("ulimit -n {OPEN_FILES_WANTED}, or LimitNOFILE=65536 in the systemd unit"),
        ),
    }
}

/// Whether this process has a capability in effect; `None` when `/proc` does not tell.
pub(super) fn has_capability(bit: u8) -> Option<bool> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let set = u64::from_str_radix(line.trim(), 16).ok()?;
    Some(set.checked_shr(u32::from(bit)).is_some_and(|rest| rest & 1 == 1))
}
