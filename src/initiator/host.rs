//! Who this machine is as a host: what nvme-cli has in `/etc/nvme`, so that targets know its programs as they know its kernel.

use super::controller::Host;
use nvme_spec::fabrics::nqn_field;
use std::path::Path;
use uuid::Uuid;

/// Where nvme-cli keeps the host's names.
const DIRECTORY: &str = "/etc/nvme";

impl Host {
    /// The host that the arguments, the files of nvme-cli, or chance make us.
    ///
    /// NQN: `nqn`, else the one made of `id`, else `/etc/nvme/hostnqn`, else one made up. Identifier: `id`, else
    /// `/etc/nvme/hostid` when the NQN is from there too, else the one in the NQN, else one made up.
    #[must_use]
    pub fn of_this_machine(nqn: Option<&str>, id: Option<[u8; 16]>) -> Self {
        Self::of_files(Path::new(DIRECTORY), nqn, id)
    }

    fn of_files(directory: &Path, nqn: Option<&str>, id: Option<[u8; 16]>) -> Self {
        let read = |name: &str| {
            std::fs::read_to_string(directory.join(name)).ok().map(|text| text.trim().to_owned())
        };
        let made_up = Self::random();
        let from_file = || read("hostnqn").filter(|text| nqn_field(text).is_some());
        let (nqn, of_file) = match (nqn, id) {
            (Some(nqn), _) => (nqn.to_owned(), false),
            (None, Some(id)) => (format!("nqn.2014-08.org.nvmexpress:uuid:{}", Uuid::from_bytes(id)), false),
            (None, None) => from_file().map_or_else(|| (made_up.nqn.clone(), false), |nqn| (nqn, true)),
        };
        let parsed = |text: &str| Uuid::parse_str(text).ok().map(Uuid::into_bytes);
        let id_file = || of_file.then(|| read("hostid")).flatten().and_then(|text| parsed(&text));
        let in_nqn = || nqn.rsplit_once("uuid:").and_then(|(_, id)| parsed(id));
        let id = id.or_else(id_file).or_else(in_nqn).unwrap_or(made_up.id);
        Self { nqn, id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_identifier_follows_the_nqn() {
        let nowhere = Path::new("/nonexistent");
        let id = Uuid::from_u128(7);
        let nqn = format!("nqn.2014-08.org.nvmexpress:uuid:{id}");
        let of_id = Host { nqn: nqn.clone(), id: id.into_bytes() };
        assert_eq!(Host::of_files(nowhere, Some(&nqn), None), of_id);
        assert_eq!(Host::of_files(nowhere, None, Some(id.into_bytes())), of_id);
        assert_ne!(Host::of_files(nowhere, None, None), Host::of_files(nowhere, None, None), "made up");
    }

    #[test]
    fn the_files_of_nvme_cli_say_who_we_are_unless_we_say_it() {
        let directory = tempfile::tempdir().unwrap();
        let (id, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        std::fs::write(directory.path().join("hostnqn"), "nqn.2026-11.example:host\n").unwrap();
        std::fs::write(directory.path().join("hostid"), format!("{id}\n")).unwrap();
        let host = Host::of_files(directory.path(), None, None);
        assert_eq!(host, Host { nqn: "nqn.2026-11.example:host".to_owned(), id: id.into_bytes() });
        let nqn = format!("nqn.2014-08.org.nvmexpress:uuid:{other}");
        assert_eq!(Host::of_files(directory.path(), Some(&nqn), None).id, other.into_bytes());
    }
}
