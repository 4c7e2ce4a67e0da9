//! A file that cannot be served at a start: left aside, so that the others are.
//!
//! ```text
//!   the record tells its size     hosts see its namespace, fenced; behind it stands a device that is not there
//!   nothing does                  hosts do not see it
//! ```
//!
//! Nobody holds it, no map of it is in memory, and no device under it is open: nothing can be read or written for it. The log
//! tells of it, status and metrics do, and, where there is a record, its incident and its events. A reload tries again.

use std::sync::Arc;

use super::name_of;
use crate::block::AbsentDevice;
use crate::chain::Chain;
use crate::config::{Backing, Namespace};
use crate::control::backings::{Backed, Shown};
use crate::control::error::ServeError;
use crate::extent::{StateDir, StoredPin, stored_pin};
use crate::units::ByteLen;

/// A namespace whose file was left aside.
pub(super) struct SetAside {
    nqn: String,
    namespace: Namespace,
    error: ServeError,
    record: Option<StoredPin>,
    shown: Option<Shown>,
}

impl SetAside {
    pub(super) fn new(state: &StateDir, nqn: &str, namespace: &Namespace, error: ServeError) -> Self {
        let record = match &namespace.backing {
            Backing::File { path, .. } => stored_pin(path, state).ok(),
            Backing::Memory { .. } | Backing::Null { .. } => None,
        };
        let shown = record.as_ref().and_then(shown_of);
        Self { nqn: nqn.to_owned(), namespace: namespace.clone(), error, record, shown }
    }

    /// The namespace, as hosts see it.
    pub(super) fn backed(&self) -> Backed {
        let (namespace, shown) = (self.namespace.clone(), self.shown.clone());
        Backed { namespace, shown, fault: Some(Chain(&self.error).to_string()) }
    }
}

/// Of the size and under the names that hosts know it by.
fn shown_of(record: &StoredPin) -> Option<Shown> {
    let identity = &record.identity;
    let len = ByteLen(identity.size.get().checked_sub(identity.reserved.get())?);
    let device = AbsentDevice::new(len, identity.disk.logical_block_size).ok()?;
    Some(Shown { device: Arc::new(device), map: None, identity: name_of(identity) })
}

/// Tells of what was left aside, when so many others are served.
///
/// # Errors
/// The first obstacle, when there is nothing to serve.
pub(super) fn tell(state: &StateDir, aside: Vec<SetAside>, served: usize) -> Result<(), ServeError> {
    for one in &aside {
        let (nqn, nsid, error) = (&one.nqn, one.namespace.nsid, Chain(&one.error));
        let remedy = one.error.remedy().unwrap_or_default();
        let seen = match one.shown {
            _ if served == 0 => {
                "nor is anything else, and the target ends; start it again when one is mended"
            }
            Some(_) => "hosts see it fenced, until it is mended and a reload tries again",
            None => "hosts do not see it, until it is mended and a reload tries again",
        };
        tracing::error!(nqn, nsid, %error, remedy, "NOT SERVED: {seen}");
    }
    if served == 0 {
        // As if there were nothing but the first one.
        return aside.into_iter().next().map_or(Ok(()), |first| Err(first.error));
    }
    for SetAside { record, error, .. } in &aside {
        if let Some(record) = record {
            state.note_not_served(record, &Chain(error).to_string(), error.difference());
        }
    }
    Ok(())
}
