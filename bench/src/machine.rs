//! Where a measurement was made.

use std::fs;
use std::process::Command;

/// Before the name of the congestion control.
pub(crate) const CONGESTION: &str = ", TCP by ";
/// Names the commit where there is no repository, or one that the run itself changes.
const COMMIT: &str = "FASTICE_BENCH_COMMIT";

/// Processor, number of processors, kernel, whether there is a hypervisor, the congestion control that the kernel gives to whoever chooses
/// none, whether this program was built by a profile, and the commit of the directory that it is run in, where that is known.
#[must_use]
pub fn describe() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = field(&cpuinfo, "model name").unwrap_or("unknown processor");
    let guest = field(&cpuinfo, "flags").is_some_and(|flags| flags.split(' ').any(|f| f == "hypervisor"));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let place = if guest { "virtual machine" } else { "bare metal" };
    let congestion = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
    let congestion = match congestion.trim() {
        "" => String::new(),
        name => format!("{CONGESTION}{name}"),
    };
    // Set by bench/tuned.sh.
    let build = if option_env!("FASTICE_TUNED").is_some() { ", profile-guided build" } else { "" };
    let commit = commit().map_or_else(String::new, |commit| format!(", fastice {commit}"));
    format!(
        "{processor}, {processors} processors, {place}, Linux {}{congestion}{build}{commit}",
        kernel.trim()
    )
}

fn commit() -> Option<String> {
    let told = match std::env::var(COMMIT) {
        Ok(commit) => commit,
        Err(_) => {
            let described = Command::new("git").args(["describe", "--always", "--dirty"]).output().ok()?;
            String::from_utf8(described.stdout).ok()?
        }
    };
    Some(told.trim().to_owned()).filter(|commit| !commit.is_empty())
}

/// The instruction sets by which libraries choose how they copy and add up: the best one that is there.
#[must_use]
pub fn level() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "avx512";
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            return "avx2";
        }
        if std::arch::is_x86_feature_detected!("avx") {
            return "avx";
        }
    }
    std::env::consts::ARCH
}

/// The caches for data that the kernel tells of, of the first processor: the level of each and its bytes. None where it does not tell.
#[must_use]
pub fn caches() -> Vec<(u32, u64)> {
    let place = std::path::Path::new("/sys/devices/system/cpu/cpu0/cache");
    let indices = fs::read_dir(place).into_iter().flatten().flatten();
    let mut caches: Vec<_> = indices
        .filter_map(|index| {
            let of = |name: &str| fs::read_to_string(index.path().join(name)).ok();
            (of("type")?.trim() != "Instruction").then_some(())?;
            Some((of("level")?.trim().parse().ok()?, bytes(of("size")?.trim())?))
        })
        .collect();
    caches.sort_unstable();
    caches
}

/// Of a size as the kernel writes it.
fn bytes(size: &str) -> Option<u64> {
    let (number, unit) = match size.strip_suffix('K') {
        Some(number) => (number, 1 << 10),
        None => (size.strip_suffix('M')?, 1 << 20),
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
    Some(line.split_once(':')?.1.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "model\t\t: 17\nmodel name\t: Some CPU\nflags\t\t: fpu hypervisor sse\n";
        assert_eq!(field(text, "model name"), Some("Some CPU"));
        assert_eq!(field(text, "model"), Some("17"));
        assert_eq!(field(text, "bogomips"), None);
    }

    #[test]
    fn a_cache_has_as_many_bytes_as_its_size_says() {
        assert_eq!(bytes("512K"), Some(524_288));
        assert_eq!(bytes("16M"), Some(16_777_216));
        assert_eq!(bytes("512"), None);
        // A machine may tell of none; of those that it tells, none is empty.
        assert!(caches().iter().all(|&(level, bytes)| level > 0 && bytes > 0));
    }
}
