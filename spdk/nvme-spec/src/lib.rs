//! NVMe and NVMe-oF as they are on the wire and in registers: types only.
//!
//! Sources: NVM Express Base Specification 2.1 (here "Base"), NVM Command Set Specification 1.1 ("NVM"), NVM Express
//! NVMe/TCP Transport Specification 1.1 ("TCP").
//!
//! * Multi-byte fields of wire structures are little-endian types of `zerocopy`, so every structure has alignment 1
//!   and can be read from any byte position. Each has its size asserted under it.
//! * A number whose meaning is open (an opcode, a status, a feature) is a transparent newtype with named constants,
//!   never a Rust enum: what nobody has named yet is a value like any other.
//! * Fields that are zero-based on the wire end in `_z`.
//!
//! Not here: checks of what values mean together, and any behaviour.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

/// Makes a transparent number whose known values have names. `Debug` prints the name, or the number in hexadecimal.
macro_rules! open_enum {
    ($(#[$meta:meta])* $vis:vis struct $name:ident($repr:ty) {
        $($(#[$vmeta:meta])* $variant:ident = $value:expr,)*
    }) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, zerocopy::FromBytes, zerocopy::IntoBytes,
            zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        #[repr(transparent)]
        $vis struct $name(pub $repr);

        impl $name {
            $($(#[$vmeta])* pub const $variant: Self = Self($value);)*

            /// The name of a known value.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $(value if value == $value => Some(stringify!($variant)),)*
                    _ => None,
                }
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.0),
                }
            }
        }
    };
}

/// Makes a newtype of an identifier.
macro_rules! identifier {
    ($(#[$meta:meta])* $name:ident($repr:ty)) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub $repr);

        impl $name {
            /// The bare number.
            #[must_use]
            pub const fn get(self) -> $repr {
                self.0
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

pub mod aer;
pub mod command;
pub mod fabrics;
pub mod feature;
pub mod identify;
pub mod log;
pub mod nvm;
pub mod queue;
pub mod register;
pub mod status;
pub mod tcp;

pub use command::{AdminOpcode, CompletionQueueEntry, NvmOpcode, SglDescriptor, SubmissionQueueEntry};
pub use status::Status;

identifier!(
    /// Namespace Identifier (Base section 3.2.1). 0 is none, [`Nsid::ALL`] all.
    Nsid(u32)
);
identifier!(
    /// Queue Identifier (Base section 3.3): 0 is the admin queue.
    Qid(u16)
);
identifier!(
    /// Command Identifier (Base section 4.1, CDW0 bits 31:16).
    Cid(u16)
);
identifier!(
    /// Controller Identifier (Base section 3.1.2).
    Cntlid(u16)
);

impl Nsid {
    /// The broadcast value: all namespaces.
    pub const ALL: Self = Self(0xFFFF_FFFF);
    /// No namespace.
    pub const NONE: Self = Self(0);
}

impl Qid {
    /// The admin queue.
    pub const ADMIN: Self = Self(0);
}

impl Cntlid {
    /// In Connect: give me any controller (dynamic controller model; Base section 3.1.2).
    pub const DYNAMIC: Self = Self(0xFFFF);
    /// In Connect: give me any static controller.
    pub const STATIC: Self = Self(0xFFFE);
    /// The highest identifier that a controller may have (values from FFF0h are reserved).
    pub const MAX: Self = Self(0xFFEF);
}

/// `text` as a fixed field of ASCII, padded with spaces on the right (Base section 1.5: ASCII strings); cut where
/// it is too long, with anything but printable ASCII replaced by `?`.
#[must_use]
pub fn ascii_padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(text.chars()) {
        let printable = matches!(from, ' '..='~');
        *to = u8::try_from(from).ok().filter(|_| printable).unwrap_or(b'?');
    }
    field
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn an_unknown_number_is_a_value() {
        assert_eq!(format!("{:?}", AdminOpcode::IDENTIFY), "IDENTIFY");
        assert_eq!(format!("{:?}", AdminOpcode(0xEE)), "AdminOpcode(0xee)");
    }

    #[test]
    fn ascii_fields_are_padded_cut_and_clean() {
        assert_eq!(&ascii_padded::<8>("ab"), b"ab      ");
        assert_eq!(&ascii_padded::<2>("abc"), b"ab");
        assert_eq!(&ascii_padded::<3>("a\u{e9}\n"), b"a??");
    }
}
