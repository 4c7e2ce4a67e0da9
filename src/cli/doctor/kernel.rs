//! What the kernel must bring: its version, io_uring, filesystems, how it was configured.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::{Check, read_trimmed};
use crate::config::Config;

/// `BLK_DEV_WRITE_MOUNTED`, on which the remedy below rests, came with 6.8; multi-shot and fixed-buffer features
/// that `ring` wants are older.
const KERNEL_WANTED: (u32, u32) = (6, 1);

pub(super) fn check(checks: &mut Vec<Check>, serving: Option<&Config>) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    checks.push(version(&release));
    checks.push(io_uring());
    let config = KernelConfig::read(&release);
    let wanted = Wanted::by(serving);
    filesystems(checks, &release);
    checks.push(write_mounted(&config, wanted));
    checks.push(fanotify(&config));
    checks.push(nvme_host(&release));
}

fn version(release: &str) -> Check {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Check::unknown("kernel", format!("Linux {release}"));
    };
    if (major, minor) >= KERNEL_WANTED {
        return Check::ok("kernel", format!("Linux {release}"));
    }
    let (wanted_major, wanted_minor) = KERNEL_WANTED;
    let remedy = format!("run Linux {wanted_major}.{wanted_minor} or newer");
    Check::fail("kernel", format!("Linux {release} is older than fastice was made for"), remedy)
}

/// Sets up a small ring: the sysctl, seccomp filters and memory limits all have their say.
fn io_uring() -> Check {
    const ID: &str = "io-uring";
    let disabled = read_trimmed("/proc/sys/kernel/io_uring_disabled");
    match io_uring::IoUring::new(8) {
        Ok(_) => Check::ok(ID, "a ring can be set up"),
        Err(error) => {
            let remedy = match (disabled.as_deref(), error.raw_os_error()) {
                (Some("1" | "2"), _) => "sysctl -w kernel.io_uring_disabled=0",
                (_, Some(libc::ENOSYS)) => "use a kernel with CONFIG_IO_URING=y",
                (_, Some(libc::ENOMEM)) => "raise the locked memory limit: ulimit -l unlimited",
                _ => "allow io_uring in the seccomp profile of the container or the unit",
            };
            Check::fail(ID, format!("no ring can be set up: {error}"), remedy)
        }
    }
}

fn filesystems(checks: &mut Vec<Check>, release: &str) {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    for (id, name) in [("xfs", "xfs"), ("ext4", "ext4")] {
        let loaded = known.lines().any(|line| line.split_whitespace().last() == Some(name));
        checks.push(match (loaded, has_module(release, name)) {
            (true, _) => Check::ok(id, "the kernel has it"),
            (false, Some(true)) => Check::ok(id, "there is a module for it"),
            (false, Some(false)) => Check::info(id, "this kernel has it not: files on it cannot be served"),
            (false, None) => Check::unknown(id, "not loaded, and the list of modules cannot be read"),
        });
    }
}

/// Whether a module exists or is built in; `None` when the lists are not there.
pub(super) fn has_module(release: &str, name: &str) -> Option<bool> {
    let lists = ["modules.dep", "modules.builtin"]
        .map(|list| std::fs::read_to_string(format!("/lib/modules/{release}/{list}")).ok());
    if lists.iter().all(Option::is_none) {
        return None;
    }
    let same = |stem: &str| stem.replace('-', "_") == name.replace('-', "_");
    let names = |line: &str| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        same(file.split(".ko").next().unwrap_or_default())
    };
    Some(lists.iter().flatten().any(|list| list.lines().any(names)))
}

/// Whether block devices that carry mounted filesystems are to be opened for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// Without a configuration nobody knows.
    Unknown,
    No,
    Yes,
}

impl Wanted {
    fn by(config: Option<&Config>) -> Self {
        match config.map(super::choices::writes_kernel_disks) {
            None => Self::Unknown,
            Some(false) => Self::No,
            Some(true) => Self::Yes,
        }
    }
}

fn write_mounted(config: &KernelConfig, wanted: Wanted) -> Check {
    const ID: &str = "write-mounted";
    const FORBIDDEN: &str = "the kernel forbids writing to mounted block devices";
    const REMEDY: &str = "boot with bdev_allow_write_mounted=1 on the kernel command line";
    match config.value("CONFIG_BLK_DEV_WRITE_MOUNTED") {
        Some("y") => Check::ok(ID, "mounted block devices may be opened for writing"),
        Some(_) if booted_with("bdev_allow_write_mounted") => {
            Check::ok(ID, "mounted block devices may be opened for writing (kernel command line)")
        }
        Some(_) if wanted == Wanted::No => {
            Check::info(ID, format!("{FORBIDDEN}; nothing in the configuration needs that"))
        }
        Some(_) if wanted == Wanted::Unknown => {
            let detail =
                format!("{FORBIDDEN}: with device = \"uring\" only read_only namespaces can be served");
            Check::warn(ID, detail, REMEDY)
        }
        Some(_) => {
            let detail = format!("{FORBIDDEN}: namespaces with device = \"uring\" must be read_only");
            Check::fail(ID, detail, REMEDY)
        }
        None if config.text.is_some() => Check::ok(ID, "this kernel is older than the option to forbid it"),
        None if wanted == Wanted::No => Check::ok(ID, "nothing in the configuration needs it"),
        None => {
            Check::unknown(ID, "the kernel's configuration cannot be read; `fastice serve` will find out")
        }
    }
}

fn booted_with(name: &str) -> bool {
    let line = read_trimmed("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().any(|word| {
        word.strip_prefix(name).is_some_and(|rest| matches!(rest, "" | "=1" | "=y" | "=on" | "=true"))
    })
}

fn fanotify(config: &KernelConfig) -> Check {
    const ID: &str = "fanotify";
    match config.value("CONFIG_FANOTIFY_ACCESS_PERMISSIONS") {
        Some("y") => Check::ok(ID, "opens of pinned files can be denied"),
        None if config.text.is_none() => {
            Check::unknown(ID, "the kernel's configuration cannot be read; `fastice pin` will find out")
        }
        _ => Check::fail(
            ID,
            "this kernel cannot deny opens, one of the guards of a pin",
            "use a kernel with CONFIG_FANOTIFY_ACCESS_PERMISSIONS=y, as all big distributions build it",
        ),
    }
}

fn nvme_host(release: &str) -> Check {
    let cli = ["/usr/sbin/nvme", "/sbin/nvme", "/usr/bin/nvme", "/usr/local/sbin/nvme"];
    let tool = if cli.iter().any(|path| std::path::Path::new(path).exists()) {
        ""
    } else {
        " (nvme-cli is not installed)"
    };
    let loaded = std::path::Path::new("/sys/module/nvme_tcp").exists();
    let text = match (loaded, has_module(release, "nvme-tcp")) {
        (true, _) => "this host can also be an NVMe/TCP initiator: nvme_tcp is loaded",
        (false, Some(true)) => "this host can also be an NVMe/TCP initiator: modprobe nvme-tcp",
        (false, _) => {
            "this host has no NVMe/TCP initiator; other hosts, and `fastice bench`, connect all the same"
        }
    };
    Check::info("nvme-tcp", format!("{text}{tool}"))
}

/// How the running kernel was built, when it tells.
struct KernelConfig {
    text: Option<String>,
}

impl KernelConfig {
    fn read(release: &str) -> Self {
        let places = [
            PathBuf::from(format!("/boot/config-{release}")),
            PathBuf::from(format!("/lib/modules/{release}/config")),
        ];
        let plain = places.iter().find_map(|path| std::fs::read_to_string(path).ok());
        Self { text: plain.or_else(Self::unzip) }
    }

    /// `/proc/config.gz` through gzip, which every distribution has.
    fn unzip() -> Option<String> {
        let mut gzip = Command::new("gzip");
        let output =
            gzip.args(["-dc", "/proc/config.gz"]).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `y`, `m` or a value; `n` for what is not set; `None` for what the kernel does not know.
    fn value(&self, name: &str) -> Option<&str> {
        let text = self.text.as_deref()?;
        text.lines().find_map(|line| {
            if let Some(value) = line.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')) {
                return Some(value);
            }
            let unset = line.strip_prefix("# ")?.strip_suffix(" is not set")?;
            (unset == name).then_some("n")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Status;

    #[test]
    fn kernel_versions_compare_as_numbers() {
        assert_eq!(version("6.12.41+deb13-amd64").status, Status::Ok);
        assert_eq!(version("6.1.0-9-amd64").status, Status::Ok);
        assert_eq!(version("5.15.0").status, Status::Fail);
        assert_eq!(version("10.0").status, Status::Ok);
        assert_eq!(version("next").status, Status::Unknown);
    }

    #[test]
    fn kernel_options_are_set_unset_or_unknown() {
        let text = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_AB=m\n".to_owned();
        let config = KernelConfig { text: Some(text) };
        assert_eq!(config.value("CONFIG_A"), Some("y"));
        assert_eq!(config.value("CONFIG_B"), Some("n"));
        assert_eq!(config.value("CONFIG_AB"), Some("m"));
        assert_eq!(config.value("CONFIG_C"), None);
        assert_eq!(write_mounted(&KernelConfig { text: None }, Wanted::Unknown).status, Status::Unknown);
    }

    #[test]
    fn a_kernel_that_protects_mounted_disks_fails_only_who_writes_to_them() {
        if booted_with("bdev_allow_write_mounted") {
            eprintln!(
                "SKIPPED: a_kernel_that_protects_mounted_disks_fails_only_who_writes_to_them: booted with it"
            );
            return;
        }
        let text = "# CONFIG_BLK_DEV_WRITE_MOUNTED is not set\n".to_owned();
        let config = KernelConfig { text: Some(text) };
        let status = |wanted| write_mounted(&config, wanted).status;
        assert_eq!(status(Wanted::No), Status::Info);
        assert_eq!(status(Wanted::Yes), Status::Fail);
        let check = write_mounted(&config, Wanted::Unknown);
        assert_eq!(check.status, Status::Warn);
        assert!(check.detail.contains("device = \"uring\""), "{check:?}");
    }
}
