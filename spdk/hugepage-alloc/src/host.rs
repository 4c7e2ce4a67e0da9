//! What the host has: NUMA nodes, and huge pages reserved and free. Read from `/sys`.

use std::path::PathBuf;

use crate::Pages;

const NODES: &str = "/sys/devices/system/node";

/// The NUMA nodes of the host that have memory, lowest first; only node 0 when the kernel does not tell.
#[must_use]
pub fn numa_nodes() -> Vec<u32> {
    let text = ["has_memory", "online"]
        .iter()
        .find_map(|name| std::fs::read_to_string(format!("{NODES}/{name}")).ok());
    match text.as_deref().and_then(parse_list) {
        Some(nodes) if !nodes.is_empty() => nodes,
        _ => vec![0],
    }
}

/// Huge pages of one size, of the host or of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePageCounts {
    /// Pages in the pool (`nr_hugepages`).
    pub total: usize,
    /// Pages that nobody has taken (`free_hugepages`). Some may be promised already.
    pub free: usize,
    /// Those of the pool that leave it when they are given back (`surplus_hugepages`): more were reserved once.
    pub surplus: usize,
}

impl HugePageCounts {
    /// Counts the huge pages of one size, of the host or of `node`. `None` when the kernel has no such pages or the
    /// host no such node.
    #[must_use]
    pub fn read(pages: Pages, node: Option<u32>) -> Option<Self> {
        let directory = Self::directory(pages, node)?;
        let count = |name| std::fs::read_to_string(directory.join(name)).ok()?.trim().parse().ok();
        Some(Self {
            total: count("nr_hugepages")?,
            free: count("free_hugepages")?,
            surplus: count("surplus_hugepages")?,
        })
    }

    /// Where the kernel shows the counts; `nr_hugepages` in it is where root reserves more. `None` for ordinary
    /// pages.
    #[must_use]
    pub fn directory(pages: Pages, node: Option<u32>) -> Option<PathBuf> {
        if pages == Pages::Ordinary {
            return None;
        }
        let name = format!("hugepages-{}kB", pages.len() / 1024);
        Some(match node {
            Some(node) => PathBuf::from(format!("{NODES}/node{node}/hugepages/{name}")),
            None => PathBuf::from(format!("/sys/kernel/mm/hugepages/{name}")),
        })
    }
}

/// Numbers in the kernel's list format, such as `0-2,7`.
fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        // No kernel has more nodes than that.
        if last > 4096 {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_kernel_are_read() {
        assert_eq!(parse_list("0\n"), Some(vec![0]));
        assert_eq!(parse_list("0-2,7,9-9"), Some(vec![0, 1, 2, 7, 9]));
        assert_eq!(parse_list("\n"), Some(vec![]));
        assert_eq!(parse_list("0-x"), None);
        assert_eq!(parse_list("0-4294967295"), None);
    }

    #[test]
    fn there_is_a_node_and_ordinary_pages_are_not_counted() {
        assert!(!numa_nodes().is_empty());
        assert_eq!(HugePageCounts::read(Pages::Ordinary, None), None);
        assert_eq!(HugePageCounts::read(Pages::Huge2M, Some(4000)), None);
    }
}
