//! What an NVMe namespace is called, whoever asks: the kernel by sysfs, or a driver by Identify.
//!
//! The address of an extent is handed to a driver only when both speak of the same namespace. Names such as `nvme0n1`
//! say nothing about that. A globally unique identifier decides where both sides tell one of the same kind; otherwise the
//! serial number of the subsystem together with the namespace identifier.

use std::fmt;

/// The identifiers of a namespace, as far as somebody tells them. Zeros count as not told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceIdentity {
    /// NGUID.
    pub nguid: Option<[u8; 16]>,
    /// EUI64.
    pub eui64: Option<[u8; 8]>,
    /// The namespace's UUID.
    pub uuid: Option<[u8; 16]>,
    /// The serial number of the controller, which is that of the whole subsystem.
    pub serial: Option<String>,
    /// NSID.
    pub nsid: Option<u32>,
}

/// What two sets of identifiers say of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityVerdict {
    /// The same namespace, by these identifiers.
    Same(&'static str),
    /// Not the same: these identifiers differ.
    Different(&'static str),
    /// They have no identifiers in common.
    Unknown,
}

impl NamespaceIdentity {
    /// Whether both are the same namespace. Any identifier that differs decides against it; NSID and serial number do
    /// so only where no unique identifier is there to compare, for a namespace may be reached in several ways.
    #[must_use]
    pub fn compare(&self, other: &Self) -> IdentityVerdict {
        let unique = [
            ("NGUID", equal(self.nguid.as_ref(), other.nguid.as_ref())),
            ("EUI64", equal(self.eui64.as_ref(), other.eui64.as_ref())),
            ("UUID", equal(self.uuid.as_ref(), other.uuid.as_ref())),
        ];
        if let Some((name, _)) = unique.iter().find(|(_, equal)| *equal == Some(false)) {
            return IdentityVerdict::Different(name);
        }
        if let Some((name, _)) = unique.iter().find(|(_, equal)| *equal == Some(true)) {
            return IdentityVerdict::Same(name);
        }
        match (
            equal(self.serial.as_ref(), other.serial.as_ref()),
            equal(self.nsid.as_ref(), other.nsid.as_ref()),
        ) {
            (Some(false), _) => IdentityVerdict::Different("serial number"),
            (_, Some(false)) => IdentityVerdict::Different("namespace identifier"),
            (Some(true), Some(true)) => IdentityVerdict::Same("serial number and namespace identifier"),
            _ => IdentityVerdict::Unknown,
        }
    }

    /// Whether nothing is told that could identify a namespace.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.nguid.is_none()
            && self.eui64.is_none()
            && self.uuid.is_none()
            && (self.serial.is_none() || self.nsid.is_none())
    }
}

impl fmt::Display for NamespaceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = super::identity::to_hex;
        let parts = [
            self.nguid.map(|id| format!("NGUID {}", hex(&id))),
            self.eui64.map(|id| format!("EUI64 {}", hex(&id))),
            self.uuid.map(|id| format!("UUID {}", hex(&id))),
            self.serial.as_ref().map(|serial| format!("serial {serial}")),
            self.nsid.map(|nsid| format!("namespace {nsid}")),
        ];
        let told: Vec<String> = parts.into_iter().flatten().collect();
        f.write_str(if told.is_empty() { "no identifiers" } else { "" })?;
        f.write_str(&told.join(", "))
    }
}

fn equal<T: PartialEq>(one: Option<&T>, other: Option<&T>) -> Option<bool> {
    Some(one? == other?)
}

/// An identifier of `N` bytes in any of the ways that people and sysfs write them: hexadecimal digits, with blanks,
/// dashes or colons between. `None` when it is none, or all zeros.
#[must_use]
pub fn parse_identifier<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits: String =
        text.chars().filter(|c| !matches!(c, ' ' | '-' | ':')).map(|c| c.to_ascii_lowercase()).collect();
    super::identity::from_hex(&digits).filter(|bytes| bytes.iter().any(|&byte| byte != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> NamespaceIdentity {
        NamespaceIdentity {
            nguid: Some([1; 16]),
            eui64: Some([2; 8]),
            uuid: Some([3; 16]),
            serial: Some("S1".to_owned()),
            nsid: Some(1),
        }
    }

    #[test]
    fn one_unique_identifier_is_enough_and_one_that_differs_too() {
        let nguid = NamespaceIdentity { nguid: Some([1; 16]), ..Default::default() };
        assert_eq!(full().compare(&nguid), IdentityVerdict::Same("NGUID"));
        let eui64 = NamespaceIdentity { nguid: Some([1; 16]), eui64: Some([9; 8]), ..Default::default() };
        assert_eq!(full().compare(&eui64), IdentityVerdict::Different("EUI64"));
        // The same namespace by another controller: unique identifiers are asked, not the numbers.
        let elsewhere = NamespaceIdentity { serial: Some("S2".to_owned()), nsid: Some(7), ..full() };
        assert_eq!(full().compare(&elsewhere), IdentityVerdict::Same("NGUID"));
    }

    #[test]
    fn serial_and_nsid_decide_only_together() {
        let numbers = |serial: &str, nsid| NamespaceIdentity {
            serial: Some(serial.to_owned()),
            nsid: Some(nsid),
            ..Default::default()
        };
        let both = IdentityVerdict::Same("serial number and namespace identifier");
        assert_eq!(full().compare(&numbers("S1", 1)), both);
        assert_eq!(full().compare(&numbers("S1", 2)), IdentityVerdict::Different("namespace identifier"));
        assert_eq!(full().compare(&numbers("S2", 1)), IdentityVerdict::Different("serial number"));
        let serial = NamespaceIdentity { nsid: None, ..numbers("S1", 1) };
        assert_eq!(full().compare(&serial), IdentityVerdict::Unknown);
        assert!(serial.is_empty() && !full().is_empty());
        assert_eq!(full().compare(&NamespaceIdentity::default()), IdentityVerdict::Unknown);
    }

    #[test]
    fn identifiers_are_read_as_sysfs_writes_them() {
        let nguid = "0001feed-0203-0405-0607-08090a0b0c0d";
        let expected = [0, 1, 0xFE, 0xED, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13];
        assert_eq!(parse_identifier::<16>(nguid), Some(expected));
        assert_eq!(parse_identifier::<8>("00 25 38 ab cd ef 01 23"), parse_identifier("002538ABCDEF0123"));
        for nothing in ["", "00 00 00 00 00 00 00 00", "0025", "not one, either"] {
            assert_eq!(parse_identifier::<8>(nothing), None, "{nothing}");
        }
    }
}
