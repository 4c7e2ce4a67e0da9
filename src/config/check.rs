//! The checks that turn a file as written into a [`Config`]. All findings are collected, each with its span.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::thread::sched_getaffinity;
use sha2::{Digest, Sha256};
use toml::Spanned;

use super::error::Finding;
use super::raw::{RawConfig, RawCores, RawNamespace, RawPoll, RawSize, RawSubsystem};
use super::{
    Backing, Config, DEFAULT_BUFFER_MEMORY, DEFAULT_GATHER, DEFAULT_IDLE_AFTER, DEFAULT_LINGER,
    DEFAULT_MODEL, DEFAULT_STATE_DIR, DISCOVERY_NQN, DeviceWay, Hosts, NSID_MAX, Namespace, Nqn, PollMode,
    Subsystem, WatchShare, format_size, parse_size,
};
use crate::extent::GuardMode;
use crate::fabrics::FencePolicy;
use crate::units::{BlockSize, ByteLen};

/// Buffers are carved out of hugepages of this size.
const HUGEPAGE_BYTES: u64 = 2 << 20;
/// Less buffer memory a core than this cannot hold one large transfer and its neighbours.
const BUFFER_MEMORY_MIN: u64 = 4 << 20;
const BUFFER_MEMORY_MAX: u64 = 64 << 30;
const IDLE_AFTER_US_MAX: i64 = 1_000_000;
/// More would be what hosts call slow.
const GATHER_US_MAX: i64 = 150;
/// Serial number and model number fields (NVM Express Base Specification 2.1, Identify Controller, SN and MN).
const SERIAL_BYTES_MAX: usize = 20;
const MODEL_BYTES_MAX: usize = 40;

/// What the checks need to know of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// The CPUs that may be used, ascending.
    pub allowed_cores: Vec<u32>,
}

impl HostFacts {
    /// The facts of the host and process that ask. CPUs beyond the affinity mask of the process are not allowed;
    /// where the mask cannot be read, CPU 0 alone is.
    #[must_use]
    pub fn of_this_process() -> Self {
        let allowed = sched_getaffinity(None).map_or_else(
            |_| vec![0],
            |set| (0u32..1024).filter(|&cpu| set.is_set(cpu as usize)).collect::<Vec<_>>(),
        );
        Self { allowed_cores: allowed }
    }
}

type Span = Range<usize>;

/// Collects findings, and knows the lines of names seen before.
pub(super) struct Checker<'host> {
    findings: Vec<Finding>,
    host: &'host HostFacts,
    /// Files by their path, to the NQN and namespace that have them.
    files: HashMap<PathBuf, String>,
    /// Whether there is any `[[nvme]]`.
    any_controller: bool,
}

/// Checks `raw` for `host`.
pub(super) fn check(raw: RawConfig, host: &HostFacts) -> Result<Config, Vec<Finding>> {
    let any_controller = !raw.nvme.is_empty();
    let mut checker = Checker { findings: Vec::new(), host, files: HashMap::new(), any_controller };
    let state_dir = checker.state_dir(raw.state_dir);
    let cores = checker.cores(raw.cores);
    let buffer_memory = checker.buffer_memory(raw.buffer_memory);
    let poll = checker.poll(raw.poll, raw.idle_after_us, raw.linger_us);
    let gather = checker.microseconds("gather_us", raw.gather_us, DEFAULT_GATHER, GATHER_US_MAX);
    let watch = checker.watch(raw.watch_cpu_percent);
    let listeners = checker.listeners(raw.listener, !raw.subsystem.is_empty());
    let metrics = checker.metrics(raw.metrics, &listeners);
    let nvme = checker.controllers(raw.nvme);
    let subsystems = checker.subsystems(raw.subsystem);
    if !checker.findings.is_empty() {
        return Err(checker.findings);
    }
    Ok(Config {
        state_dir,
        cores,
        buffer_memory,
        poll,
        gather,
        watch,
        strict: raw.strict,
        log: raw.log.unwrap_or_default(),
        log_format: raw.log_format.unwrap_or_default(),
        metrics,
        listeners,
        nvme,
        subsystems,
    })
}

impl Checker<'_> {
    pub(super) fn refuse(&mut self, span: Span, reason: impl Into<String>) {
        self.findings.push(Finding { span, reason: reason.into() });
    }

    fn state_dir(&mut self, dir: Option<Spanned<PathBuf>>) -> PathBuf {
        let Some(dir) = dir else { return PathBuf::from(DEFAULT_STATE_DIR) };
        if !dir.get_ref().is_absolute() {
            self.refuse(dir.span(), "state_dir must be an absolute path");
        }
        dir.into_inner()
    }

    fn cores(&mut self, cores: Option<Spanned<RawCores>>) -> Vec<u32> {
        let allowed = self.host.allowed_cores.clone();
        let Some(cores) = cores else { return allowed };
        let span = cores.span();
        match cores.into_inner() {
            RawCores::Count(count) => match usize::try_from(count) {
                Ok(count) if (1..=allowed.len()).contains(&count) => {
                    allowed.into_iter().take(count).collect()
                }
                _ => {
                    let reason =
                        format!("cores = {count}: this process may use 1 to {} cores", allowed.len());
                    self.refuse(span, reason);
                    allowed
                }
            },
            RawCores::List(list) if list.is_empty() => {
                self.refuse(span, "no core named: leave `cores` out to use every allowed one");
                allowed
            }
            RawCores::List(list) => self.core_list(list, &allowed),
        }
    }

    fn core_list(&mut self, list: Vec<Spanned<i64>>, allowed: &[u32]) -> Vec<u32> {
        let mut cores = Vec::with_capacity(list.len());
        for item in list {
            let number = *item.get_ref();
            match u32::try_from(number) {
                Ok(core) if cores.contains(&core) => {
                    self.refuse(item.span(), format!("core {core} is named twice"))
                }
                Ok(core) if allowed.contains(&core) => cores.push(core),
                _ => {
                    let names = allowed.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
                    let reason = format!("core {number} is not one that this process may use ({names})");
                    self.refuse(item.span(), reason);
                }
            }
        }
        cores.sort_unstable();
        cores
    }

    fn buffer_memory(&mut self, size: Option<Spanned<RawSize>>) -> ByteLen {
        let Some(size) = size else { return DEFAULT_BUFFER_MEMORY };
        let span = size.span();
        let Some(len) = self.size(size) else { return DEFAULT_BUFFER_MEMORY };
        if !(BUFFER_MEMORY_MIN..=BUFFER_MEMORY_MAX).contains(&len.get()) {
            self.refuse(span, "buffer_memory is from 4MiB to 64GiB a core");
        } else if !len.get().is_multiple_of(HUGEPAGE_BYTES) {
            self.refuse(span, "buffer_memory is a multiple of 2MiB, the size of a hugepage");
        }
        len
    }

    fn poll(
        &mut self,
        mode: Option<Spanned<RawPoll>>,
        idle: Option<Spanned<i64>>,
        linger: Option<Spanned<i64>>,
    ) -> PollMode {
        if mode.is_some_and(|mode| *mode.get_ref() == RawPoll::Always) {
            for (name, given) in [("idle_after_us", idle), ("linger_us", linger)] {
                if let Some(given) = given {
                    let reason = format!("{name} has no effect with poll = \"always\": remove one of them");
                    self.refuse(given.span(), reason);
                }
            }
            return PollMode::Always;
        }
        PollMode::Adaptive {
            idle_after: self.microseconds("idle_after_us", idle, DEFAULT_IDLE_AFTER, IDLE_AFTER_US_MAX),
            linger: self.microseconds("linger_us", linger, DEFAULT_LINGER, IDLE_AFTER_US_MAX),
        }
    }

    /// A time of at most `most` microseconds.
    fn microseconds(
        &mut self,
        name: &str,
        given: Option<Spanned<i64>>,
        default: Duration,
        most: i64,
    ) -> Duration {
        let Some(given) = given else { return default };
        let us = *given.get_ref();
        if !(0..=most).contains(&us) {
            self.refuse(given.span(), format!("{name} is from 0 to {most}"));
        }
        Duration::from_micros(us.unsigned_abs())
    }

    fn watch(&mut self, percent: Option<Spanned<f64>>) -> WatchShare {
        let Some(percent) = percent else { return WatchShare::default() };
        let share = WatchShare::of_percent(*percent.get_ref());
        if share.is_none() {
            self.refuse(percent.span(), "watch_cpu_percent is from 0.01 to 100: so much of one processor");
        }
        share.unwrap_or_default()
    }

    fn subsystems(&mut self, raw: Vec<Spanned<RawSubsystem>>) -> Vec<Subsystem> {
        let mut subsystems: Vec<Subsystem> = Vec::with_capacity(raw.len());
        for item in raw {
            let span = item.span();
            if let Some(subsystem) = self.subsystem(span, item.into_inner(), &subsystems) {
                subsystems.push(subsystem);
            }
        }
        subsystems
    }

    fn subsystem(&mut self, span: Span, raw: RawSubsystem, others: &[Subsystem]) -> Option<Subsystem> {
        let nqn_span = raw.nqn.span();
        let nqn = self.nqn(&raw.nqn);
        if let Some(nqn) = &nqn {
            if nqn.as_str() == DISCOVERY_NQN {
                self.refuse(nqn_span, "the discovery subsystem is always there: it is not configured");
            } else if others.iter().any(|other| other.nqn == *nqn) {
                self.refuse(nqn_span, format!("another subsystem is called {nqn} already"));
            }
        }
        let hosts = self.hosts(span, raw.allow_any_host, raw.hosts);
        let serial = self.label("serial", raw.serial, SERIAL_BYTES_MAX);
        let model = self.label("model", raw.model, MODEL_BYTES_MAX);
        let namespaces = self.namespaces(nqn.as_ref(), raw.namespace);
        let nqn = nqn?;
        let serial = serial.unwrap_or_else(|| derived_serial(&nqn));
        let model = model.unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        Some(Subsystem { nqn, serial, model, hosts: hosts?, namespaces })
    }

    fn nqn(&mut self, text: &Spanned<String>) -> Option<Nqn> {
        match Nqn::new(text.get_ref()) {
            Ok(nqn) => Some(nqn),
            Err(why) => {
                self.refuse(text.span(), why.to_string());
                None
            }
        }
    }

    fn hosts(
        &mut self,
        span: Span,
        any: bool,
        hosts: Option<Spanned<Vec<Spanned<String>>>>,
    ) -> Option<Hosts> {
        match (any, hosts) {
            (true, None) => Some(Hosts::Any),
            (true, Some(list)) if list.get_ref().is_empty() => Some(Hosts::Any),
            (true, Some(list)) => {
                self.refuse(
                    list.span(),
                    "hosts has no effect with allow_any_host = true: remove one of them",
                );
                None
            }
            (false, None) => {
                let reason =
                    "no host may connect: list them, hosts = [\"nqn…\"], or say allow_any_host = true";
                self.refuse(span, reason);
                None
            }
            (false, Some(list)) if list.get_ref().is_empty() => {
                self.refuse(list.span(), "no host may connect: name some, or say allow_any_host = true");
                None
            }
            (false, Some(list)) => {
                let mut names: Vec<Nqn> = Vec::with_capacity(list.get_ref().len());
                for text in list.into_inner() {
                    let Some(nqn) = self.nqn(&text) else { continue };
                    if names.contains(&nqn) {
                        self.refuse(text.span(), format!("host {nqn} is named twice"));
                    } else {
                        names.push(nqn);
                    }
                }
                Some(Hosts::List(names))
            }
        }
    }

    pub(super) fn label(
        &mut self,
        key: &str,
        text: Option<Spanned<String>>,
        len_max: usize,
    ) -> Option<String> {
        let text = text?;
        let value = text.get_ref();
        let printable = value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if value.trim() != value || value.is_empty() || value.len() > len_max || !printable {
            let reason = format!("{key} has 1 to {len_max} printable ASCII characters, no blank at its ends");
            self.refuse(text.span(), reason);
        }
        Some(text.into_inner())
    }

    fn namespaces(&mut self, nqn: Option<&Nqn>, raw: Vec<Spanned<RawNamespace>>) -> Vec<Namespace> {
        let mut by_nsid: BTreeMap<u32, Namespace> = BTreeMap::new();
        let mut unnumbered = Vec::new();
        let name = nqn.map_or("a subsystem", Nqn::as_str).to_owned();
        for item in raw {
            let span = item.span();
            let namespace = item.into_inner();
            let nsid = namespace.nsid.clone();
            let Some(namespace) = self.namespace(&name, span.clone(), namespace) else { continue };
            let Some(nsid) = nsid else {
                unnumbered.push((span, namespace));
                continue;
            };
            match u32::try_from(*nsid.get_ref()) {
                Ok(number) if !(1..=NSID_MAX).contains(&number) => self.refuse_nsid(&nsid),
                Ok(number) if by_nsid.contains_key(&number) => {
                    self.refuse(nsid.span(), format!("nsid {number} is used twice in {name}"));
                }
                Ok(number) => drop(by_nsid.insert(number, Namespace { nsid: number, ..namespace })),
                Err(_) => self.refuse_nsid(&nsid),
            }
        }
        for (span, namespace) in unnumbered {
            match (1..=NSID_MAX).find(|number| !by_nsid.contains_key(number)) {
                Some(free) => drop(by_nsid.insert(free, Namespace { nsid: free, ..namespace })),
                None => self.refuse(span, format!("{name} has {NSID_MAX} namespaces already")),
            }
        }
        by_nsid.into_values().collect()
    }

    fn refuse_nsid(&mut self, nsid: &Spanned<i64>) {
        self.refuse(nsid.span(), format!("nsid {} is not from 1 to {NSID_MAX}", nsid.get_ref()));
    }

    /// The namespace, its identifier still zero.
    fn namespace(&mut self, nqn: &str, span: Span, raw: RawNamespace) -> Option<Namespace> {
        let block_size = self.block_size(raw.block_size);
        let given = [raw.file.is_some(), raw.memory.is_some(), raw.null.is_some()];
        if given.iter().filter(|&&is| is).count() != 1 {
            self.refuse(span, "a namespace has exactly one of file, memory and null");
            return None;
        }
        if raw.file.is_none() {
            let device = raw.device.as_ref().map(Spanned::span);
            let prepare = raw.prepare.as_ref().map(Spanned::span);
            let mtime = raw.update_mtime.as_ref().map(Spanned::span);
            let fence = raw.on_fence.as_ref().map(Spanned::span);
            let guard = raw.guard.as_ref().map(Spanned::span);
            let readers = raw.local_readers.as_ref().map(Spanned::span);
            let spans = [device, prepare, mtime, fence, guard, readers];
            for span in spans.into_iter().flatten() {
                self.refuse(
                    span,
                    "device, prepare, update_mtime, on_fence, guard and local_readers have a meaning for a file only",
                );
            }
        }
        let backing = if let Some(file) = raw.file {
            let path = self.file(nqn, &file)?;
            let device = self.device_way(raw.device);
            let is_unmounted = matches!(device, DeviceWay::HandedOver | DeviceWay::Unmounted);
            if let (true, Some(prepare)) = (is_unmounted, &raw.prepare) {
                self.refuse(
                    prepare.span(),
                    "prepare works while the filesystem is mounted: `fastice pin --prepare`",
                );
            }
            if let (true, Some(mtime)) = (is_unmounted, &raw.update_mtime) {
                self.refuse(mtime.span(), "update_mtime takes a mounted filesystem");
            }
            if let (true, Some(guard)) = (is_unmounted, &raw.guard) {
                self.refuse(
                    guard.span(),
                    "guard works while the filesystem is mounted: `fastice pin --guard`",
                );
            }
            if let (true, Some(readers)) = (is_unmounted, &raw.local_readers) {
                self.refuse(readers.span(), "local_readers takes a mounted filesystem");
            }
            let read_only =
                raw.guard.as_ref().is_some_and(|guard| *guard.get_ref() == GuardMode::ReadOnlyMount);
            if let (true, Some(mtime)) = (read_only, &raw.update_mtime) {
                self.refuse(mtime.span(), "update_mtime takes a filesystem that can be written: see guard");
            }
            if let (true, Some(prepare)) = (read_only, &raw.prepare) {
                self.refuse(prepare.span(), "prepare takes a filesystem that can be written: prepare the file before it is mounted read-only");
            }
            let guard = raw.guard.map(Spanned::into_inner);
            let local_readers = raw.local_readers.map(Spanned::into_inner);
            let [prepare, update_mtime] =
                [raw.prepare, raw.update_mtime].map(|flag| flag.is_some_and(Spanned::into_inner));
            Backing::File { path, device, prepare, update_mtime, guard, local_readers }
        } else if let Some(size) = raw.memory {
            Backing::Memory { len: self.device_size(size, block_size)? }
        } else {
            Backing::Null { len: self.device_size(raw.null?, block_size)? }
        };
        let on_fence = self.on_fence(raw.on_fence, raw.read_only);
        Some(Namespace { nsid: 0, backing, read_only: raw.read_only, on_fence, block_size })
    }

    fn on_fence(&mut self, policy: Option<Spanned<FencePolicy>>, read_only: bool) -> FencePolicy {
        let Some(policy) = policy else { return FencePolicy::default() };
        if read_only && *policy.get_ref() == FencePolicy::WriteProtect {
            self.refuse(policy.span(), "read_only is write protected already: leave on_fence out");
        }
        policy.into_inner()
    }

    fn device_way(&mut self, device: Option<Spanned<DeviceWay>>) -> DeviceWay {
        let Some(device) = device else { return DeviceWay::default() };
        let is_ours = matches!(device.get_ref(), DeviceWay::Nvme | DeviceWay::HandedOver);
        if is_ours && !self.any_controller {
            self.refuse(
                device.span(),
                "no [[nvme]]: name the controller to drive, such as pci = \"0000:01:00.0\"",
            );
        }
        device.into_inner()
    }

    fn file(&mut self, nqn: &str, file: &Spanned<PathBuf>) -> Option<PathBuf> {
        let path = file.get_ref();
        if !path.is_absolute() {
            self.refuse(file.span(), "file must be an absolute path");
            return None;
        }
        let path = without_dots(path);
        if let Some(other) = self.files.get(&path) {
            let reason = format!("{} is a namespace of {other} already", path.display());
            self.refuse(file.span(), reason);
        }
        self.files.insert(path.clone(), nqn.to_owned());
        Some(path)
    }

    fn block_size(&mut self, size: Option<Spanned<i64>>) -> Option<BlockSize> {
        let size = size?;
        match *size.get_ref() {
            512 => Some(BlockSize::B512),
            4096 => Some(BlockSize::B4096),
            other => {
                self.refuse(size.span(), format!("block_size is 512 or 4096, not {other}"));
                None
            }
        }
    }

    fn device_size(&mut self, size: Spanned<RawSize>, block_size: Option<BlockSize>) -> Option<ByteLen> {
        let span = size.span();
        let len = self.size(size)?;
        let block_size = block_size.unwrap_or(BlockSize::B4096);
        if len.get() == 0 || block_size.blocks_in(len).is_none() {
            let reason = format!("{} is no multiple of the block size {block_size}", format_size(len.get()));
            self.refuse(span, reason);
            return None;
        }
        Some(len)
    }

    fn size(&mut self, size: Spanned<RawSize>) -> Option<ByteLen> {
        let span = size.span();
        match size.into_inner() {
            RawSize::Bytes(bytes) => match u64::try_from(bytes) {
                Ok(bytes) => Some(ByteLen(bytes)),
                Err(_) => {
                    self.refuse(span, "a size is not negative");
                    None
                }
            },
            RawSize::Text(text) => match parse_size(&text) {
                Ok(len) => Some(len),
                Err(why) => {
                    self.refuse(span, why.to_string());
                    None
                }
            },
        }
    }
}

/// The path without `.` components and doubled slashes. `..` stays: it may cross a symbolic link.
pub(super) fn without_dots(path: &Path) -> PathBuf {
    path.components().filter(|part| !matches!(part, Component::CurDir)).collect()
}

/// A serial number that stays the same as long as the NQN does: `FI` and 18 hexadecimal digits.
fn derived_serial(nqn: &Nqn) -> String {
    let digest = Sha256::digest(nqn.as_str().as_bytes());
    let mut serial = String::from("FI");
    for byte in digest.iter().take(9) {
        serial.push_str(&format!("{byte:02X}"));
    }
    serial
}

pub(super) fn clip(text: &str) -> String {
    text.chars().take(60).collect()
}
