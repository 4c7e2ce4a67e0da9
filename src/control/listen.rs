//! Listening sockets.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::error::ServeError;
use crate::config::Listener;
use crate::tcp::congestion::Congestion;

/// Connections that the kernel holds until a core accepts them.
const BACKLOG: i32 = 1024;

/// How long an address may stay taken. The io_uring of a target that was killed keeps its sockets until the kernel has
/// taken it apart, which is some time after the process is gone.
const TAKEN_MAX: Duration = Duration::from_secs(3);
const TAKEN_PAUSE: Duration = Duration::from_millis(20);

/// [`listen`], with patience for a predecessor that has just died.
pub(super) fn listen_patiently(
    address: SocketAddr,
    congestion: &Congestion,
) -> io::Result<(OwnedFd, SocketAddr)> {
    let give_up_at = Instant::now() + TAKEN_MAX;
    loop {
        match listen(address, congestion) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < give_up_at => {
                thread::sleep(TAKEN_PAUSE);
            }
            result => return result,
        }
    }
}

/// A listening socket on `address`, and the address it got (port 0 asks the kernel for a free one).
fn listen(address: SocketAddr, congestion: &Congestion) -> io::Result<(OwnedFd, SocketAddr)> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A target that was killed must be able to listen again at once, whatever its old connections are doing.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `[::]:4420` and `0.0.0.0:4420` may both be configured, and each means what it says.
        socket.set_only_v6(true)?;
    }
    // Before any host comes: a connection has what was given to its listener by then.
    congestion.give(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    let bound = socket.local_addr()?.as_socket().unwrap_or(address);
    Ok((socket.into(), bound))
}

/// The congestion control that connections of a listener are to have.
///
/// # Errors
/// [`ServeError::Congestion`] where one is configured that is not to be had.
pub(super) fn congestion_of(listener: &Listener) -> Result<Congestion, ServeError> {
    let wanted = listener.congestion_control.as_deref();
    Congestion::choose(wanted).map_err(|source| ServeError::Congestion {
        address: listener.address,
        name: wanted.unwrap_or_default().to_owned(),
        source,
    })
}

/// Whether a listener can have the congestion control that is configured, which the text of a configuration does not tell.
///
/// # Errors
/// [`ServeError::Congestion`] where it cannot.
pub fn check_listener(listener: &Listener) -> Result<(), ServeError> {
    congestion_of(listener).map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use rustix::net::sockopt;

    use super::*;

    #[test]
    fn connections_have_the_congestion_control_of_their_listener() {
        let read =
            |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).expect("a sysctl");
        let (default, allowed) = (read("tcp_congestion_control"), read("tcp_allowed_congestion_control"));
        let Some(other) = allowed.split_whitespace().find(|name| *name != default.trim()) else {
            eprintln!("SKIPPED: the congestion control of connections: none but the default is allowed here");
            return;
        };
        let other = Congestion::choose(Some(other)).expect("it is allowed");
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listening = listen(address.parse().expect("an address"), &other);
            let Ok((socket, address)) = listening else {
                assert!(address.starts_with('['), "IPv4 is everywhere");
                continue;
            };
            let _host = TcpStream::connect(address).expect("it listens");
            let (connection, _) = TcpListener::from(socket).accept().expect("the host");
            assert_eq!(sockopt::tcp_congestion(&connection).ok(), other.name);
        }
    }

    #[test]
    fn a_free_port_is_told_and_a_taken_one_refused() {
        let any = Congestion::default();
        let (_first, address) =
            listen("127.0.0.1:0".parse().expect("an address"), &any).expect("a free port");
        assert_ne!(address.port(), 0);
        let error = listen(address, &any).expect_err("the port is taken");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
