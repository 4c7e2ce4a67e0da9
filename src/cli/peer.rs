//! What the commands share that connect to a target: addresses, who we are as a host, how errors end a command.

use std::net::{SocketAddr, ToSocketAddrs as _};

use anyhow::Context as _;
use clap::Args;
use nvme_spec::Status;

use super::exit::{Exit, Failure};
use crate::config::Nqn;
use crate::initiator::controller::Host;
use crate::initiator::error::{ErrorKind, InitiatorError};

/// The port of a subsystem (NVMe/TCP Transport specification, registered with IANA).
pub(super) const PORT_IO: u16 = 4420;
/// The port of discovery alone.
pub(super) const PORT_DISCOVERY: u16 = 8009;

/// Who we are for the target.
#[derive(Clone, Debug, Args)]
pub struct HostArgs {
    /// Our host NQN [default: /etc/nvme/hostnqn, else one made up]
    #[arg(long, value_name = "NQN")]
    pub host_nqn: Option<Nqn>,
    /// Our host identifier, a UUID [default: /etc/nvme/hostid, else the one in the NQN, else one made up]
    #[arg(long, value_name = "UUID")]
    pub host_id: Option<uuid::Uuid>,
}

impl HostArgs {
    /// The host that the arguments, the files of nvme-cli, or chance make us.
    pub(super) fn host(&self) -> Host {
        let nqn = self.host_nqn.as_ref().map(ToString::to_string);
        Host::of_this_machine(nqn.as_deref(), self.host_id.map(uuid::Uuid::into_bytes))
    }
}

/// `192.0.2.1`, `192.0.2.1:4420`, `[2001:db8::1]:4420`, `2001:db8::1`, or a name in place of the address.
///
/// # Errors
/// When the name has no address.
pub(super) fn resolve(text: &str, port: u16) -> Result<SocketAddr, Failure> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address);
    }
    if let Ok(ip) = text.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(SocketAddr::new(ip, port));
    }
    let named = if text.contains(':') { text.to_owned() } else { format!("{text}:{port}") };
    let found = named.to_socket_addrs().with_context(|| format!("`{text}` is no address"));
    let first = found.map(|mut addresses| addresses.next());
    match first {
        Ok(Some(address)) => Ok(address),
        Ok(None) => Err(Failure::new(Exit::Usage, anyhow::anyhow!("`{text}` has no address"))),
        Err(error) => {
            Err(Failure::new(Exit::Usage, error).with_remedy("write 192.0.2.1:4420 or [2001:db8::1]:4420"))
        }
    }
}

/// Whether a target that was reached refused Connect.
fn is_refusal(status: Status) -> bool {
    [
        Status::CONNECT_INCOMPATIBLE_FORMAT,
        Status::CONNECT_CONTROLLER_BUSY,
        Status::CONNECT_INVALID_PARAMETERS,
        Status::CONNECT_RESTART_DISCOVERY,
        Status::CONNECT_INVALID_HOST,
    ]
    .contains(&status.code())
}

impl From<InitiatorError> for Failure {
    fn from(error: InitiatorError) -> Self {
        let (exit, remedy) = match error.kind() {
            ErrorKind::Connect => {
                (Exit::Unreachable, "check address and port, and that `fastice serve` runs there")
            }
            ErrorKind::Timeout | ErrorKind::Closed | ErrorKind::Terminated => {
                (Exit::Unreachable, "see the log of the target")
            }
            ErrorKind::Status if error.status().is_some_and(is_refusal) => (
                Exit::Unreachable,
                "check both NQNs and the port: the target may not allow this host (`hosts` in its configuration), and \
                 discovery ports serve no namespaces",
            ),
            ErrorKind::Status => (Exit::Failed, "see the log of the target"),
            ErrorKind::Verify => {
                (Exit::Differs, "the data is not what was written: keep the disk as it is, and find out why")
            }
            ErrorKind::InvalidArgument => (Exit::Usage, "correct the command line"),
            ErrorKind::Protocol | ErrorKind::DataDigest | ErrorKind::Incompatible => {
                (Exit::Failed, "see the log of the target; report it when both are fastice")
            }
        };
        Self::new(exit, error).with_remedy(remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_with_and_without_port() {
        for (text, address) in [
            ("127.0.0.1", "127.0.0.1:4420"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("::1", "[::1]:4420"),
            ("[::1]", "[::1]:4420"),
            ("[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(resolve(text, PORT_IO).expect(text).to_string(), address);
        }
        assert_eq!(resolve("no such host", PORT_IO).expect_err("no address").exit, Exit::Usage);
    }
}
