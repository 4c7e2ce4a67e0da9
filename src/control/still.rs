//! The state directory with the means to still what killed processes drove.

use std::path::Path;
use std::sync::Arc;

use crate::block::nvme::{NvmeWay, Reach, SystemReach, still};
use crate::extent::{ExtentError, StateDir, Still, StillError};

/// Opens the state directory for whoever pins, takes over or lets go of files: a file is not touched before the
/// controllers that its last owner drove are still.
///
/// # Errors
/// As [`StateDir::open`].
pub fn open_state(path: &Path) -> Result<StateDir, ExtentError> {
    open_state_reaching(path, Arc::new(SystemReach))
}

pub(super) fn open_state_reaching(path: &Path, reach: Arc<dyn Reach>) -> Result<StateDir, ExtentError> {
    Ok(StateDir::open(path)?.stilling_by(Arc::new(ByDriver(reach))))
}

/// Disables controllers by our driver.
struct ByDriver(Arc<dyn Reach>);

impl Still for ByDriver {
    fn still(&self, place: &str) -> Result<(), StillError> {
        let Some(way) = NvmeWay::from_place(place) else {
            let source = "this version of fastice does not know such a place".into();
            return Err(StillError { may_pass: false, source });
        };
        still(&way, &*self.0)
            .map_err(|error| StillError { may_pass: error.may_pass(), source: Box::new(error) })
    }
}

impl std::fmt::Debug for ByDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ByDriver").finish_non_exhaustive()
    }
}
