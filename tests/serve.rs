//! The daemon as a process, on files of real XFS and ext4 filesystems over loop devices: what outlives its death, how it
//! ends, what it refuses, and what it does when a pin is broken.
#![expect(clippy::print_stdout, reason = "seeds and findings, which the harness shows when a test fails")]

#[path = "common/documented.rs"]
mod documented_names;
#[path = "common/loopfs.rs"]
mod loopfs;

#[path = "serve/crash.rs"]
mod crash;
#[path = "serve/daemon.rs"]
mod daemon;
#[path = "serve/detectors.rs"]
mod detectors;
#[path = "serve/documented.rs"]
mod documented;
#[path = "serve/guards.rs"]
mod guards;
#[path = "serve/handover.rs"]
mod handover;
#[path = "serve/leftover.rs"]
mod leftover;
#[path = "serve/load.rs"]
mod load;
#[path = "serve/metrics.rs"]
mod metrics;
#[path = "serve/nvme.rs"]
mod nvme;
#[path = "serve/policy.rs"]
mod policy;
#[path = "serve/read.rs"]
mod read;
#[path = "serve/recall.rs"]
mod recall;
#[path = "serve/refusals.rs"]
mod refusals;
#[path = "serve/reload.rs"]
mod reload;
#[path = "serve/set_aside.rs"]
mod set_aside;
#[path = "serve/side_by_side.rs"]
mod side_by_side;
#[path = "serve/stop.rs"]
mod stop;
#[path = "serve/stopped.rs"]
mod stopped;
#[path = "serve/told.rs"]
mod told;
#[path = "serve/top.rs"]
mod top;
#[path = "serve/trace.rs"]
mod trace;
#[path = "serve/unmounted.rs"]
mod unmounted;
#[path = "serve/watch.rs"]
mod watch;
