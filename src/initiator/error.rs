//! What goes wrong for a host: one error type, with a stable kind and a source.

use crate::tcp::pdu::{FatalErrorStatus, PduError, TermReq};
use nvme_spec::Status;
use std::error::Error;
use std::fmt;
use std::io;

/// The kinds of [`InitiatorError`]; stable, to be matched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No TCP connection.
    Connect,
    /// A wait reached its deadline. The connection is given up.
    Timeout,
    /// The peer closed the connection, or the system did.
    Closed,
    /// The peer sent a TermReq.
    Terminated,
    /// The peer broke the protocol. A TermReq was sent where one may be sent.
    Protocol,
    /// Data came with a wrong data digest. The connection goes on.
    DataDigest,
    /// The controller completed the command with an error: [`InitiatorError::status`].
    Status,
    /// The controller answered within the protocol, but in a way this host cannot work with.
    Incompatible,
    /// The caller asked for what cannot be done.
    InvalidArgument,
    /// A read returned other data than was written.
    Verify,
}

/// An error of the initiator.
#[derive(Debug)]
pub struct InitiatorError {
    kind: ErrorKind,
    what: String,
    status: Option<Status>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl InitiatorError {
    /// An error of `kind`; `what` is short and in lower case.
    pub(crate) fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), status: None, source: None }
    }

    /// The same with what caused it.
    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// A command that completed with an error.
    pub(crate) fn status_of(what: &str, status: Status) -> Self {
        Self {
            kind: ErrorKind::Status,
            what: format!("{what} failed: {status}"),
            status: Some(status),
            source: None,
        }
    }

    pub(crate) fn timeout(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Timeout, what)
    }

    pub(crate) fn protocol(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Protocol, what)
    }

    pub(crate) fn incompatible(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Incompatible, what)
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, what)
    }

    pub(crate) fn closed(error: io::Error) -> Self {
        Self::new(ErrorKind::Closed, "the connection broke").with_source(error)
    }

    pub(crate) fn pdu(error: PduError) -> Self {
        Self::new(ErrorKind::Protocol, "the controller sent a wrong PDU").with_source(error)
    }

    pub(crate) fn terminated(pdu: TermReq) -> Self {
        let TermReq { fes, fei } = pdu;
        let place =
            if fes == FatalErrorStatus::INVALID_PDU_HEADER_FIELD { " at byte" } else { ", information" };
        Self::new(
            ErrorKind::Terminated,
            format!("the controller ended the connection: {fes:?}{place} {fei:#x}"),
        )
    }

    /// The same error for a second reader: a dead queue gives its cause to each command.
    pub(crate) fn again(&self) -> Self {
        let what = match &self.source {
            Some(source) => format!("{}: {source}", self.what),
            None => self.what.clone(),
        };
        Self { kind: self.kind, what, status: self.status, source: None }
    }

    /// The kind, to match on.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The status of the completion; with [`ErrorKind::Status`] only.
    #[must_use]
    pub const fn status(&self) -> Option<Status> {
        self.status
    }
}

impl fmt::Display for InitiatorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl Error for InitiatorError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}
