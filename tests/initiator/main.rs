//! The initiator against a scripted target, over loopback TCP.

mod bench;
mod controller;
mod faults;
mod handshake;
#[path = "../common/scripted_target.rs"]
mod scripted_target;

use fastice::initiator::controller::{ConnectOptions, Host};
use nvme_spec::Nsid;
use scripted_target::ScriptedTarget;

/// The target's only namespace.
const NSID: Nsid = Nsid(1);

fn options(target: &ScriptedTarget) -> ConnectOptions {
    ConnectOptions::new(target.address, "nqn.2026-11.example:disk", Host::random())
}
