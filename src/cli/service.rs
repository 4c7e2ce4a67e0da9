//! What a service manager is told of the target, when it wants to know (`sd_notify(3)`, `Type=notify`): that it is ready, how
//! many of its namespaces are served, that it ends.

use sd_notify::NotifyState;

/// The line of the service manager.
#[derive(Debug, Default)]
pub(super) struct Service {
    told: Option<(usize, usize)>,
}

impl Service {
    /// Hosts can connect.
    pub(super) fn ready(&mut self, served: (usize, usize)) {
        self.told = Some(served);
        tell(&[NotifyState::Ready, NotifyState::Status(&text_of(served))]);
    }

    /// What is served now, if that is other than before.
    pub(super) fn serves(&mut self, served: (usize, usize)) {
        if self.told.replace(served) != Some(served) {
            tell(&[NotifyState::Status(&text_of(served))]);
        }
    }

    /// It was told to end.
    pub(super) fn stopping(self) {
        tell(&[NotifyState::Stopping, NotifyState::Status("completing what is under way")]);
    }
}

fn text_of((served, namespaces): (usize, usize)) -> String {
    if served == namespaces {
        format!("serving {namespaces} namespaces")
    } else {
        format!("SERVING {served} OF {namespaces} NAMESPACES: `fastice status` shows which not, and why")
    }
}

fn tell(states: &[NotifyState<'_>]) {
    // Without one there is nobody to tell.
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}
