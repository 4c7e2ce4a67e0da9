//! An error and its sources on one line, for logs and for what is kept as text.

use std::error::Error;
use std::fmt;

/// Shows an error, and after it each of its sources.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read it")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn every_source_is_told_once() {
        let error = Outer(std::io::Error::other("the disk is on fire"));
        assert_eq!(Chain(&error).to_string(), "cannot read it: the disk is on fire");
    }
}
