//! Asymmetric Namespace Access (Base section 5.1.12.1.13).
//!
//! ```text
//!   AnaHeader | AnaGroupDescriptor, its NSIDs (4 bytes each) | AnaGroupDescriptor, its NSIDs | ...
//! ```

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// RGO, in the log specific parameter of Get Log Page: groups without the identifiers of their namespaces.
pub const ANA_RETURN_GROUPS_ONLY: u8 = 1 << 0;

open_enum! {
    /// How a controller reaches the namespaces of a group (Base section 8.1.1.3 ff).
    #[derive(zerocopy::Unaligned)]
    pub struct AnaState(u8) {
        /// ANA Optimized.
        OPTIMIZED = 0x1,
        /// ANA Non-Optimized.
        NON_OPTIMIZED = 0x2,
        /// ANA Inaccessible.
        INACCESSIBLE = 0x3,
        /// ANA Persistent Loss.
        PERSISTENT_LOSS = 0x4,
        /// ANA Change.
        CHANGE = 0xF,
    }
}

/// The header of the log page.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct AnaHeader {
    /// Change count: grows when anything in the page changes.
    pub change_count: U64,
    /// Number of group descriptors.
    pub groups: U16,
    /// Reserved.
    pub reserved10: [u8; 6],
}
const _: () = assert!(size_of::<AnaHeader>() == 16);

/// A group; the identifiers of its namespaces follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AnaGroupDescriptor {
    /// ANA group identifier.
    pub group: U32,
    /// Number of namespace identifiers that follow.
    pub namespaces: U32,
    /// Change count: grows when anything in this descriptor changes.
    pub change_count: U64,
    /// The state, in bits 3:0.
    pub state: AnaState,
    /// Reserved.
    pub reserved17: [u8; 15],
}
const _: () = assert!(size_of::<AnaGroupDescriptor>() == 32);
const _: () = assert!(offset_of!(AnaGroupDescriptor, state) == 16);
