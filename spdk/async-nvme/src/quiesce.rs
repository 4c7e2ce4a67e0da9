//! Making sure that a controller executes nothing of what somebody gave it before, without driving it.
//!
//! For whoever comes after a process that was killed: the commands of that process may still be with the controller,
//! and a disabled controller has none (NVMe Base Specification 2.0, 3.7.2: a Controller Reset ends the processing of
//! commands, and CSTS.RDY turns 0 only then).

use std::thread;
use std::time::{Duration, Instant};

use nvme_spec::register::{Cap, Cc, Property};

use crate::access::Access;
use crate::controller::read_csts;
use crate::error::Error;
use crate::quirks::Quirks;

const LOOK: Duration = Duration::from_millis(1);
/// CAP.TO counts half seconds; a controller that says 0 gets one.
const TIMEOUT_UNIT: Duration = Duration::from_millis(500);

/// Disables the controller and waits until it is, each step as long as its own CAP.TO says. When it does not follow, its
/// function is reset from outside.
///
/// Blocks. Nothing is mapped for the controller, and nobody else may be driving it.
///
/// # Errors
/// [`Error::Gone`] when its registers do not answer; [`Error::Late`] when neither way has stilled it.
pub fn quiesce(access: &dyn Access) -> Result<(), Error> {
    match disable(access) {
        Err(Error::Late { .. }) if access.function_reset().is_ok() => disable(access),
        other => other,
    }
}

fn disable(access: &dyn Access) -> Result<(), Error> {
    let gone = || Error::Gone { name: access.name().to_owned() };
    let cap = access.read64(Property::CAP.0);
    let bits = access.read32(Property::CC.0);
    let csts = read_csts(access).filter(|_| cap != u64::MAX && bits != u32::MAX).ok_or_else(gone)?;
    let limit = TIMEOUT_UNIT * u32::from(Cap::from_bits(cap).to()).max(1);
    let mut cc = Cc::from_bits(bits);
    if cc.en() {
        if !csts.rdy() {
            // Enabled a moment ago: CC.EN may not be cleared before CSTS.RDY has followed. One that fails to become
            // ready is disabled all the same.
            let _ = follows(access, true, limit);
        }
        cc.set_en(false);
        access.write32(Property::CC.0, cc.into_bits());
        if let Some(pause) = quirks_of(access).delay_before_ready {
            thread::sleep(pause);
        }
    }
    match follows(access, false, limit) {
        Some(true) => Ok(()),
        Some(false) => Err(Error::Late {
            name: access.name().to_owned(),
            what: "become disabled",
            limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        }),
        None => Err(gone()),
    }
}

/// Whether CSTS.RDY is `ready` in time; `None` when the controller is gone.
fn follows(access: &dyn Access, ready: bool, limit: Duration) -> Option<bool> {
    let deadline = Instant::now() + limit;
    loop {
        if read_csts(access)?.rdy() == ready {
            return Some(true);
        }
        if Instant::now() >= deadline {
            return Some(false);
        }
        thread::sleep(LOOK);
    }
}

/// By the identifiers in configuration space; none when they cannot be read.
fn quirks_of(access: &dyn Access) -> Quirks {
    let [v0, v1, d0, d1] = access.config_read32(0).unwrap_or(u32::MAX).to_le_bytes();
    Quirks::of(u16::from_le_bytes([v0, v1]), u16::from_le_bytes([d0, d1]))
}
