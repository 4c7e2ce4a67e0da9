//! Whether the files of a configuration can be pinned beside each other, looked at before any of them is.

use crate::config::{Backing, Config, DeviceWay};
use crate::extent::{ExtentError, Wanted, in_the_way_of};

/// Every reason why the files of `config` cannot be pinned with the guards that it names, on the filesystems as they are mounted
/// here and now. What is not there is passed over.
///
/// # Errors
/// [`ExtentError::Io`] when the state directory cannot be read.
pub fn check_guards(config: &Config) -> Result<Vec<ExtentError>, ExtentError> {
    let namespaces = config.subsystems.iter().flat_map(|subsystem| &subsystem.namespaces);
    let wanted = namespaces.filter_map(|namespace| match &namespace.backing {
        // Its filesystem is not to be mounted.
        Backing::File { device: DeviceWay::HandedOver | DeviceWay::Unmounted, .. } => None,
        Backing::File { path, guard, local_readers, prepare, .. } => Some(Wanted {
            path: path.clone(),
            guard: *guard,
            local_readers: *local_readers,
            prepare: *prepare,
            block_size: namespace.block_size,
        }),
        Backing::Memory { .. } | Backing::Null { .. } => None,
    });
    in_the_way_of(&wanted.collect::<Vec<_>>(), &config.state_dir)
}
