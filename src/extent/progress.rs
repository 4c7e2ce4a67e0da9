//! Telling whoever waits how far a long operation is.

/// Is told of the stages of a pin and of how far each is. Called from the thread that pins.
pub trait Progress {
    /// A stage begins; `name` is a short noun phrase such as `writing zeros`.
    fn stage(&mut self, name: &str);
    /// The stage is at `done` of `total` bytes.
    fn advance(&mut self, done: u64, total: u64);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn stage(&mut self, _name: &str) {}
    fn advance(&mut self, _done: u64, _total: u64) {}
}
