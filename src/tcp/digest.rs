//! CRC32C, the digest of NVMe/TCP headers and data (NVMe/TCP Transport specification 1.1, section 3.3.1).
//!
//! One function and one running form, so that the crate which computes it can be exchanged in one place. On the
//! wire a digest is the CRC in little-endian order; [`Digest::LEN`] bytes.

/// The CRC32C of everything hashed so far followed by `bytes`.
///
/// `seed` is the result for what went before, `0` at the start:
///
/// ```
/// use fastice::tcp::digest::crc32c;
/// assert_eq!(crc32c(0, b"123456789"), 0xE306_9283);
/// assert_eq!(crc32c(crc32c(0, b"1234"), b"56789"), 0xE306_9283);
/// ```
#[must_use]
pub fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    if seed == 0 {
        return crc_fast::crc32_iscsi(bytes);
    }
    // The register of the algorithm holds the complement of the CRC.
    let mut digest =
        crc_fast::Digest::new_with_init_state(crc_fast::CrcAlgorithm::Crc32Iscsi, u64::from(!seed));
    digest.update(bytes);
    #[expect(clippy::cast_possible_truncation, reason = "a 32-bit CRC in a 64-bit register")]
    let crc = digest.finalize() as u32;
    crc
}

/// A CRC32C that is fed piece by piece, as data arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    crc: u32,
}

impl Digest {
    /// Bytes of a digest on the wire.
    pub const LEN: usize = 4;

    /// The digest of nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { crc: 0 }
    }

    /// Appends `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.crc = crc32c(self.crc, bytes);
    }

    /// The digest of all bytes so far.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.crc
    }

    /// The digest as it goes over the wire.
    #[must_use]
    pub const fn to_wire(self) -> [u8; Self::LEN] {
        self.crc.to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_check_values_of_rfc_3720_hold() {
        assert_eq!(crc32c(0, b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(0, &[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(0, &[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(0, b""), 0);
    }

    proptest! {
        #[test]
        fn any_split_equals_an_independent_implementation(
            bytes in proptest::collection::vec(any::<u8>(), 0..9000),
            cut in any::<prop::sample::Index>(),
        ) {
            let at = cut.index(bytes.len() + 1);
            let mut digest = Digest::new();
            digest.update(&bytes[..at]);
            digest.update(&bytes[at..]);
            prop_assert_eq!(digest.value(), crc32c::crc32c(&bytes));
            prop_assert_eq!(digest.value(), crc32c(0, &bytes));
        }
    }
}
