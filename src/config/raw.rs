//! The file as it is written: every value with the span of bytes it stands at. Nothing is checked here but names
//! and types.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use toml::Spanned;

use super::{DeviceWay, LogFormat, LogLevel};
use crate::extent::{GuardMode, LocalReaders};
use crate::fabrics::FencePolicy;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    pub(super) state_dir: Option<Spanned<PathBuf>>,
    pub(super) cores: Option<Spanned<RawCores>>,
    pub(super) buffer_memory: Option<Spanned<RawSize>>,
    pub(super) poll: Option<Spanned<RawPoll>>,
    pub(super) idle_after_us: Option<Spanned<i64>>,
    pub(super) linger_us: Option<Spanned<i64>>,
    pub(super) gather_us: Option<Spanned<i64>>,
    pub(super) watch_cpu_percent: Option<Spanned<f64>>,
    #[serde(default)]
    pub(super) strict: bool,
    pub(super) log: Option<LogLevel>,
    pub(super) log_format: Option<LogFormat>,
    pub(super) metrics: Option<RawMetrics>,
    #[serde(default)]
    pub(super) listener: Vec<Spanned<RawListener>>,
    #[serde(default)]
    pub(super) nvme: Vec<Spanned<RawNvme>>,
    #[serde(default)]
    pub(super) subsystem: Vec<Spanned<RawSubsystem>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawPoll {
    Adaptive,
    Always,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawMetrics {
    pub(super) listen: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawListener {
    pub(super) address: Spanned<String>,
    #[serde(default)]
    pub(super) discovery_only: bool,
    pub(super) advertise: Option<Spanned<String>>,
    pub(super) congestion_control: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNvme {
    pub(super) pci: Option<Spanned<String>>,
    pub(super) unsafe_no_iommu: Option<Spanned<bool>>,
    pub(super) vfio_user: Option<Spanned<PathBuf>>,
    pub(super) model: Option<Spanned<PathBuf>>,
    pub(super) serial: Option<Spanned<String>>,
    pub(super) nsid: Option<Spanned<i64>>,
    pub(super) nguid: Option<Spanned<String>>,
    pub(super) eui64: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSubsystem {
    pub(super) nqn: Spanned<String>,
    pub(super) serial: Option<Spanned<String>>,
    pub(super) model: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) allow_any_host: bool,
    pub(super) hosts: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(default)]
    pub(super) namespace: Vec<Spanned<RawNamespace>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNamespace {
    pub(super) nsid: Option<Spanned<i64>>,
    pub(super) file: Option<Spanned<PathBuf>>,
    pub(super) memory: Option<Spanned<RawSize>>,
    pub(super) null: Option<Spanned<RawSize>>,
    pub(super) device: Option<Spanned<DeviceWay>>,
    #[serde(default)]
    pub(super) read_only: bool,
    pub(super) on_fence: Option<Spanned<FencePolicy>>,
    pub(super) block_size: Option<Spanned<i64>>,
    pub(super) prepare: Option<Spanned<bool>>,
    pub(super) update_mtime: Option<Spanned<bool>>,
    pub(super) guard: Option<Spanned<GuardMode>>,
    pub(super) local_readers: Option<Spanned<LocalReaders>>,
}

/// `cores = 4` or `cores = [0, 2]`.
pub(super) enum RawCores {
    Count(i64),
    List(Vec<Spanned<i64>>),
}

impl<'de> Deserialize<'de> for RawCores {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Cores;
        impl<'de> Visitor<'de> for Cores {
            type Value = RawCores;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of cores, or a list of core numbers such as [0, 1]")
            }

            fn visit_i64<E: Error>(self, count: i64) -> Result<RawCores, E> {
                Ok(RawCores::Count(count))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<RawCores, A::Error> {
                let mut list = Vec::new();
                while let Some(core) = items.next_element()? {
                    list.push(core);
                }
                Ok(RawCores::List(list))
            }
        }
        deserializer.deserialize_any(Cores)
    }
}

/// `"64MiB"`, or a bare number of bytes.
pub(super) enum RawSize {
    Bytes(i64),
    Text(String),
}

impl<'de> Deserialize<'de> for RawSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl Visitor<'_> for Size {
            type Value = RawSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"64MiB\", or a number of bytes")
            }

            fn visit_i64<E: Error>(self, bytes: i64) -> Result<RawSize, E> {
                Ok(RawSize::Bytes(bytes))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<RawSize, E> {
                Ok(RawSize::Text(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Size)
    }
}
