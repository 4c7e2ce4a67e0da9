//! NVMe qualified names (NVM Express Base Specification 2.1, section 4.7 "NVMe Qualified Names").

use std::fmt;

use serde::Serialize;

/// The well-known name of the discovery subsystem (same section).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// The longest name in bytes (same section).
const NQN_BYTES_MAX: usize = 223;

/// A name of the specified form: `nqn.YYYY-MM.reverse.domain:anything`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Nqn(String);

/// Why a text is no NVMe qualified name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NqnError {
    /// Longer than the specification allows.
    #[error("the name has {0} bytes, and an NQN has at most 223")]
    TooLong(usize),
    /// No `nqn.` at its start.
    #[error("an NQN starts with `nqn.`, as in nqn.2026-11.com.example:vm1")]
    Prefix,
    /// No year and month after `nqn.`.
    #[error("after `nqn.` comes a year and a month, as in nqn.2026-11.com.example:vm1")]
    Date,
    /// No reversed domain name.
    #[error(
        "after the date comes a reversed domain name of letters, digits, `-` and `.`, as in .com.example"
    )]
    Domain,
    /// Nothing after the domain name.
    #[error("after the domain name comes `:` and a text of one's own, as in :vm1")]
    Suffix,
    /// Characters that cannot be printed, or spaces.
    #[error("an NQN has no spaces and no control characters")]
    Character,
}

impl Nqn {
    /// The name `text`, when it has the specified form.
    ///
    /// # Errors
    /// The first rule that `text` breaks.
    pub fn new(text: &str) -> Result<Self, NqnError> {
        if text.len() > NQN_BYTES_MAX {
            return Err(NqnError::TooLong(text.len()));
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(NqnError::Character);
        }
        let rest = text.strip_prefix("nqn.").ok_or(NqnError::Prefix)?;
        let (date, rest) = rest.split_once('.').ok_or(NqnError::Date)?;
        if !is_date(date) {
            return Err(NqnError::Date);
        }
        if text == DISCOVERY_NQN {
            return Ok(Self(text.to_owned()));
        }
        let (domain, own) = rest.split_once(':').unwrap_or((rest, ""));
        let label_ok = |label: &str| {
            !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        if !domain.split('.').all(label_ok) {
            return Err(NqnError::Domain);
        }
        if own.is_empty() {
            return Err(NqnError::Suffix);
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for Nqn {
    type Err = NqnError;

    fn from_str(text: &str) -> Result<Self, NqnError> {
        Self::new(text)
    }
}

fn is_date(date: &str) -> bool {
    let Some((year, month)) = date.split_once('-') else { return false };
    let digits = |part: &str, len: usize| part.len() == len && part.bytes().all(|b| b.is_ascii_digit());
    digits(year, 4) && digits(month, 2) && matches!(month.parse::<u8>(), Ok(1..=12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_specified_form_pass() {
        for text in [
            "nqn.2026-11.io.fastice:vm1",
            "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555",
            "nqn.2014-08.com.example:nvme:nvm-subsystem-sn-d78432",
            DISCOVERY_NQN,
        ] {
            assert_eq!(Nqn::new(text).map(|nqn| nqn.as_str().to_owned()), Ok(text.to_owned()));
        }
        assert!(Nqn::new(&format!("nqn.2026-11.io.fastice:{}", "x".repeat(200))).is_ok());
    }

    #[test]
    fn other_names_say_which_rule_they_break() {
        let long = format!("nqn.2026-11.io.fastice:{}", "x".repeat(201));
        for (text, why) in [
            (long.as_str(), NqnError::TooLong(224)),
            ("", NqnError::Prefix),
            ("iqn.2026-11.io.fastice:vm1", NqnError::Prefix),
            ("nqn.2026-13.io.fastice:vm1", NqnError::Date),
            ("nqn.26-11.io.fastice:vm1", NqnError::Date),
            ("nqn.2026-11", NqnError::Date),
            ("nqn.2026-11..fastice:vm1", NqnError::Domain),
            ("nqn.2026-11.io_x:vm1", NqnError::Domain),
            ("nqn.2026-11.io.fastice", NqnError::Suffix),
            ("nqn.2026-11.io.fastice:", NqnError::Suffix),
            ("nqn.2026-11.io.fastice:v m", NqnError::Character),
            ("nqn.2026-11.io.fastice:v\0m", NqnError::Character),
        ] {
            assert_eq!(Nqn::new(text), Err(why), "{text:?}");
        }
    }
}
