//! `fastice demo`: the whole story on a filesystem made for it, in under two minutes.
//!
//! ```text
//!   lab     an image file, XFS on a loop device, a fragmented file; undone whatever happens
//!   story   look, pin and serve, write and verify over the network, try to break it, let go, compare
//!
//!   hosts -- NVMe/TCP -- fastice serve -- async-nvme -- nvme-model -- /dev/loopN -- xfs.img     (--device nvme)
//!                            |                                            |
//!                            `-- pins disk.img on the mounted XFS --------'
//! ```
//!
//! Everything that is undone here is undone by destructors, so that a failure and Ctrl-C leave nothing behind.

mod blocks;
mod lab;
mod story;

use std::path::PathBuf;

use clap::Args;

use super::exit::{Exit, Failure, Outcome};
use super::out::Out;
use super::sys::StopSignals;

/// Show what fastice does: pin, serve, write, verify, try to break it, clean up
///
/// Needs root, for a loop device and a mount. Takes less than two minutes and leaves nothing behind.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Where the image of the demo's filesystem is made; it needs some 400 MiB
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    pub dir: PathBuf,
    /// How the disk under the file is reached: by our NVMe driver, on an NVMe controller in software over the loop
    /// device, or by io_uring on the loop device itself
    #[arg(long, value_name = "WAY", value_enum, default_value_t = DemoDevice::Nvme)]
    pub device: DemoDevice,
}

/// How the demo's disk is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DemoDevice {
    /// By our NVMe driver, on its model.
    Nvme,
    /// By `io_uring`.
    Uring,
}

/// Tells the story.
///
/// # Errors
/// When a step fails; what was set up is undone all the same.
pub fn run(args: &DemoArgs) -> Outcome {
    if !rustix::process::geteuid().is_root() {
        let error = anyhow::anyhow!("the demo makes a loop device and mounts it, which needs root");
        return Err(Failure::new(Exit::Permission, error).with_remedy("sudo fastice demo"));
    }
    // Before any thread starts.
    let signals = StopSignals::take()?;
    let mut out = Out::stdout();
    story::tell(args, &signals, &mut out)?;
    out.flush()?;
    Ok(Exit::Ok)
}
