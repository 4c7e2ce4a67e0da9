//! The power fails at every point: the images are what they were at that moment, and the filesystems replay their logs.
//!
//! ```text
//!   outer XFS --+-- image of the file's filesystem  --- loop device --- mounted
//!               +-- image of the state's filesystem --- loop device --- mounted
//!
//!   killed; both images are cloned, which is one moment for each; then unmounted, replaced by the clones, mounted
//! ```
//!
//! The kernel's page cache is as good as gone: what it writes when it unmounts goes to the images that are thrown away.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::killed::{fence, serve_at_every_point};
use super::lab::{Lab, STATE_CHANGES};
use super::loopfs::{self, LoopFs, Spec, run, unmount};

/// Two filesystems whose power can be cut.
struct Powered {
    state: LoopFs,
    lab: Lab,
    /// Has the images; last to go.
    _outer: LoopFs,
}

fn image_of(fs: &LoopFs) -> PathBuf {
    fs.root().with_file_name("image")
}

impl Powered {
    fn new(test: &str, spec: &Spec) -> Option<Self> {
        let outer = loopfs::make_or_skip(test, &Spec { size_mib: 2048, ..Spec::XFS })?;
        let make = |spec: &Spec| LoopFs::make_in(&outer.root(), spec).expect("one more");
        let state = make(&Spec { size_mib: 64, ..Spec::EXT4 });
        let lab = Lab::on(test, make(spec), state.path("state"))?;
        Some(Self { state, lab, _outer: outer })
    }

    /// All that was not flushed is lost.
    fn cut_power(&self) {
        let both = [&self.lab.fs, &self.state];
        for fs in both {
            let (image, cut) = (image_of(fs), image_of(fs).with_extension("cut"));
            run(Command::new("cp").arg("--reflink=always").arg(image).arg(cut)).expect("a clone");
        }
        for fs in both {
            // The kernel takes the rings of a killed process apart in its own time, with the files in them.
            let unmounted = (0..10).any(|_| unmount(&fs.root()).is_ok());
            assert!(unmounted, "somebody uses {}", fs.root().display());
            detach(fs.device());
            fs::rename(image_of(fs).with_extension("cut"), image_of(fs)).expect("a rename");
            run(Command::new("losetup").arg(fs.device()).arg(image_of(fs))).expect("the same device");
            run(Command::new("mount").arg(fs.device()).arg(fs.root())).expect("the log is replayed");
        }
    }
}

/// Detaches a device, and waits until that is so: something may look at it for a moment.
fn detach(device: &str) {
    run(Command::new("losetup").args(["--detach", device])).expect("ours");
    for _ in 0..500 {
        let backing = format!("/sys/block/{}/loop/backing_file", device.trim_start_matches("/dev/"));
        if fs::metadata(backing).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{device} stays");
}

#[test]
fn the_power_fails_at_every_step_of_pin() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(powered) = Powered::new("power fails at pin", &spec) else { return };
        let lab = &powered.lab;
        let points = lab.every_point(STATE_CHANGES, &["pin", lab.name()], |_| {}, || powered.cut_power());
        println!("{}: {points} points", spec.kind);
        assert!(points > 20, "{points}");
    }
}

#[test]
fn the_power_fails_at_every_step_of_unpin() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(powered) = Powered::new("power fails at unpin", &spec) else { return };
        let pin = |lab: &Lab| {
            let output = lab.fastice(&["pin", lab.name()]).output().expect("the binary runs");
            assert!(output.status.success(), "{output:?}");
        };
        let lab = &powered.lab;
        let points = lab.every_point(STATE_CHANGES, &["unpin", lab.name()], pin, || powered.cut_power());
        println!("{}: {points} points", spec.kind);
        assert!(points > 8, "{points}");
    }
}

#[test]
fn the_power_fails_at_every_step_of_serve_and_of_a_fence() {
    let calls = ["fsync", "rename", "unlink"];
    let Some(powered) = Powered::new("power fails at serve", &Spec::XFS) else { return };
    let points = serve_at_every_point(&powered.lab, &calls, &fence, &|| powered.cut_power());
    println!("{points} points");
    assert!(points > 10, "{points}");
}
