//! Names of namespaces and subsystems that stay the same over restarts, reboots and hosts.
//!
//! They are SHA-256 digests of what an export *is*: the subsystem's NQN, the namespace identifier and the file behind
//! it. A host that has seen a namespace thus finds the same `nvme-eui.` name after every restart, and two subsystems
//! that offer the same file offer two names.

use nvme_spec::Nsid;
use sha2::{Digest, Sha256};

/// What a namespace is backed by, as far as its names depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity(Vec<u8>);

impl Identity {
    /// A file: the UUID of its filesystem (network order), its inode number and the inode's generation.
    #[must_use]
    pub fn of_file(filesystem: &[u8; 16], inode: u64, inode_generation: u32) -> Self {
        let mut bytes = b"file".to_vec();
        bytes.extend_from_slice(filesystem);
        bytes.extend_from_slice(&inode.to_le_bytes());
        bytes.extend_from_slice(&inode_generation.to_le_bytes());
        Self(bytes)
    }

    /// The same from this byte of the file on, which is another content, and so has another name. From byte 0 on it is the
    /// file itself.
    #[must_use]
    pub fn from_byte(mut self, first: u64) -> Self {
        if first > 0 {
            self.0.extend_from_slice(b"from");
            self.0.extend_from_slice(&first.to_le_bytes());
        }
        self
    }

    /// Something that is no file, by a name that the caller keeps stable, e.g. `memory`.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let mut bytes = b"name".to_vec();
        bytes.extend_from_slice(name.as_bytes());
        Self(bytes)
    }
}

/// The NGUID of a namespace (NVM Express Base Specification 2.1, section 4.7.1.4). The universal/local bit of its
/// OUI says that it is locally administered, so that it collides with no registered one.
#[must_use]
pub(super) fn nguid(subsystem: &str, nsid: Nsid, identity: &Identity) -> [u8; 16] {
    let digest = digest(b"fastice nguid 1", subsystem, nsid, identity);
    let mut nguid = [0; 16];
    nguid.copy_from_slice(&digest[..16]);
    nguid[8] = local(nguid[8]);
    nguid
}

/// The EUI64 of a namespace (the same specification, section 4.7.1.3), locally administered like [`nguid`].
#[must_use]
pub(super) fn eui64(subsystem: &str, nsid: Nsid, identity: &Identity) -> [u8; 8] {
    let digest = digest(b"fastice eui64 1", subsystem, nsid, identity);
    let mut eui64 = [0; 8];
    eui64.copy_from_slice(&digest[..8]);
    eui64[0] = local(eui64[0]);
    eui64
}

/// A serial number of 20 hexadecimal digits, for a subsystem that was given none.
#[must_use]
pub fn serial_of(subsystem: &str) -> String {
    let digest = Sha256::new().chain_update(b"fastice serial 1").chain_update(subsystem).finalize();
    digest.iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

/// First octet of an OUI: locally administered, not a group address.
const fn local(octet: u8) -> u8 {
    (octet | 0x02) & !0x01
}

fn digest(purpose: &[u8], subsystem: &str, nsid: Nsid, identity: &Identity) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(purpose);
    hash.update((subsystem.len() as u64).to_le_bytes());
    hash.update(subsystem);
    hash.update(nsid.0.to_le_bytes());
    hash.update(&identity.0);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NQN: &str = "nqn.2026-11.com.example:a";

    #[test]
    fn names_are_stable_and_depend_on_every_input() {
        let file = Identity::of_file(&[7; 16], 133, 1);
        let name = nguid(NQN, Nsid(1), &file);
        assert_eq!(name, nguid(NQN, Nsid(1), &file.clone()));
        assert_ne!(name, nguid(NQN, Nsid(2), &file));
        assert_ne!(name, nguid("nqn.2026-11.com.example:b", Nsid(1), &file));
        assert_ne!(name, nguid(NQN, Nsid(1), &Identity::of_file(&[7; 16], 134, 1)));
        assert_ne!(name, nguid(NQN, Nsid(1), &Identity::of_file(&[7; 16], 133, 2)));
        assert_ne!(name, nguid(NQN, Nsid(1), &file.clone().from_byte(8192)));
        assert_eq!(name, nguid(NQN, Nsid(1), &file.clone().from_byte(0)));
        assert_ne!(name[..8], eui64(NQN, Nsid(1), &file));
    }

    #[test]
    fn names_never_change_between_versions() {
        let file = Identity::of_file(&[7; 16], 133, 1);
        insta::assert_debug_snapshot!((
            hex(&nguid(NQN, Nsid(1), &file)),
            hex(&eui64(NQN, Nsid(1), &file)),
            serial_of(NQN)
        ));
    }

    #[test]
    fn names_are_locally_administered_and_never_group_addresses() {
        for inode in 0..64 {
            let identity = Identity::of_file(&[1; 16], inode, 0);
            assert_eq!(nguid(NQN, Nsid(1), &identity)[8] & 3, 2);
            assert_eq!(eui64(NQN, Nsid(1), &identity)[0] & 3, 2);
        }
        assert_eq!(serial_of(NQN).len(), 20);
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
