//! A target put together from the parts of the real one, to serve what no configuration names: a whole disk, a frozen map on a
//! device that does no work, or an image by our own driver.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fastice::block::nvme::{NvmeController, NvmeWay, Standing, SystemReach};
use fastice::block::{BlockDevice, NullDevice, UringDevice, UringOptions};
use fastice::config::DEFAULT_GATHER;
use fastice::extent::{FrozenMap, read_map};
use fastice::fabrics::{
    FencePolicy, HostPolicy, Identity, NamespaceSpec, PortId, PortSpec, SubsystemSpec, Target, TargetOptions,
};
use fastice::reactor::{ConnectionFactory, CoreOptions, Cores, IdlePolicy};
use fastice::tcp::congestion::Congestion;
use fastice::tcp::{TcpCounters, TcpFactory, TcpTimeouts};
use fastice::units::{BlockSize, ByteLen};
use nvme_spec::Nsid;

use super::NQN;
use crate::scale::lookup::maps;

/// As the real one has it by default.
const BUFFER_MEMORY: ByteLen = ByteLen(64 << 20);
const CONNECTIONS_MAX: usize = 1024;
/// What is served through a map.
pub(super) const WITH_NSID: Nsid = Nsid(1);
/// The same device without it.
pub(super) const WITHOUT_NSID: Nsid = Nsid(2);
const PATIENCE: Duration = Duration::from_secs(10);

/// A map of so many extents on the null device, or none, and the length of the namespace.
pub(super) struct OnNull {
    map: Option<FrozenMap>,
    device_len: ByteLen,
    /// Of the namespace.
    pub(super) len: ByteLen,
}

impl OnNull {
    /// Extents of the map of which the one or the other form is served, see [`maps`].
    pub(super) const EXTENTS: u64 = 10_000;

    /// The map of [`OnNull::EXTENTS`] extents, or the one of the same length with a single one, or none at all.
    pub(super) fn make(extents: Option<u64>) -> Result<Self> {
        let (many, one) = maps(Self::EXTENTS)?;
        let (len, device_len) = (ByteLen(many.len().get()), many.identity().disk.size);
        let map = extents.map(|extents| if extents == 1 { one } else { many });
        Ok(Self { map, device_len, len })
    }
}

/// One that serves.
pub(super) struct Whole {
    cores: Cores,
    pub(super) address: SocketAddr,
    /// Kept as long as hosts come.
    _target: Arc<Target>,
}

impl Whole {
    /// Serves a map on the null device as one namespace, and the device as another.
    pub(super) fn start_on_null(on: OnNull, cpu: usize) -> Result<Self> {
        let device = Arc::new(NullDevice::new(on.device_len, BlockSize::B4096)?);
        Self::start(on.map, device, on.len, cpu)
    }

    /// Serves the disk that has the filesystem of this file, as the real target reaches it.
    pub(super) fn start_disk(file: &Path, cpu: usize) -> Result<Self> {
        let number = read_map(file)?.0.disk.number;
        let options = UringOptions { major: number.major, minor: number.minor, read_only: false };
        let device = UringDevice::open(&options)?;
        let len = ByteLen(device.info().len.get() & !4095);
        Self::start(None, Arc::new(device), len, cpu)
    }

    /// Serves an image by our own driver, from a controller in software that is in this process too.
    pub(super) fn start_model(image: &Path, cpu: usize) -> Result<Self> {
        let way = NvmeWay::Model(image.to_owned());
        let controller = NvmeController::start(&way, Arc::new(SystemReach))?;
        let device = controller.device(1, Arc::new(|_, _| {}))?;
        if let Standing::Unproven(epoch) = device.standing() {
            device.admit(epoch)?;
        }
        let len = ByteLen(device.info().len.get() & !4095);
        Self::start(None, device, len, cpu)
    }

    fn start(map: Option<FrozenMap>, device: Arc<dyn BlockDevice>, len: ByteLen, cpu: usize) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // As a listener of the whole program has it.
        Congestion::choose(None)?.give(&listener)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let target = Target::new(TargetOptions::default());
        let counters = Arc::new(TcpCounters::default());
        let factory = TcpFactory::new(Arc::clone(&target), counters, TcpTimeouts::default());
        let options = CoreOptions {
            buffer_memory: BUFFER_MEMORY,
            share_buffers: false,
            idle: IdlePolicy::AlwaysPoll,
            connections_max: CONNECTIONS_MAX,
            linger: Duration::ZERO,
            gather: DEFAULT_GATHER,
            hold: None,
            oversight: None,
            stages: Arc::default(),
        };
        let cores = Cores::start(&[cpu], &options, &(Arc::new(factory) as Arc<dyn ConnectionFactory>))?;
        // Without a map there is one namespace; with one, both.
        let maps = match map {
            Some(map) => vec![(WITH_NSID, Some(Arc::new(map))), (WITHOUT_NSID, None)],
            None => vec![(Nsid(1), None)],
        };
        let namespaces = maps.into_iter().map(|(nsid, map)| NamespaceSpec {
            nsid,
            map,
            device: Arc::clone(&device),
            read_only: false,
            on_fence: FencePolicy::NotReady,
            block_size: BlockSize::B4096,
            len,
            identity: Identity::named("bench"),
        });
        let subsystem = SubsystemSpec {
            nqn: NQN.to_owned(),
            serial: "1".to_owned(),
            model: "bench".to_owned(),
            hosts: HostPolicy::Any,
            namespaces: namespaces.collect(),
        };
        let port = PortSpec { id: PortId(1), listen: address, advertise: None, discovery_only: false };
        let added = target.publish(vec![subsystem], vec![port])?.added;
        cores.open(&added)?;
        cores.listen(listener.into(), PortId(1));
        Ok(Self { cores, address, _target: target })
    }

    /// Microseconds for which its core was busy so far, up to its last tick.
    pub(super) fn busy_us(&self) -> u64 {
        self.cores.gauges().iter().map(|gauges| gauges.activity().busy_ns / 1000).sum()
    }

    pub(super) fn stop(self) -> Result<()> {
        ensure!(self.cores.stop(Instant::now() + PATIENCE), "a core does not end");
        Ok(())
    }
}
