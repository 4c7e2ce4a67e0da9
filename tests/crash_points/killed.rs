//! Killed at every point.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::IFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::lab::{CHANGES, Lab, PATIENCE, was_killed};
use super::loopfs::Spec;

#[test]
fn pin_is_killed_at_every_step() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("pin killed", &spec) else { return };
        let points = lab.every_point(CHANGES, &["pin", lab.name()], |_| {}, || {});
        println!("{}: {points} points", spec.kind);
        assert!(points > 20, "{points}");
    }
}

#[test]
fn unpin_is_killed_at_every_step() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("unpin killed", &spec) else { return };
        let points = lab.every_point(
            CHANGES,
            &["unpin", lab.name()],
            |lab| {
                let output = lab.fastice(&["pin", lab.name()]).output().expect("the binary runs");
                assert!(output.status.success(), "{output:?}");
            },
            || {},
        );
        println!("{}: {points} points", spec.kind);
        assert!(points > 8, "{points}");
    }
}

#[test]
fn with_a_swap_area_pin_and_unpin_are_killed_at_every_step() {
    // Without what only the state directory and the log see, which the default guards have tried.
    let calls = ["pwrite64", "swapon", "swapoff", "ioctl", "fsync", "fanotify_mark"];
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::for_swap("swap area, killed", &spec) else { return };
        let pin = ["pin", "--guard", "swap-file", lab.name()];
        let (pinning, unpinning) = pin_and_unpin_at_every_point(&lab, &calls, &pin);
        println!("{}: {pinning} and {unpinning} points", spec.kind);
        assert!(pinning > 10 && unpinning > 6, "{pinning} {unpinning}");
    }
}

#[test]
fn with_a_frozen_filesystem_pin_and_unpin_are_killed_at_every_step() {
    let calls = ["ioctl", "fsync", "rename", "unlink", "fanotify_mark"];
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(mut lab) = Lab::new("frozen, killed", &spec) else { return };
        lab.freezes = true;
        let pin = ["pin", "--guard", "frozen-filesystem", lab.name()];
        let (pinning, unpinning) = pin_and_unpin_at_every_point(&lab, &calls, &pin);
        println!("{}: {pinning} and {unpinning} points", spec.kind);
        assert!(pinning > 10 && unpinning > 6, "{pinning} {unpinning}");
    }
}

/// Kills the command that pins at every point of these calls, and then the one that unpins: how many points each has.
fn pin_and_unpin_at_every_point(lab: &Lab, calls: &[&str], pin: &[&str]) -> (u32, u32) {
    let pinning = lab.every_point(calls, pin, |_| {}, || {});
    let pinned = |lab: &Lab| {
        let output = lab.fastice(pin).output().expect("the binary runs");
        assert!(output.status.success(), "{output:?}");
    };
    let unpinning = lab.every_point(calls, &["unpin", lab.name()], pinned, || {});
    (pinning, unpinning)
}

/// Waits for the first line, does something, then has the traced process end in order; how it ended.
fn until_ready_then_end(mut tracer: Child, then: &dyn Fn(i32)) -> ExitStatus {
    let stdout = tracer.stdout.take().expect("piped");
    let mut line = String::new();
    // Nothing comes when it was killed before.
    let read = BufReader::new(stdout).read_line(&mut line).unwrap_or(0);
    if read > 0 {
        let children = format!("/proc/{0}/task/{0}/children", tracer.id());
        let children = fs::read_to_string(children).unwrap_or_default();
        for child in children.split_whitespace() {
            then(child.parse().expect("a process"));
            // It may have been killed meanwhile.
            let _ = Command::new("kill").args(["-TERM", child]).stderr(Stdio::null()).status();
        }
    }
    let started = Instant::now();
    loop {
        if let Some(status) = tracer.try_wait().expect("a child") {
            return status;
        }
        assert!(started.elapsed() < PATIENCE, "serve does not end: {line}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Clears the immutable flag of the file through the descriptor that the process has of it: the watch will notice.
fn clear_immutable_behind(lab: &Lab, pid: i32) {
    let Some(pid) = Pid::from_raw(pid) else { return };
    // It may have been killed meanwhile, at each step.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target == lab.file)
            && let Some(number) = entry.file_name().to_str().and_then(|text| text.parse().ok())
            && let Ok(file) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())
            && let Ok(flags) = rustix::fs::ioctl_getflags(&file)
        {
            let _ = rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE);
            return;
        }
    }
}

/// Has the watch find a difference, and waits until the file is abandoned, or the process is gone.
pub(crate) fn fence(lab: &Lab, pid: i32) {
    clear_immutable_behind(lab, pid);
    let started = Instant::now();
    let is_over = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let is_gone = stat.is_empty() || stat.contains(") Z ");
        is_gone || lab.pins().first().is_none_or(|pin| pin.get("incident").is_some())
    };
    while !is_over() {
        assert!(started.elapsed() < PATIENCE, "the watch does not notice");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Kills serve at every point of these calls, and mends after each. `then` comes when it is ready, `after` before the
/// mending.
pub(crate) fn serve_at_every_point(
    lab: &Lab,
    calls: &[&str],
    then: &dyn Fn(&Lab, i32),
    after: &dyn Fn(),
) -> u32 {
    let config = lab.state().with_extension("toml");
    let text = format!(
        "state_dir = {:?}\ncores = 1\nbuffer_memory = \"8MiB\"\n[[listener]]\naddress = \"127.0.0.1:0\"\n[[subsystem]]\nnqn = \
         \"nqn.2026-11.io.fastice:crash\"\nallow_any_host = true\n[[subsystem.namespace]]\nnsid = 1\nfile = {:?}\n",
        lab.state(),
        lab.file
    );
    let mut file = File::create(&config).expect("room");
    file.write_all(text.as_bytes()).expect("room");
    // It is to outlive a power failure.
    rustix::fs::syncfs(&file).expect("a disk");
    drop(file);
    let arguments = ["serve", "--config", config.to_str().expect("text")];
    let mut points = 0;
    for call in calls {
        for count in 1..400 {
            let tracer = lab.killed(call, count, &arguments).spawn().expect("strace runs");
            let status = until_ready_then_end(tracer, &|pid| then(lab, pid));
            after();
            lab.mend(&format!("serve: {call} {count}"));
            if !was_killed(status) {
                assert!(status.success(), "{status}");
                break;
            }
            points += 1;
        }
    }
    points
}

#[test]
fn serve_is_killed_at_every_step_of_its_beginning_and_end() {
    // Without `write`, which is mostly the log: each point costs a start.
    let calls = ["fsync", "rename", "unlink", "ioctl", "fcntl", "flock", "fanotify_mark", "fadvise64"];
    let Some(lab) = Lab::new("serve killed", &Spec::XFS) else { return };
    let points = serve_at_every_point(&lab, &calls, &|_, _| {}, &|| {});
    println!("{points} points");
    assert!(points > 20, "{points}");
}

#[test]
fn serve_is_killed_at_every_step_of_a_fence() {
    // Without the calls that the watch makes again and again.
    let calls = ["fsync", "rename", "unlink", "fanotify_mark", "fadvise64"];
    let Some(lab) = Lab::new("fence killed", &Spec::XFS) else { return };
    let points = serve_at_every_point(&lab, &calls, &fence, &|| {});
    println!("{points} points");
    assert!(points > 10, "{points}");
}
