//! Newtypes for addresses and sizes, so that an index, a count and a size cannot be taken for each other.
//!
//! `extent` thinks in bytes ([`ByteOffset`], [`ByteLen`]); NVMe thinks in logical blocks ([`Lba`],
//! [`BlockCount`]). [`BlockSize`] is the only bridge between the two, and every conversion over it is checked.

use std::fmt;

/// Generates a transparent unsigned newtype with a plain constructor, accessor and `Display`.
macro_rules! unit {
    ($(#[$meta:meta])* $name:ident, $repr:ty) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        #[serde(transparent)]
        #[repr(transparent)]
        pub struct $name(pub $repr);

        impl $name {
            /// The bare number.
            #[must_use]
            pub const fn get(self) -> $repr {
                self.0
            }

            /// The sum, or `None` where it does not fit.
            #[must_use]
            pub const fn checked_add(self, more: $repr) -> Option<Self> {
                match self.0.checked_add(more) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

unit!(
    /// A logical block address within a namespace (NVM Command Set specification, section 2.1).
    Lba, u64
);
unit!(
    /// A number of logical blocks. One-based: a wire field that is zero-based ends in `_z` and is widened first.
    BlockCount, u64
);
unit!(
    /// A position in bytes, of a file or of a whole block device; which of the two, the field's name says.
    ByteOffset, u64
);
unit!(
    /// A length in bytes.
    ByteLen, u64
);

/// The size of a logical block in bytes: a power of two from 512 to 65536.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize {
    shift: u8,
}

impl BlockSize {
    /// 512 bytes.
    pub const B512: Self = Self { shift: 9 };
    /// 4096 bytes.
    pub const B4096: Self = Self { shift: 12 };

    /// The block size of `bytes`, or `None` when that is no power of two from 512 to 65536.
    #[must_use]
    pub const fn new(bytes: u32) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 512 && bytes <= 65536 {
            #[expect(clippy::cast_possible_truncation, reason = "at most 16")]
            return Some(Self { shift: bytes.trailing_zeros() as u8 });
        }
        None
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        1 << self.shift
    }

    /// The base-two logarithm of the size: LBADS of the LBA format (NVM Command Set specification, figure "LBA
    /// Format Data Structure").
    #[must_use]
    pub const fn lbads(self) -> u8 {
        self.shift
    }

    /// The byte position of a block, or `None` where it does not fit 64 bits.
    #[must_use]
    pub const fn offset_of(self, lba: Lba) -> Option<ByteOffset> {
        match lba.0.checked_mul(1 << self.shift) {
            Some(bytes) => Some(ByteOffset(bytes)),
            None => None,
        }
    }

    /// The length in bytes of a number of blocks, or `None` where it does not fit 64 bits.
    #[must_use]
    pub const fn len_of(self, blocks: BlockCount) -> Option<ByteLen> {
        match blocks.0.checked_mul(1 << self.shift) {
            Some(bytes) => Some(ByteLen(bytes)),
            None => None,
        }
    }

    /// The whole blocks in `len`, or `None` when `len` is no multiple of the block size.
    #[must_use]
    pub const fn blocks_in(self, len: ByteLen) -> Option<BlockCount> {
        if len.0 & (self.bytes() as u64 - 1) == 0 { Some(BlockCount(len.0 >> self.shift)) } else { None }
    }

    /// Whether `offset` is the start of a block.
    #[must_use]
    pub const fn is_aligned(self, offset: ByteOffset) -> bool {
        offset.0 & (self.bytes() as u64 - 1) == 0
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_outside_the_specification_are_refused() {
        for bytes in [0, 1, 256, 511, 513, 1000, 131_072, u32::MAX] {
            assert_eq!(BlockSize::new(bytes), None, "{bytes}");
        }
        assert_eq!(BlockSize::new(512), Some(BlockSize::B512));
        assert_eq!(BlockSize::new(4096), Some(BlockSize::B4096));
        assert_eq!(BlockSize::B4096.lbads(), 12);
    }

    #[test]
    fn conversions_neither_wrap_nor_round() {
        assert_eq!(BlockSize::B512.offset_of(Lba(u64::MAX)), None);
        assert_eq!(BlockSize::B512.offset_of(Lba(3)), Some(ByteOffset(1536)));
        assert_eq!(BlockSize::B4096.blocks_in(ByteLen(4097)), None);
        assert_eq!(BlockSize::B4096.blocks_in(ByteLen(8192)), Some(BlockCount(2)));
        assert_eq!(BlockSize::B4096.len_of(BlockCount(u64::MAX / 4096 + 1)), None);
        assert!(!BlockSize::B512.is_aligned(ByteOffset(513)));
    }
}
