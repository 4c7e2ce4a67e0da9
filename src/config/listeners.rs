//! The checks of `[[listener]]` and `[metrics]`: where is listened, and how.

use std::net::{IpAddr, SocketAddr};

use toml::Spanned;

use super::Listener;
use super::check::{Checker, clip};
use super::raw::{RawListener, RawMetrics};
use crate::tcp::congestion::NAME_LEN_MAX;

impl Checker<'_> {
    pub(super) fn listeners(&mut self, raw: Vec<Spanned<RawListener>>, any_subsystem: bool) -> Vec<Listener> {
        if raw.is_empty() {
            self.refuse(0..0, "no [[listener]]: name at least one, such as address = \"127.0.0.1:4420\"");
            return Vec::new();
        }
        let first = raw.first().map_or(0..0, Spanned::span);
        let mut listeners: Vec<Listener> = Vec::with_capacity(raw.len());
        for item in raw {
            let listener = item.into_inner();
            let span = listener.address.span();
            let Ok(address) = listener.address.get_ref().parse::<SocketAddr>() else {
                let reason = format!(
                    "`{}` is no address and port: write 192.0.2.1:4420 or [2001:db8::1]:4420",
                    clip(listener.address.get_ref())
                );
                self.refuse(span, reason);
                continue;
            };
            if let Some(other) = listeners.iter().find(|other| collide(other.address, address)) {
                self.refuse(span, format!("{address} collides with the listener on {}", other.address));
            }
            let advertise = self.advertise(listener.advertise);
            let congestion_control = self.congestion_control(listener.congestion_control);
            let discovery_only = listener.discovery_only;
            listeners.push(Listener { address, discovery_only, advertise, congestion_control });
        }
        if any_subsystem && !listeners.is_empty() && listeners.iter().all(|listener| listener.discovery_only)
        {
            self.refuse(
                first,
                "every listener is discovery_only, so no host could reach a subsystem: add one that is not",
            );
        }
        listeners
    }

    pub(super) fn metrics(&mut self, raw: Option<RawMetrics>, listeners: &[Listener]) -> Option<SocketAddr> {
        let listen = raw?.listen;
        let Ok(address) = listen.get_ref().parse::<SocketAddr>() else {
            let text = clip(listen.get_ref());
            self.refuse(listen.span(), format!("`{text}` is no address and port: write 127.0.0.1:9464"));
            return None;
        };
        if let Some(other) = listeners.iter().find(|other| collide(other.address, address)) {
            let reason = format!("{address} collides with the listener on {}", other.address);
            self.refuse(listen.span(), reason);
        }
        Some(address)
    }

    /// Whether the kernel has it is for those to find out who listen: it may be a module.
    fn congestion_control(&mut self, name: Option<Spanned<String>>) -> Option<String> {
        let name = name?;
        let is_name = |name: &str| {
            (1..=NAME_LEN_MAX).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if !is_name(name.get_ref()) {
            let text = clip(name.get_ref());
            self.refuse(
                name.span(),
                format!("`{text}` names no congestion control: write \"cubic\", or \"bbr\""),
            );
        }
        Some(name.into_inner())
    }

    fn advertise(&mut self, address: Option<Spanned<String>>) -> Option<IpAddr> {
        let address = address?;
        match address.get_ref().parse::<IpAddr>() {
            Ok(ip) if !ip.is_unspecified() && !ip.is_multicast() => Some(ip),
            _ => {
                let reason = format!(
                    "`{}` is no address that a host can connect to: write 192.0.2.1 or 2001:db8::1, without a port",
                    clip(address.get_ref())
                );
                self.refuse(address.span(), reason);
                None
            }
        }
    }
}

/// Whether the kernel would refuse to listen on both.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    let any = |address: SocketAddr| address.ip().is_unspecified();
    let same_family = a.is_ipv4() == b.is_ipv4();
    a.port() != 0 && a.port() == b.port() && (a.ip() == b.ip() || (same_family && (any(a) || any(b))))
}
