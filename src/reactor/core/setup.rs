//! What a core is made of, and how an accepted socket gets its names.

use std::os::fd::OwnedFd;

use hugepage_alloc::{BufferPool, RegionOptions};

use super::LISTENERS_MAX;
use crate::fabrics::PortId;
use crate::reactor::engine::DEVICE_QUEUE_DEPTH;
use crate::reactor::mailbox::Accepted;
use crate::reactor::{CoreOptions, CoresError};
use crate::ring::{Ring, RingOptions};

/// A core's ring and buffers.
pub(super) fn memory(cpu: usize, options: &CoreOptions) -> Result<(Ring, BufferPool), CoresError> {
    let bytes = usize::try_from(options.buffer_memory.0).unwrap_or(usize::MAX);
    let region = RegionOptions { share: options.share_buffers, ..RegionOptions::default() };
    let pool =
        BufferPool::with_options(bytes, &region).map_err(|source| CoresError::Buffers { cpu, source })?;
    let ring_options = RingOptions { slots: ring_slots(options.connections_max), ..RingOptions::default() };
    let ring = Ring::new(&ring_options).map_err(|source| CoresError::Ring { cpu, source })?;
    ring.register_pool(&pool).map_err(|source| CoresError::Ring { cpu, source })?;
    Ok((ring, pool))
}

/// Operations that the ring has room for: a receive and a send of each connection, the listeners and the bell, and
/// what two devices can have in flight on top. More devices at full depth share that; the others wait a turn.
fn ring_slots(connections_max: usize) -> u32 {
    let slots = connections_max * 2 + LISTENERS_MAX + 1 + DEVICE_QUEUE_DEPTH * 2;
    u32::try_from(slots.next_power_of_two()).unwrap_or(1 << 15).min(1 << 15)
}

/// Both ends of an accepted socket, or `None` when the peer is gone already.
pub(super) fn introduce(socket: OwnedFd, port: PortId) -> Option<Accepted> {
    let peer = rustix::net::getpeername(&socket).ok()?;
    let local = rustix::net::getsockname(&socket).ok()?;
    Some(Accepted { peer: peer?.try_into().ok()?, local: local.try_into().ok()?, socket, port })
}
