//! Sizes as people write them: `4096`, `64MiB`, `1.5 GiB`, `2TB`.

use crate::units::ByteLen;

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// There is no number where one must be.
    #[error("`{0}` is no size: write a number and a unit, such as 4096, 512KiB, 64MiB or 1GiB")]
    Form(String),
    /// The unit is not known.
    #[error("`{0}` is no unit: use B, KiB, MiB, GiB, TiB, or KB, MB, GB, TB for powers of ten")]
    Unit(String),
    /// More bytes than 64 bits hold, or a fraction of a byte.
    #[error("`{0}` is no whole number of bytes below 2^63")]
    Range(String),
}

const UNITS: [(&str, u64); 14] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
];

/// The bytes that `text` means. `K`, `M`, `G` and `T` alone are powers of two, as in fio. A decimal fraction is
/// taken when it comes out at whole bytes. Case does not matter.
///
/// # Errors
/// When `text` is no size, or not below 2^63.
pub fn parse_size(text: &str) -> Result<ByteLen, SizeError> {
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let unit = unit.trim();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let form = || SizeError::Form(clip(text));
    let range = || SizeError::Range(clip(text));
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
        return Err(form());
    }
    let lower = unit.to_ascii_lowercase();
    let Some((_, scale)) = UNITS.iter().find(|(name, _)| *name == lower) else {
        return Err(SizeError::Unit(clip(unit)));
    };
    if fraction.len() > 18 {
        return Err(range());
    }
    let whole: u128 = whole.parse().map_err(|_| range())?;
    let parts: u128 = fraction.parse().map_err(|_| form())?;
    let denominator = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| range())?);
    let numerator = whole
        .checked_mul(denominator)
        .and_then(|sum| sum.checked_add(parts))
        .and_then(|sum| sum.checked_mul(u128::from(*scale)))
        .ok_or_else(range)?;
    if numerator % denominator != 0 {
        return Err(range());
    }
    match u64::try_from(numerator / denominator) {
        Ok(bytes) if i64::try_from(bytes).is_ok() => Ok(ByteLen(bytes)),
        _ => Err(range()),
    }
}

/// `bytes` as people read it: exact where a binary unit divides it, else with one decimal, such as `64 MiB` or
/// `1.5 GiB`.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    let steps = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    for (scale, unit) in steps {
        if bytes >= scale {
            if bytes.is_multiple_of(scale) {
                return format!("{} {unit}", bytes / scale);
            }
            let tenths = u128::from(bytes) * 10 / u128::from(scale);
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} B")
}

fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("64MiB", 64 << 20),
            ("64 mib", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("2TB", 2_000_000_000_000),
            (" 1 GB ", 1_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(ByteLen(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_why() {
        assert!(matches!(parse_size(""), Err(SizeError::Form(_))));
        assert!(matches!(parse_size("MiB"), Err(SizeError::Form(_))));
        assert!(matches!(parse_size("-1"), Err(SizeError::Form(_))));
        assert!(matches!(parse_size("1.2.3M"), Err(SizeError::Form(_))));
        assert!(matches!(parse_size("5 parsecs"), Err(SizeError::Unit(_))));
        assert!(matches!(parse_size("1.3B"), Err(SizeError::Range(_))));
        assert!(matches!(parse_size("9999999999TiB"), Err(SizeError::Range(_))));
        assert!(matches!(parse_size("99999999999999999999999999999999999999999"), Err(SizeError::Range(_))));
    }

    #[test]
    fn sizes_as_people_read_them() {
        assert_eq!(format_size(0), "0 B");
        assert_eq!(format_size(1023), "1023 B");
        assert_eq!(format_size(64 << 20), "64 MiB");
        assert_eq!(format_size(3 << 29), "1.5 GiB");
        assert_eq!(format_size(u64::MAX), "16777215.9 TiB");
    }
}
