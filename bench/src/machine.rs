//! Where a measurement was made.

use std::fs;

/// Processor, number of processors, kernel, whether there is a hypervisor, and whether this program was built by a profile.
#[must_use]
pub fn describe() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = field(&cpuinfo, "model name").unwrap_or("unknown processor");
    let guest = field(&cpuinfo, "flags").is_some_and(|flags| flags.split(' ').any(|f| f == "hypervisor"));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let place = if guest { "virtual machine" } else { "bare metal" };
    // Set by bench/tuned.sh.
    let build = if option_env!("FASTICE_TUNED").is_some() { ", profile-guided build" } else { "" };
    format!("{processor}, {processors} processors, {place}, Linux {}{build}", kernel.trim())
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
}
