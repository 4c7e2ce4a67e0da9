//! `fastice device hugepages`: what huge pages there are, and how to have more, now and after a reboot.
//!
//! ```text
//!   /sys/kernel/mm/hugepages/hugepages-2048kB/           the host: nr, free, resv, surplus _hugepages
//!   /sys/devices/system/node/node0/hugepages/...         one NUMA node
//!   /etc/tmpfiles.d/fastice-hugepages.conf               --persist: written to the above at each boot by systemd
//! ```
//!
//! A number written to the host's pool is spread over the nodes by the kernel; one written to a node's pool is met
//! there or not at all.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::error::DeviceError;
use super::host::Host;
use super::kernel::{Kernel, Running};
use crate::cli::exit::{Exit, Failure, Outcome};
use crate::cli::out::{JsonFlag, Out};
use crate::config::{format_size, parse_size};
use crate::durable;
use crate::units::ByteLen;

const HOST_POOLS: &str = "sys/kernel/mm/hugepages";
const NODES: &str = "sys/devices/system/node";
const COMPACT: &str = "proc/sys/vm/compact_memory";
const SNIPPET: &str = "etc/tmpfiles.d/fastice-hugepages.conf";
/// 512 GiB of the smallest huge pages: more is a slip of the keyboard.
const COUNT_MAX: u64 = 1 << 18;
/// One part in so many of all memory stays for everything else.
const KEPT_PART: u64 = 16;

/// Show the huge pages of this host, or reserve some
///
/// Numbers are those of the whole pool, not what is added: `--count 0` gives everything unused back. Buffers of
/// `fastice serve` use 2 MiB pages; `fastice doctor` says how many.
#[derive(Clone, Debug, Args)]
pub struct HugepagesArgs {
    /// Have so many pages
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=COUNT_MAX))]
    pub count: Option<u64>,
    /// Have pages for so many bytes, such as 2GiB
    #[arg(long, value_name = "SIZE", conflicts_with = "count", value_parser = parse_size)]
    pub size: Option<ByteLen>,
    /// The size of a page: 2MiB or 1GiB
    #[arg(long, value_name = "SIZE", default_value = "2MiB", value_parser = parse_size)]
    pub page_size: ByteLen,
    /// On this NUMA node [default: the kernel spreads them over all nodes]
    #[arg(long, value_name = "NODE")]
    pub node: Option<u32>,
    /// After each boot, too: write a snippet to /etc/tmpfiles.d
    #[arg(long)]
    pub persist: bool,
    #[command(flatten)]
    pub json: JsonFlag,
}

/// The huge pages of one size, of the host or of one NUMA node, as `--json` prints them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct Pool {
    pub(in crate::cli) page_bytes: u64,
    /// `None` is the whole host.
    pub(in crate::cli) node: Option<u32>,
    pub(in crate::cli) total: u64,
    pub(in crate::cli) free: u64,
    /// Promised to somebody, but not yet touched; they count as free. Only of the host.
    pub(in crate::cli) reserved: Option<u64>,
    /// Beyond the number that was asked for, and gone when unused.
    pub(in crate::cli) surplus: Option<u64>,
}

/// What came of a reservation, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Reservation {
    page_bytes: u64,
    node: Option<u32>,
    wanted: u64,
    before: u64,
    got: u64,
    /// The snippet that asks for them at each boot.
    persisted: Option<PathBuf>,
}

/// Every pool of the host: for each size that of the host, then those of the nodes.
pub(in crate::cli) fn pools(host: &Host) -> Vec<Pool> {
    let mut found = Vec::new();
    for name in host.names(HOST_POOLS) {
        let Some(page_bytes) = page_bytes(&name) else { continue };
        found.extend(pool(host, &format!("{HOST_POOLS}/{name}"), page_bytes, None));
        for node in nodes(host) {
            let directory = format!("{NODES}/node{node}/hugepages/{name}");
            found.extend(pool(host, &directory, page_bytes, Some(node)));
        }
    }
    found
}

fn pool(host: &Host, directory: &str, page_bytes: u64, node: Option<u32>) -> Option<Pool> {
    let count = |name: &str| host.number(format!("{directory}/{name}_hugepages"));
    Some(Pool {
        page_bytes,
        node,
        total: count("nr")?,
        free: count("free")?,
        reserved: count("resv"),
        surplus: count("surplus"),
    })
}

fn nodes(host: &Host) -> impl Iterator<Item = u32> {
    host.names(NODES).into_iter().filter_map(|name| name.strip_prefix("node")?.parse().ok())
}

/// `hugepages-2048kB`.
fn page_bytes(name: &str) -> Option<u64> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The attribute that says how many pages a pool has.
fn attribute(page_bytes: u64, node: Option<u32>) -> String {
    let name = format!("hugepages-{}kB/nr_hugepages", page_bytes / 1024);
    match node {
        Some(node) => format!("{NODES}/node{node}/hugepages/{name}"),
        None => format!("{HOST_POOLS}/{name}"),
    }
}

/// Shows the pools; first makes one as large as asked for.
///
/// # Errors
/// When there is no such pool, or the kernel or the filesystem refuses. Fewer pages than asked for end with 1.
pub(super) fn run(args: &HugepagesArgs) -> Outcome {
    let host = Host::system();
    let reservation = match wanted(args)? {
        Some(count) => Some(reserve(&host, &Running, args, count)?),
        None => None,
    };
    let pools = pools(&host);
    let fewer = reservation.as_ref().filter(|reservation| reservation.got < reservation.wanted);
    let remedy = fewer.map(remedy);
    let mut out = Out::stdout();
    if args.json.json {
        let document = serde_json::json!({ "pools": pools, "reservation": reservation, "remedy": remedy });
        out.json(&document)?;
    } else {
        print(&mut out, &pools, reservation.as_ref())?;
    }
    out.flush()?;
    match (fewer, remedy) {
        (Some(_), Some(remedy)) if !args.json.json => {
            // The result is on standard output; what is to be done about it belongs to the errors.
            let _ = writeln!(std::io::stderr(), "error: fewer huge pages than asked for\n  remedy: {remedy}");
            Ok(Exit::Failed)
        }
        (Some(_), _) => Ok(Exit::Failed),
        _ => Ok(Exit::Ok),
    }
}

/// How many pages are asked for.
fn wanted(args: &HugepagesArgs) -> Result<Option<u64>, Failure> {
    let usage = |text: &str| Failure::new(Exit::Usage, anyhow::anyhow!("{text}"));
    let page = args.page_size.get();
    let count = match (args.count, args.size) {
        (Some(count), _) => count,
        (None, Some(size)) => {
            let count = size.get().checked_div(page).unwrap_or(0);
            if count.checked_mul(page) != Some(size.get()) || count > COUNT_MAX {
                return Err(usage("--size must be a multiple of --page-size, and no more than 2^18 pages"));
            }
            count
        }
        (None, None) if args.node.is_some() || args.persist => {
            return Err(usage("--node and --persist need to know how many: add --count or --size"));
        }
        (None, None) => return Ok(None),
    };
    Ok(Some(count))
}

fn reserve(
    host: &Host,
    kernel: &dyn Kernel,
    args: &HugepagesArgs,
    wanted: u64,
) -> Result<Reservation, Failure> {
    let (page_bytes, node) = (args.page_size.get(), args.node);
    let place = attribute(page_bytes, node);
    let missing = || {
        let sizes: Vec<String> = pools(host)
            .iter()
            .filter(|pool| pool.node.is_none())
            .map(|pool| format_size(pool.page_bytes))
            .collect();
        let text = match node {
            Some(node) => format!("no huge pages of {} on a node {node}", format_size(page_bytes)),
            None => format!("no huge pages of {}", format_size(page_bytes)),
        };
        let remedy = format!(
            "this host has pages of {}, on nodes {:?}",
            sizes.join(" and "),
            nodes(host).collect::<Vec<_>>()
        );
        Failure::new(Exit::Usage, anyhow::anyhow!(text)).with_remedy(remedy)
    };
    let before = host.number(&place).ok_or_else(missing)?;
    leave_room(host, node, wanted.saturating_sub(before).saturating_mul(page_bytes))?;
    let write = |path: &str, value: &str| {
        let path = host.path(path);
        kernel.write(&path, value).map_err(|source| DeviceError::io("write", &path, source))
    };
    write(&place, &wanted.to_string())?;
    let mut got: u64 = host.number(&place).ok_or_else(missing)?;
    if got < wanted && host.exists(COMPACT) {
        // Free memory may only be in pieces: have the kernel put it together, and ask again.
        write(COMPACT, "1")?;
        write(&place, &wanted.to_string())?;
        got = host.number(&place).ok_or_else(missing)?;
    }
    let persisted = if args.persist { Some(persist(host, page_bytes, node, wanted)?) } else { None };
    Ok(Reservation { page_bytes, node, wanted, before, got, persisted })
}

/// Refuses to take what the host needs to live: the kernel gives its last page, and then ends processes.
fn leave_room(host: &Host, node: Option<u32>, more_bytes: u64) -> Result<(), Failure> {
    let place = node.map_or("proc/meminfo".to_owned(), |node| format!("{NODES}/node{node}/meminfo"));
    let table = host.text(place).unwrap_or_default();
    let available = match node {
        None => meminfo_bytes(&table, "MemAvailable:"),
        // A node does not tell what could be freed: what is free, and the page cache, is the most it can be.
        Some(_) => meminfo_bytes(&table, "MemFree:")
            .and_then(|free| free.checked_add(meminfo_bytes(&table, "FilePages:")?)),
    };
    let (Some(available), Some(total)) = (available, meminfo_bytes(&table, "MemTotal:")) else {
        return Ok(());
    };
    let room = available.saturating_sub(total / KEPT_PART);
    if more_bytes <= room {
        return Ok(());
    }
    let text = format!(
        "{} more in huge pages would leave too little: {} can be spared",
        format_size(more_bytes),
        format_size(room)
    );
    let failure = Failure::new(Exit::Refused, anyhow::anyhow!(text));
    Err(failure.with_remedy("ask for fewer pages, or free memory first"))
}

/// A line of a table such as `/proc/meminfo`, in bytes.
fn meminfo_bytes(table: &str, name: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| line.split_once(name).map(|(_, rest)| rest))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Has systemd ask for the pages at each boot; what the snippet says of other pools stays.
fn persist(host: &Host, page_bytes: u64, node: Option<u32>, count: u64) -> Result<PathBuf, DeviceError> {
    let path = host.path(SNIPPET);
    let directory = path.parent().unwrap_or(&path);
    fs::create_dir_all(directory)
        .map_err(|source| DeviceError::io("make the directory", directory, source))?;
    let text = snippet(&host.text(SNIPPET).unwrap_or_default(), page_bytes, node, count);
    durable::replace(&path, |file| {
        file.get_ref().set_permissions(fs::Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())
    })
    .map_err(|source| DeviceError::io("write", &path, source))?;
    Ok(path)
}

/// `tmpfiles.d(5)`: type, path, mode, user, group, age, argument.
fn snippet(old: &str, page_bytes: u64, node: Option<u32>, count: u64) -> String {
    let size = format!("hugepages-{}kB/", page_bytes / 1024);
    let own = format!("/{}", attribute(page_bytes, node));
    let is_of_host = |path: &str| path.starts_with(&format!("/{HOST_POOLS}/"));
    // The host's number and those of the nodes contradict each other.
    let replaced = |path: &str| path == own || (path.contains(&size) && (node.is_none() || is_of_host(path)));
    let mut lines = vec!["# Huge pages, written by `fastice device hugepages --persist`.".to_owned()];
    for line in old.lines().filter(|line| line.starts_with("w ")) {
        if !line.split_whitespace().nth(1).is_some_and(replaced) {
            lines.push(line.to_owned());
        }
    }
    lines.push(format!("w {own} - - - - {count}"));
    lines.join("\n") + "\n"
}

/// What helps when the kernel gave fewer pages than asked for.
fn remedy(reservation: &Reservation) -> String {
    let size = reservation.page_bytes >> 20;
    let unit = if size >= 1024 { format!("{}G", size >> 10) } else { format!("{size}M") };
    let node = reservation.node.map(|node| format!("{node}:")).unwrap_or_default();
    format!(
        "free memory, or reserve them before it is used up: add `hugepagesz={unit} hugepages={node}{}` to the \
         kernel command line and reboot",
        reservation.wanted
    )
}

fn print(out: &mut Out, pools: &[Pool], reservation: Option<&Reservation>) -> std::io::Result<()> {
    if let Some(Reservation { page_bytes, node, wanted, before, got, persisted }) = reservation {
        let place = node.map_or("on the host".to_owned(), |node| format!("on node {node}"));
        let size = format_size(*page_bytes);
        out.line(format!("{got} pages of {size} {place}: {wanted} wanted, {before} before"))?;
        if let Some(path) = persisted {
            out.line(format!("{} asks for {wanted} at each boot (systemd-tmpfiles)", path.display()))?;
        }
    }
    if pools.is_empty() {
        return out.line("this kernel has no huge pages");
    }
    let number = |count: Option<u64>| count.map_or("-".to_owned(), |count| count.to_string());
    let row = |pool: &Pool| {
        [
            format_size(pool.page_bytes),
            pool.node.map_or("all".to_owned(), |node| node.to_string()),
            pool.total.to_string(),
            pool.free.to_string(),
            number(pool.reserved),
            number(pool.surplus),
        ]
    };
    let rows: Vec<_> = pools.iter().map(row).collect();
    out.table(["page ", "node ", "total ", "free ", "reserved ", "surplus "], &rows)
}

#[cfg(test)]
mod tests;
