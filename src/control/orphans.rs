//! Tells of stored pins that nobody holds, before anything is served: somebody has to decide what becomes of them.

use crate::extent::{Orphan, OrphanStanding, StateDir, orphans};

/// Looks at them all, and logs each that is not what it should be as a warning.
pub(super) fn tell(state: &StateDir) {
    let orphans = match orphans(state) {
        Ok(orphans) => orphans,
        Err(error) => return tracing::warn!(%error, "the stored pins cannot be looked at"),
    };
    for Orphan { path, kept, standing } in orphans {
        let path = path.unwrap_or_else(|| state.path().to_owned());
        let path = path.display();
        if standing == OrphanStanding::Unmounted {
            tracing::warn!(%path, "a pin that nobody holds, on a filesystem that is not mounted: mount it, then see `fastice pins`");
        } else if kept && standing == OrphanStanding::Held {
            tracing::info!(%path, %standing, "a pin that is kept and not served");
        } else {
            tracing::warn!(
                %path,
                %standing,
                "a pin that nobody holds: serve or pin the file to adopt it, or `fastice unpin` it"
            );
        }
    }
}
