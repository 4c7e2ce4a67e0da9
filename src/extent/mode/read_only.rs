//! The read-only-mount guard: the filesystem itself refuses every change, as its superblock is read-only.
//!
//! ```text
//!   /proc/self/mountinfo:  41 1 259:2 / /srv ro,relatime - xfs /dev/nvme0n1p2 ro,attr2,...
//!                                            ^ of this mount: says nothing      ^ of the superblock: this one counts
//! ```
//!
//! No flag can be set there, and none is needed: nothing on the filesystem changes as long as it is so. Whoever remounts it
//! read-write (root) gets no further than the open-permission mark and the lease until that is noticed: the mount table
//! is looked at whenever it changes and every 100 ms or so, and then the export is fenced.
//!
//! What it does not do: outlive a remount. It stays when this process dies, and goes with the mount.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::danger;
use crate::extent::error::ExtentError;
use crate::extent::facts::{FileFacts, mount_options, number_of};
use crate::extent::identity::DeviceNumber;

/// The name of this guard in errors.
pub(in crate::extent) const READ_ONLY: &str = "read-only-mount";

/// Options of mounts whose log was not replayed: what they show is not what the next mount will.
const NOT_REPLAYED: [&str; 2] = ["norecovery", "noload"];

/// Whether the superblock of the filesystem is read-only. One that this mount namespace does not have is not known to be.
pub(super) fn is_read_only(device: DeviceNumber) -> std::io::Result<bool> {
    Ok(mount_options(device)?.is_some_and(|options| says_read_only(&options)))
}

fn says_read_only(options: &str) -> bool {
    options.split(',').any(|option| option == "ro")
}

/// Refuses a filesystem on which this is no guard. `state` is the state directory, which must be elsewhere.
pub(in crate::extent) fn refuse_unfit(facts: &FileFacts, state: Option<&Path>) -> Result<(), ExtentError> {
    let path = facts.path.as_path();
    let refuse = |problem| {
        Err(ExtentError::Guard { path: path.to_path_buf(), guard: READ_ONLY, problem, source: None })
    };
    let options =
        mount_options(facts.device).map_err(|error| ExtentError::io("find the mount of", path, error))?;
    let options = options.unwrap_or_default();
    if !says_read_only(&options) {
        return refuse(
            "its filesystem is not mounted read-only (`mount -o remount,ro`; a read-only bind mount is not enough)",
        );
    }
    if options.split(',').any(|option| NOT_REPLAYED.contains(&option)) {
        return refuse(
            "its filesystem is mounted without its log: mount it once without norecovery (noload)",
        );
    }
    if danger::has_errors(facts) {
        return refuse("its filesystem has recorded errors: e2fsck it first");
    }
    let state = state.and_then(|state| fs::metadata(state).ok());
    if state.is_some_and(|state| number_of(state.dev()) == facts.device) {
        return refuse("the state directory is on the same filesystem, and could not be written");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_option_of_its_own_is_read_only() {
        for (options, is) in [
            ("ro", true),
            ("ro,attr2,noquota", true),
            ("rw,ro_x", false),
            ("rw,errors=remount-ro", false),
            ("", false),
        ] {
            assert_eq!(says_read_only(options), is, "{options}");
        }
    }

    #[test]
    fn a_filesystem_that_nobody_has_mounted_is_not_known_to_be() {
        assert!(!is_read_only(DeviceNumber { major: 0, minor: 1 << 19 }).expect("a mount table"));
    }
}
