//! What a process, and the kernel for its sockets, has in memory.

use std::fs;

use anyhow::{Context, Result};

/// Of one process, in KiB (`proc_pid_smaps(5)`). Pages of hugetlbfs are in neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resident {
    /// All that is resident, the text of the program included.
    pub(super) all_kib: u64,
    /// What is locked of it: the buffers of the cores.
    pub(super) locked_kib: u64,
}

impl Resident {
    pub(super) fn of(pid: u32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        Self::parse(&text).context("smaps_rollup is not as it was")
    }

    fn parse(text: &str) -> Option<Self> {
        Some(Self { all_kib: field(text, "Rss:")?, locked_kib: field(text, "Locked:")? })
    }

    /// All but the buffers.
    pub(super) fn beside_buffers_kib(self) -> f64 {
        self.all_kib.saturating_sub(self.locked_kib) as f64
    }
}

/// What the kernel has allocated in small pieces, and for data in TCP sockets, in KiB, for all processes.
pub(super) fn kernel_kib() -> Result<f64> {
    let slab = fs::read_to_string("/proc/meminfo")?;
    let slab_kib = field(&slab, "Slab:").context("/proc/meminfo tells no Slab")?;
    let sockets = fs::read_to_string("/proc/net/sockstat")?;
    let pages = tcp_pages(&sockets).context("/proc/net/sockstat tells no TCP mem")?;
    let page_kib = rustix::param::page_size() as u64 >> 10;
    Ok((slab_kib + pages * page_kib) as f64)
}

/// `TCP: inuse 5 orphan 0 tw 0 alloc 7 mem 1`
fn tcp_pages(sockstat: &str) -> Option<u64> {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP:"))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "mem");
    words.nth(1)?.parse().ok()
}

/// `Rss:    1234 kB`
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffers_are_what_is_locked() {
        let text =
            "00400000-7fff [rollup]\nRss:               73728 kB\nPss:  9 kB\nLocked:            65536 kB\n";
        let resident = Resident::parse(text).unwrap();
        assert_eq!(resident, Resident { all_kib: 73728, locked_kib: 65536 });
        assert!((resident.beside_buffers_kib() - 8192.0).abs() < 1e-9);
        assert_eq!(Resident::parse("Rss: 12 kB\n"), None);
    }

    #[test]
    fn memory_of_sockets_is_told_in_pages() {
        let text = "sockets: used 12\nTCP: inuse 5 orphan 0 tw 0 alloc 7 mem 31\nUDP: inuse 1 mem 2\n";
        assert_eq!(tcp_pages(text), Some(31));
        assert_eq!(tcp_pages("UDP: inuse 1 mem 2\n"), None);
    }

    #[test]
    fn this_process_is_in_memory() {
        assert!(Resident::of(std::process::id()).unwrap().all_kib > 0);
        assert!(kernel_kib().unwrap() > 0.0);
    }
}
