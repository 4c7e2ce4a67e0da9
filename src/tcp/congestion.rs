//! Which congestion control the connections of a listener have.
//!
//! A control that paces has the kernel send nothing before its time, which a timer tells. BBR paces always, at what it reckons the path to
//! carry: within a rack, or on loopback, a target whose answers are ready then waits for timers, some eight in a thousand reads at
//! depth 128. So where BBR is the kernel's default, which is chosen for hosts far away, a listener has Reno, unless one is named. Of those that
//! do not pace each kernel has it, and it costs least: beside CUBIC the kernel need not call it with the times of what was acknowledged, nor
//! where it begins to send again. To near hosts CUBIC is no better: there it grows as Reno does (RFC 9438, section 4.3).
//!
//! Not here: what hosts do with what they send, which is theirs to choose. A route that names a control (`ip route ... congctl`) overrules a
//! listener's: `tcp_ca_openreq_child` of the kernel's net/ipv4/tcp_minisocks.c.

use std::io;
use std::os::fd::AsFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with, sockopt};

/// How the names of those begin that pace whatever the path is: all that come with the kernel are versions of one.
const PACING: &str = "bbr";
/// What is taken instead.
const UNPACED: &str = "reno";
/// The longest name, in bytes (`TCP_CA_NAME_MAX` of the kernel's include/net/tcp.h, less the zero at the end).
pub const NAME_LEN_MAX: usize = 15;

/// What the connections of a listener are to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Congestion {
    /// Its name; none where it is left to the kernel: each connection has the default of the moment.
    pub name: Option<String>,
    /// The kernel's default, where it paces and nobody had named one. Without a name it is what there is: nothing else was to be had.
    pub pacing_default: Option<String>,
}

impl Congestion {
    /// The control that is `wanted`; without one the kernel's default, unless that paces now. It is tried on a socket that is
    /// used for nothing else: with `CAP_NET_ADMIN` the kernel then loads it, where it has it as a module.
    ///
    /// # Errors
    /// Where the kernel does not have what is wanted ([`io::ErrorKind::NotFound`]), or this process may not choose it
    /// ([`io::ErrorKind::PermissionDenied`]: it takes `CAP_NET_ADMIN`, or `net.ipv4.tcp_allowed_congestion_control`).
    pub fn choose(wanted: Option<&str>) -> io::Result<Self> {
        let probe =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP));
        if let Some(wanted) = wanted {
            sockopt::set_tcp_congestion(&probe?, wanted)?;
            return Ok(Self { name: Some(wanted.to_owned()), pacing_default: None });
        }
        // Whatever cannot be found out: nobody asked for anything, and all of them work.
        let Ok(probe) = probe else { return Ok(Self::default()) };
        let default = sockopt::tcp_congestion(&probe).unwrap_or_default();
        Ok(Self::instead_of(default, |name| sockopt::set_tcp_congestion(&probe, name).is_ok()))
    }

    /// What is taken where this is the kernel's default, if it may be.
    fn instead_of(default: String, may_have: impl Fn(&str) -> bool) -> Self {
        if !default.starts_with(PACING) {
            return Self::default();
        }
        let name = may_have(UNPACED).then(|| UNPACED.to_owned());
        Self { name, pacing_default: Some(default) }
    }

    /// What to do about one that was not to be had.
    #[must_use]
    pub fn remedy(name: &str, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                format!(
                    "run with CAP_NET_ADMIN, or add {name} to `sysctl net.ipv4.tcp_allowed_congestion_control`"
                )
            }
            io::ErrorKind::NotFound => format!(
                "`sysctl net.ipv4.tcp_available_congestion_control` lists what the kernel has; `modprobe tcp_{name}` may add it (without \
                 CAP_NET_ADMIN it must also be in net.ipv4.tcp_allowed_congestion_control); or leave `congestion_control` out"
            ),
            _ => "leave `congestion_control` out, and the kernel is not asked".to_owned(),
        }
    }

    /// Has all connections of a listener have it that are made from now on.
    ///
    /// # Errors
    /// As [`choose`](Self::choose), where the kernel has lost it since.
    pub fn give(&self, listener: impl AsFd) -> io::Result<()> {
        self.name.as_ref().map_or(Ok(()), |name| Ok(sockopt::set_tcp_congestion(listener, name)?))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn what_paces_is_replaced_and_nothing_else() {
        let chosen = |default: &str, there: &[&str]| {
            Congestion::instead_of(default.to_owned(), |name| there.contains(&name)).name
        };
        assert_eq!(chosen("bbr", &["bbr", "cubic", "reno"]).as_deref(), Some("reno"));
        assert_eq!(chosen("bbr2", &["bbr2", "reno"]).as_deref(), Some("reno"));
        let kept = Congestion::instead_of("bbr".to_owned(), |_| false);
        assert_eq!(kept, Congestion { name: None, pacing_default: Some("bbr".to_owned()) });
        for unpaced in ["cubic", "dctcp", "reno", ""] {
            assert_eq!(chosen(unpaced, &["cubic", "reno"]), None);
        }
    }

    #[test]
    fn connections_of_a_listener_have_what_was_chosen() {
        // There always, and allowed to everybody unless somebody saw to it.
        let reno = Congestion::choose(Some("reno")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        reno.give(&listener).unwrap();
        let _host = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (connection, _) = listener.accept().unwrap();
        assert_eq!(sockopt::tcp_congestion(&connection).unwrap(), "reno");
    }

    #[test]
    fn what_nobody_named_does_not_pace() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let default = sockopt::tcp_congestion(&listener).unwrap();
        let chosen = Congestion::choose(None).unwrap();
        chosen.give(&listener).unwrap();
        let _host = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (connection, _) = listener.accept().unwrap();
        let has = sockopt::tcp_congestion(&connection).unwrap();
        let paces = chosen.pacing_default.is_some() && chosen.name.is_none();
        assert_eq!(has, chosen.name.unwrap_or(default));
        assert!(paces || !has.starts_with(PACING), "{has}");
    }

    #[test]
    fn what_no_kernel_has_is_refused() {
        let error = Congestion::choose(Some("no-such-control")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
