//! Memory and limits: hugepages, locked memory, open files.

use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::cli::device::host::Host;
use crate::cli::device::hugepages::{Pool, pools};
use crate::config::{Config, DEFAULT_BUFFER_MEMORY, HostFacts, format_size};

const HUGEPAGE_BYTES: u64 = 2 << 20;
const GIGAPAGE_BYTES: u64 = 1 << 30;
/// Connections, files, rings and a reserve.
const OPEN_FILES_WANTED: u64 = 4096;
/// Bit of `CAP_IPC_LOCK`, which lifts the limit on locked memory (linux/capability.h).
pub(super) const CAP_IPC_LOCK: u8 = 14;

pub(super) fn check(checks: &mut Vec<Check>, host: &Host, config: Option<&Config>) {
    // Without a configuration, what `serve` takes by default: every allowed CPU.
    let cores = config
        .map_or_else(|| HostFacts::of_this_process().allowed_cores.len(), |config| config.cores.len())
        as u64;
    let a_core = config.map_or(DEFAULT_BUFFER_MEMORY, |config| config.buffer_memory).get();
    let needed = cores.saturating_mul(a_core);
    let pools = pools(host);
    checks.push(hugepages(&pools, needed, cores));
    if let Some(pool) = pools.iter().find(|pool| pool.page_bytes == GIGAPAGE_BYTES && pool.node.is_none()) {
        let text = format!("{} of {} free{}", pool.free, pool.total, by_node(&pools, GIGAPAGE_BYTES));
        checks.push(Check::info("hugepages-1g", text));
    }
    checks.push(locked_memory(needed));
    checks.push(open_files());
}

fn hugepages(pools: &[Pool], needed: u64, cores: u64) -> Check {
    const ID: &str = "hugepages-2m";
    let of_host = pools.iter().find(|pool| pool.page_bytes == HUGEPAGE_BYTES && pool.node.is_none());
    let Some(&Pool { free, total, .. }) = of_host else {
        return Check::unknown(ID, "this kernel has no 2 MiB hugepages; ordinary pages will be used");
    };
    let wanted = needed.div_ceil(HUGEPAGE_BYTES);
    let nodes = by_node(pools, HUGEPAGE_BYTES);
    let what = format!("{free} of {total} free{nodes}; {cores} core(s) use {wanted}");
    if free >= wanted {
        return Check::ok(ID, what);
    }
    let more = total.saturating_add(wanted.saturating_sub(free));
    let remedy = format!(
        "fastice device hugepages --count {more} --persist   (without, ordinary locked pages are used, somewhat \
         slower)"
    );
    Check::warn(ID, what, remedy)
}

/// How many pages of a size are free on each node, where there is more than one.
fn by_node(pools: &[Pool], page_bytes: u64) -> String {
    let of_nodes = pools.iter().filter(|pool| pool.page_bytes == page_bytes);
    let texts: Vec<String> =
        of_nodes.filter_map(|pool| Some(format!("node {}: {}", pool.node?, pool.free))).collect();
    if texts.len() > 1 { format!(" ({})", texts.join(", ")) } else { String::new() }
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
            format!(
                "limit {}, buffers are {}; VFIO counts what a device may reach against it, too",
                format_size(limit),
                format_size(needed)
            ),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Status;

    #[test]
    fn huge_pages_are_counted_by_node_and_what_is_missing_is_reserved() {
        let pool = |node, total, free| Pool {
            page_bytes: HUGEPAGE_BYTES,
            node,
            total,
            free,
            reserved: None,
            surplus: None,
        };
        let pools = [pool(None, 40, 30), pool(Some(0), 20, 20), pool(Some(1), 20, 10)];
        let check = hugepages(&pools, 60 << 20, 1);
        assert_eq!(check.status, Status::Ok);
        assert_eq!(check.detail, "30 of 40 free (node 0: 20, node 1: 10); 1 core(s) use 30");
        let check = hugepages(&pools, 64 << 20, 2);
        let remedy = check.remedy.expect("a remedy");
        assert!(remedy.starts_with("fastice device hugepages --count 42 --persist "), "{remedy}");
        assert_eq!(hugepages(&[], 2 << 20, 1).status, Status::Unknown);
    }
}
