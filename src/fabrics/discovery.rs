//! The Discovery log page (NVM Express Base Specification 2.1, section 5.1.12.3.1): for each host, the subsystems that
//! it may connect to, on every port that serves them, and the discovery service itself.

use std::net::{IpAddr, SocketAddr};

use nvme_spec::Cntlid;
use nvme_spec::fabrics::{DISCOVERY_NQN, nqn_field};
use nvme_spec::log::{
    AddressFamily, DiscoveryLogEntry, DiscoveryLogHeader, SubsystemType, TransportType, eflags, sectype, treq,
};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::controller::Controller;
use super::exchange::Arrival;
use super::provision::PortSpec;
use super::target::Target;

/// ASQSZ: entries of an admin queue that every host may ask for.
const ADMIN_QUEUE_ENTRIES: u16 = 32;

/// The log for the host of a discovery controller that came in at `arrival`.
pub(super) fn log(target: &Target, controller: &Controller, arrival: &Arrival) -> Vec<u8> {
    let catalog = target.catalog();
    let mut entries = Vec::new();
    if let Some(port) = catalog.ports.get(&arrival.port) {
        entries.extend(entry(port, arrival, SubsystemType::CURRENT_DISCOVERY, DISCOVERY_NQN));
    }
    for subsystem in catalog.subsystems_for(&controller.host.nqn) {
        for port in catalog.ports.values().filter(|port| !port.discovery_only) {
            entries.extend(entry(port, arrival, SubsystemType::NVM, &subsystem.nqn));
        }
    }
    let mut header = DiscoveryLogHeader::new_zeroed();
    header.genctr = U64::new(catalog.genctr);
    header.numrec = U64::new(entries.len() as u64);
    let mut log = header.as_bytes().to_vec();
    entries.iter().for_each(|entry| log.extend_from_slice(entry.as_bytes()));
    log
}

/// The record of one subsystem at one port, or `None` where the host cannot reach the port by any address we know.
fn entry(port: &PortSpec, arrival: &Arrival, subtype: SubsystemType, nqn: &str) -> Option<DiscoveryLogEntry> {
    let address = address_of(port, arrival)?;
    let mut entry = DiscoveryLogEntry::new_zeroed();
    entry.trtype = TransportType::TCP;
    entry.adrfam = if address.is_ipv4() { AddressFamily::IPV4 } else { AddressFamily::IPV6 };
    entry.subtype = subtype;
    // Not "not required": nvme-cli 2.4 takes that for an offer of TLS whatever SECTYPE says, and asks for a key.
    entry.treq = treq::SECURE_CHANNEL_NOT_SPECIFIED | treq::DISABLE_SQ_FLOW_CONTROL;
    entry.portid = U16::new(port.id.0);
    entry.cntlid = U16::new(Cntlid::DYNAMIC.0);
    entry.asqsz = U16::new(ADMIN_QUEUE_ENTRIES);
    if subtype == SubsystemType::CURRENT_DISCOVERY {
        entry.eflags = U16::new(eflags::DUPLICATE_INFORMATION | eflags::EXPLICIT_PERSISTENT_CONNECTION);
    }
    entry.trsvcid = nvme_spec::ascii_padded(&address.port().to_string());
    entry.subnqn = nqn_field(nqn)?;
    entry.traddr = nvme_spec::ascii_padded(&address.ip().to_string());
    if let Some(security) = entry.tsas.first_mut() {
        *security = sectype::NONE;
    }
    Some(entry)
}

/// Where the host finds a port: as advertised, as listened on, or, for a wildcard, as the host addressed us.
fn address_of(port: &PortSpec, arrival: &Arrival) -> Option<SocketAddr> {
    let listened = port.listen.ip();
    let is_arrivals = port.id == arrival.port;
    let local = arrival.local.ip().to_canonical();
    let ip = match port.advertise {
        Some(advertised) => advertised,
        None if !listened.is_unspecified() => listened,
        None => local,
    };
    // 0.0.0.0 is not reached over IPv6; [::] is reached over both.
    let reached = match (port.advertise, listened) {
        (None, IpAddr::V4(any)) if any.is_unspecified() => ip.is_ipv4(),
        _ => true,
    };
    // A port that asked the kernel for a free number is known by the number it came in on.
    let number = match port.listen.port() {
        0 if is_arrivals => arrival.local.port(),
        0 => return None,
        number => number,
    };
    (reached && !ip.is_unspecified()).then(|| SocketAddr::new(ip.to_canonical(), number))
}

#[cfg(test)]
mod tests {
    use super::super::provision::PortId;
    use super::*;

    fn port(listen: &str, advertise: Option<&str>) -> PortSpec {
        let advertise = advertise.map(|text| text.parse().unwrap());
        PortSpec { id: PortId(1), listen: listen.parse().unwrap(), advertise, discovery_only: false }
    }

    fn found(port: &PortSpec, local: &str) -> Option<String> {
        let arrival =
            Arrival { port: PortId(7), peer: "10.0.0.9:999".parse().unwrap(), local: local.parse().unwrap() };
        address_of(port, &arrival).map(|address| address.to_string())
    }

    #[test]
    fn wildcards_are_named_as_the_host_addressed_us() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(found(&port("10.0.0.1:4420", None), "10.0.0.2:8009"), some("10.0.0.1:4420"));
        assert_eq!(found(&port("0.0.0.0:4420", None), "10.0.0.2:8009"), some("10.0.0.2:4420"));
        assert_eq!(found(&port("[::]:4420", None), "[::ffff:10.0.0.2]:8009"), some("10.0.0.2:4420"));
        assert_eq!(found(&port("[::]:4420", None), "[fd00::2]:8009"), some("[fd00::2]:4420"));
        assert_eq!(found(&port("0.0.0.0:4420", None), "[fd00::2]:8009"), None);
        assert_eq!(found(&port("0.0.0.0:4420", Some("192.0.2.1")), "[fd00::2]:1"), some("192.0.2.1:4420"));
        assert_eq!(found(&port("0.0.0.0:0", None), "10.0.0.2:8009"), None);
    }
}
