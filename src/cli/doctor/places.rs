//! The places on this host that the target uses: the state directory, addresses, files and the devices under them.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::Uid;

use super::Check;
use crate::cli::files::{existing_state, is_denied};
use crate::cli::pins::{self, PinRow, PinState};
use crate::config::{Backing, Config, DeviceWay, Listener};
use crate::control::check_listener;
use crate::extent::{stored_pin, survey};
use crate::units::BlockSize;

pub(super) fn check(checks: &mut Vec<Check>, state_dir: &Path) {
    checks.push(state_directory(state_dir));
    checks.push(leftover_pins(state_dir));
}

pub(super) fn check_config(checks: &mut Vec<Check>, config: &Config, path: Option<&Path>) {
    let name = path.unwrap_or(Path::new("the configuration")).display();
    let files = config.files().count();
    let (listeners, subsystems) = (config.listeners.len(), config.subsystems.len());
    let text = format!("{name} is good: {listeners} listener(s), {subsystems} subsystem(s), {files} file(s)");
    checks.push(Check::ok("config", text));
    checks.extend(config.listeners.iter().map(listener));
    for namespace in config.subsystems.iter().flat_map(|subsystem| &subsystem.namespaces) {
        let Backing::File { path, device, prepare, .. } = &namespace.backing else { continue };
        let access = if namespace.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        checks.push(match device {
            DeviceWay::HandedOver => handed_over(
                path,
                &config.state_dir,
                "unmount it and give its controller to fastice: `fastice device bind`",
            ),
            DeviceWay::Unmounted => handed_over(path, &config.state_dir, "unmount it"),
            DeviceWay::Uring => file(path, *prepare, Some(access), namespace.block_size),
            DeviceWay::Nvme => file(path, *prepare, None, namespace.block_size),
        });
    }
}

/// Where records can be written now, or created by the first pin.
fn state_directory(dir: &Path) -> Check {
    const ID: &str = "state-dir";
    let name = dir.display();
    let Some(existing) = dir.ancestors().find(|place| place.is_dir()) else {
        return Check::fail(ID, format!("{name}: no parent directory"), format!("mkdir -p {name}"));
    };
    if let Err(error) = probe_write(existing) {
        let remedy = state_remedy(dir, &error, rustix::process::geteuid());
        return Check::fail(ID, format!("{name} cannot be written: {error}"), remedy);
    }
    let volatile =
        rustix::fs::statfs(existing).is_ok_and(|fs| VOLATILE_MAGIC.contains(&i128::from(fs.f_type)));
    if volatile {
        return Check::warn(
            ID,
            format!("{name} is in memory: pin records are lost at a reboot, while immutable flags stay"),
            "choose a directory on a disk: state_dir in the configuration, or --state-dir",
        );
    }
    let state = if existing == dir { "writable" } else { "will be made by the first pin" };
    Check::ok(ID, format!("{name}: {state}"))
}

/// What lets this user write there.
fn state_remedy(dir: &Path, error: &io::Error, user: Uid) -> String {
    let name = dir.display();
    if error.kind() == io::ErrorKind::PermissionDenied && !user.is_root() {
        return format!(
            "run as root (sudo), as pinning and serving must be; or give it to this user: sudo install -d -m 700 -o {} \
             {name}",
            user.as_raw()
        );
    }
    format!(
        "choose a directory that can be written, by state_dir in the configuration or --state-dir, not {name}"
    )
}

/// Makes a file without a name, or, where the filesystem has no such files, a directory for a moment.
fn probe_write(dir: &Path) -> io::Result<()> {
    match rustix::fs::open(dir, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR) {
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let probe = dir.join(format!(".fastice-doctor-{}", std::process::id()));
            std::fs::create_dir(&probe)?;
            std::fs::remove_dir(&probe)
        }
        other => Ok(other.map(drop)?),
    }
}

/// tmpfs and ramfs (linux/magic.h).
const VOLATILE_MAGIC: [i128; 2] = [0x0102_1994, 0x8584_58f6];

/// Whether an address can be listened on, found by doing so for a moment.
fn listener(listener: &Listener) -> Check {
    const ID: &str = "listener";
    let address = listener.address;
    if let Err(error) = check_listener(listener) {
        return Check::fail(ID, error.to_string(), error.remedy().unwrap_or_default());
    }
    match TcpListener::bind(address) {
        Ok(_) => Check::ok(ID, format!("{address} is free")),
        Err(error) => {
            Check::fail(ID, format!("{address} cannot be listened on: {error}"), bind_remedy(address, &error))
        }
    }
}

fn bind_remedy(address: SocketAddr, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("ss -ltnp 'sport = :{}' shows who has it (fastice itself, if it runs)", address.port())
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("ip address add {} dev …, or correct the listener", address.ip())
        }
        io::ErrorKind::PermissionDenied => "use a port above 1023, or run as root".to_owned(),
        _ => "correct the listener".to_owned(),
    }
}

/// Whether there is a record of a file that is to be served without its filesystem. What the device holds is for `serve`
/// to see: it takes the controller.
fn handed_over(path: &Path, state_dir: &Path, when_mounted: &str) -> Check {
    const ID: &str = "file";
    let name = path.display();
    let remedy = format!("mount its filesystem, `fastice pin {name}`, unmount it");
    let stored = match existing_state(state_dir).map(|state| state.map(|state| stored_pin(path, &state))) {
        Ok(Some(stored)) => stored,
        Ok(None) => return Check::fail(ID, format!("{name} was never pinned here"), remedy),
        Err(error) => return Check::fail(ID, format!("{name}: {:#}", error.error), remedy),
    };
    match stored {
        Err(error) => Check::fail(ID, format!("{name} cannot be served unmounted: {error}"), remedy),
        Ok(_) if path.exists() => {
            Check::warn(ID, format!("{name} is pinned, and its filesystem is still mounted"), when_mounted)
        }
        Ok(stored) => {
            let generation = stored.generation;
            Check::ok(ID, format!("{name} is recorded (generation {generation}) and not mounted"))
        }
    }
}

/// Whether a file is fit to be pinned, and the disk under it can be opened as the `uring` device does. `None` for
/// `access` when our own driver reaches the disk: the kernel's node is then not opened.
fn file(path: &Path, prepare: bool, access: Option<OFlags>, block_size: Option<BlockSize>) -> Check {
    const ID: &str = "file";
    let name = path.display();
    let survey = match survey(path) {
        Ok(survey) => survey,
        Err(error) if is_denied(&error) => {
            return Check::info(ID, format!("{name} is held by a running process"));
        }
        Err(error) => {
            let cause =
                std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            return Check::fail(ID, format!("{error}{cause}"), error.remedy());
        }
    };
    let in_the_way = survey.violations.iter().find(|violation| !(prepare && violation.is_preparable()));
    if let Some(violation) = in_the_way {
        return Check::fail(ID, format!("{name} cannot be served: {violation}"), violation.remedy());
    }
    let cut_short = block_size.filter(|block| block.blocks_in(survey.facts.size).is_none());
    if let (Some(block), false) = (cut_short, prepare) {
        let size = survey.facts.size;
        let text =
            format!("{name} cannot be served: its {size} bytes are no multiple of block_size = {block}");
        return Check::fail(ID, text, "leave `block_size` out, or set `prepare = true`, which pads the file");
    }
    let Some(identity) = survey.identity() else {
        return Check::unknown(ID, format!("{name}: its disk is not known"));
    };
    let node = &identity.disk.node;
    let extents = survey.records.len();
    let state = if survey.violations.is_empty() { "fit" } else { "fit when prepared" };
    let text = format!("{name}: {state}, {extents} extent(s) on {}", node.display());
    let Some(access) = access else {
        return Check::ok(ID, format!("{text}, which our own driver is to reach"));
    };
    match rustix::fs::open(node, access | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Check::ok(ID, format!("{text}, which can be opened")),
        Err(error) => {
            let remedy = match error {
                rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => {
                    "run as root; if you are, boot with bdev_allow_write_mounted=1"
                }
                rustix::io::Errno::NOENT => "the device has no node in /dev: start udev, or mknod it",
                _ => "see the kernel log for the device",
            };
            Check::fail(ID, format!("{name} lies on {}: {}", node.display(), io::Error::from(error)), remedy)
        }
    }
}

/// Pins that no process holds: kept on purpose, or left by a run that died.
fn leftover_pins(state_dir: &Path) -> Check {
    const ID: &str = "pins";
    let rows = match existing_state(state_dir).map(|state| state.map(|state| pins::rows(&state))) {
        Ok(None) => return Check::ok(ID, "none recorded"),
        Ok(Some(Ok(rows))) => rows,
        Ok(Some(Err(error))) => return Check::unknown(ID, error.to_string()),
        Err(failure) => return Check::unknown(ID, failure.error.to_string()),
    };
    let guarded = rows.iter().filter(|row| row.state == PinState::Guarded).count();
    let is_away = |row: &PinRow| row.state == PinState::Unmounted;
    let is_kept = |row: &PinRow| row.kept && matches!(row.state, PinState::Immutable | PinState::ReadOnly);
    let kept = rows.iter().filter(|row| is_kept(row)).count();
    let fine = |row: &&PinRow| row.state == PinState::Guarded || is_kept(row) || is_away(row);
    let left: Vec<_> = rows.iter().filter(|row| !fine(row)).collect();
    let away = rows.iter().filter(|row| is_away(row)).count();
    let away = if away > 0 { format!(", {away} on filesystems that are not mounted") } else { String::new() };
    let text = format!("{guarded} guarded, {kept} kept until unpinned{away}");
    if left.is_empty() {
        return Check::ok(ID, text);
    }
    let listed: Vec<String> = left
        .iter()
        .map(|row| format!("{} ({}: {})", row.path.as_deref().unwrap_or("?"), row.state.word(), row.detail))
        .collect();
    // A damaged record does not tell its file.
    let files: Vec<&str> = left.iter().map(|row| row.path.as_deref().unwrap_or("FILE")).collect();
    let needs_force = |row: &&PinRow| {
        use PinState::{Immutable, Incomplete, ReadOnly, Unguarded};
        !matches!(row.state, Immutable | ReadOnly | Unguarded | Incomplete)
    };
    let force = if left.iter().any(needs_force) { " --force" } else { "" };
    let remedy = format!("serve them again, or let them go: fastice unpin{force} {}", files.join(" "));
    Check::warn(ID, format!("{text}; {}", listed.join(", ")), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Status;

    #[test]
    fn a_state_directory_is_writable_makeable_or_neither() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_ne!(state_directory(dir.path()).status, Status::Fail);
        assert_ne!(state_directory(&dir.path().join("a/b")).status, Status::Fail);
        assert_eq!(state_directory(Path::new("/proc/fastice")).status, Status::Fail);
    }

    #[test]
    fn who_may_not_write_records_is_told_to_be_root() {
        let denied = io::Error::from_raw_os_error(libc::EACCES);
        let dir = Path::new("/var/lib/fastice");
        let remedy = state_remedy(dir, &denied, Uid::from_raw(1000));
        assert!(remedy.starts_with("run as root"), "{remedy}");
        assert!(remedy.ends_with("sudo install -d -m 700 -o 1000 /var/lib/fastice"), "{remedy}");
        let full = io::Error::from_raw_os_error(libc::EROFS);
        assert!(state_remedy(dir, &full, Uid::from_raw(1000)).starts_with("choose a directory"));
        assert!(state_remedy(dir, &denied, Uid::ROOT).starts_with("choose a directory"));
    }

    #[test]
    fn an_address_in_use_is_found() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("its address");
        let mut one = Listener { address, discovery_only: false, advertise: None, congestion_control: None };
        let check = listener(&one);
        assert_eq!(check.status, Status::Fail);
        assert!(check.remedy.is_some_and(|remedy| remedy.contains("ss -ltnp")));
        one.congestion_control = Some("no-such-one".to_owned());
        let check = listener(&one);
        assert_eq!(check.status, Status::Fail);
        assert!(check.remedy.is_some_and(|remedy| remedy.contains("modprobe tcp_no-such-one")));
    }

    #[test]
    fn a_file_that_cannot_be_served_says_so() {
        for path in ["/proc/version", "/nonexistent"] {
            let check = file(Path::new(path), true, Some(OFlags::RDWR), None);
            assert_eq!((check.status, check.remedy.is_some()), (Status::Fail, true), "{path}");
        }
    }
}
