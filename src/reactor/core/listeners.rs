//! The listeners of a core: one accept each in the ring.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::setup::introduce;
use super::{ACCEPT, Core};
use crate::fabrics::PortId;
use crate::reactor::CoreContext;
use crate::reactor::slab::Key;
use crate::ring::{RingDone, RingResource, Socket};

/// Pause of a listener after the kernel could not give a socket (descriptor limit, memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Listener {
    port: PortId,
    socket: Socket,
    /// An accept is in flight; cancelled listeners are dropped when it comes back.
    accepting: bool,
    closing: bool,
    /// Not before this time, after a failure.
    not_before: Instant,
}

impl Core {
    /// One more.
    pub(super) fn listen(&mut self, socket: OwnedFd, port: PortId) {
        let not_before = self.cx.now;
        let listener =
            Listener { port, socket: Socket::new(socket), accepting: false, closing: false, not_before };
        if self.listeners.insert(listener).is_err() {
            tracing::error!(port = port.0, "no room for another listener on this core");
        }
        self.accepts_at = Some(not_before);
    }

    /// Gives each listener an accept that has none.
    #[cold]
    pub(super) fn accept(&mut self) {
        self.accepts_at = None;
        for index in 0..self.listeners.slots() {
            let Some(key) = self.listeners.key_at(index) else { continue };
            let Some(listener) = self.listeners.get_mut(key) else { continue };
            if listener.accepting || listener.closing {
                continue;
            }
            if self.cx.now >= listener.not_before {
                let token = CoreContext::token(key, ACCEPT);
                listener.accepting = self.own.accept(token, &listener.socket).is_ok();
            }
            if !listener.accepting {
                let at = listener.not_before;
                self.accepts_at = Some(self.accepts_at.map_or(at, |other| other.min(at)));
            }
        }
    }

    /// An accept is over.
    pub(super) fn accepted(&mut self, done: RingDone) {
        let key = Key::from_bits(done.token);
        let Some(listener) = self.listeners.get_mut(key) else { return };
        listener.accepting = false;
        self.accepts_at = Some(self.cx.now);
        if listener.closing {
            self.listeners.remove(key);
            return;
        }
        match (done.result, done.resource) {
            (Ok(_), RingResource::Accepted(socket)) => {
                if let Some(accepted) = introduce(socket, listener.port) {
                    (self.spread)(accepted);
                }
            }
            (Err(error), _) => {
                listener.not_before = self.cx.now + ACCEPT_PAUSE;
                tracing::warn!(%error, "accepting a connection failed; trying again shortly");
            }
            (Ok(_), _) => {}
        }
    }

    /// Ends the listeners of a port, or all of them.
    pub(super) fn unlisten(&mut self, which: Option<PortId>) {
        for index in 0..self.listeners.slots() {
            let Some(key) = self.listeners.key_at(index) else { continue };
            let Some(listener) = self.listeners.get_mut(key) else { continue };
            if which.is_some_and(|port| listener.port != port) {
                continue;
            }
            listener.closing = true;
            if listener.accepting {
                // It goes when its accept comes back, so that the port is free only then.
                self.own.cancel(CoreContext::token(key, ACCEPT));
            } else {
                self.listeners.remove(key);
            }
        }
    }
}
