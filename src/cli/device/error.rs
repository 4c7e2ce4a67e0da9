//! Why a controller cannot be taken or given back, in words for whoever must mend it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use async_nvme::vfio::{GroupMember, PciAddress, SysfsError};

use super::usage::{Process, Use};
use crate::cli::exit::{Exit, Failure};

/// Why a controller cannot be taken now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Obstacle {
    /// A namespace is used, and no other controller would still reach it.
    LastPath {
        /// The namespace's block device.
        namespace: String,
        /// The use.
        used: Use,
    },
    /// Its own node is open, or it is exported as a whole: no other path helps.
    Controller(Use),
    /// The kernel says that a device is in use, and nothing shows by whom.
    Claimed {
        /// The block device.
        device: String,
    },
    /// A device is busy or absent, so the kernel could not be asked whether it is in use.
    Unclaimed {
        /// The node.
        node: PathBuf,
        /// Why.
        why: String,
    },
    /// Others in its IOMMU group have drivers, so the kernel would give the group to nobody.
    Group {
        /// The group.
        number: u32,
        /// Who.
        mates: Vec<GroupMember>,
    },
    /// No IOMMU keeps it from memory that is not ours.
    NoIommu {
        /// Whether VFIO would hand it out all the same.
        mode_enabled: bool,
    },
    /// Its virtual functions have drivers, and would lose what they stand on.
    VirtualFunctions(Vec<GroupMember>),
    /// A driver has it of whose users nothing is known here.
    ForeignDriver {
        /// The driver.
        driver: String,
    },
}

fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn members(members: &[GroupMember]) -> String {
    list(
        members.iter().map(|member| {
            format!("{} (driver {})", member.address, member.driver.as_deref().unwrap_or("none"))
        }),
    )
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LastPath { namespace, used } => {
                write!(f, "{used}, and no other live path leads to {namespace}")
            }
            Self::Controller(used) => write!(f, "{used}"),
            Self::Claimed { device } => {
                write!(
                    f,
                    "{device} is in use in the kernel, by something that /proc does not show (a ZFS pool, say)"
                )
            }
            Self::Unclaimed { node, why } => {
                write!(
                    f,
                    "the kernel cannot be asked whether {} is in use: it cannot be opened ({why})",
                    node.display()
                )
            }
            Self::Group { number, mates } => {
                write!(f, "IOMMU group {number} is not viable: the kernel's drivers have {}", members(mates))
            }
            Self::NoIommu { mode_enabled: false } => {
                f.write_str("it is in no IOMMU group: the IOMMU is off, or there is none")
            }
            Self::NoIommu { mode_enabled: true } => {
                f.write_str("it is in no IOMMU group: in VFIO's no-IOMMU mode it could write to all memory")
            }
            Self::VirtualFunctions(functions) => {
                write!(f, "its virtual functions are in use: {}", members(functions))
            }
            Self::ForeignDriver { driver } => {
                write!(f, "the driver {driver} has it, and who uses it there is not known")
            }
        }
    }
}

impl Obstacle {
    /// A stable word for scripts.
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::LastPath { .. } => "last-path",
            Self::Controller(_) => "controller-open",
            Self::Claimed { .. } => "claimed",
            Self::Unclaimed { .. } => "not-asked",
            Self::Group { .. } => "group-not-viable",
            Self::NoIommu { .. } => "no-iommu",
            Self::VirtualFunctions(_) => "virtual-functions",
            Self::ForeignDriver { .. } => "foreign-driver",
        }
    }

    /// What removes it.
    pub(super) fn remedy(&self, address: PciAddress) -> String {
        match self {
            Self::LastPath { used, .. } => {
                format!("{}; or reach the namespace by a second controller", used.remedy())
            }
            Self::Controller(used) => used.remedy(),
            Self::Claimed { device } => {
                format!("find who uses {device}, and end that: zpool status, mount, dmsetup ls")
            }
            Self::Unclaimed { node, .. } => {
                format!("make {} work first; see the kernel log", node.display())
            }
            Self::Group { mates, .. } => {
                let with = list(mates.iter().map(|mate| mate.address));
                format!(
                    "NVMe controllers among them can be taken together: fastice device bind {address} {with}; \
                     others must be unbound from their drivers, or the card moved to another slot"
                )
            }
            Self::NoIommu { mode_enabled: false } => {
                "turn the IOMMU on; `fastice doctor` says how on this host".to_owned()
            }
            Self::NoIommu { mode_enabled: true } => {
                "turn the IOMMU on (see `fastice doctor`), or accept the risk with --no-iommu".to_owned()
            }
            Self::VirtualFunctions(_) => {
                format!("echo 0 > /sys/bus/pci/devices/{address}/sriov_numvfs, when nothing needs them")
            }
            Self::ForeignDriver { .. } => {
                format!(
                    "end who uses it, then: echo {address} > /sys/bus/pci/devices/{address}/driver/unbind"
                )
            }
        }
    }
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum DeviceError {
    /// The system refused something about a file.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process takes controllers, or gives them back, and takes its time.
    #[error("another `fastice device` is at work: it holds {}", path.display())]
    Busy {
        /// Its lock.
        path: PathBuf,
    },
    /// A record is damaged.
    #[error("{} is no record of a taken controller: {why}", path.display())]
    Record {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The PCI function cannot be looked at.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// It is something else.
    #[error("{address} is no NVMe controller (class {class:06x})")]
    NotNvme {
        /// Its place.
        address: PciAddress,
        /// What it is.
        class: u32,
    },
    /// It must not be taken now.
    #[error("{address} cannot be taken: {}", list(obstacles))]
    Refused {
        /// Its place.
        address: PciAddress,
        /// Why.
        obstacles: Vec<Obstacle>,
    },
    /// A module cannot be loaded.
    #[error("the kernel module {module} cannot be loaded: {why}")]
    Module {
        /// Which one.
        module: String,
        /// Why.
        why: String,
    },
    /// The kernel refused a step.
    #[error("{address}: the kernel refused {value:?} in {}{undone}", path.display())]
    Step {
        /// The controller.
        address: PciAddress,
        /// The file of sysfs.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// How the controller was left.
        undone: Undone,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel took every step, but another driver has it, or none.
    #[error("{address}: the driver {wanted} did not take it ({})", found.as_deref().unwrap_or("no driver has it"))]
    NotBound {
        /// The controller.
        address: PciAddress,
        /// Who should have it.
        wanted: String,
        /// Who has it.
        found: Option<String>,
    },
    /// It is with VFIO, and fastice has not put it there.
    #[error("{address} was not given to VFIO by fastice in this boot: nothing says what it was before")]
    NotOurs {
        /// The controller.
        address: PciAddress,
    },
    /// The record is of another device.
    #[error("another device than the recorded one is at {address} now")]
    Replaced {
        /// The place.
        address: PciAddress,
    },
    /// A process drives it.
    #[error("{address} is in use by {}", list(by))]
    InUse {
        /// The controller.
        address: PciAddress,
        /// Who.
        by: Vec<Process>,
    },
}

/// How a controller was left when a step failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Undone {
    /// As it was before.
    Yes,
    /// Half way; the record is kept.
    No,
    /// There was nothing to undo.
    Nothing,
}

impl fmt::Display for Undone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Yes => "; it is again as it was before",
            Self::No => "; what it was before is recorded, but could not be restored",
            Self::Nothing => "",
        })
    }
}

impl DeviceError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    const fn exit(&self) -> Exit {
        match self {
            Self::Sysfs(SysfsError::NoSuch { .. })
            | Self::NotNvme { .. }
            | Self::Refused { .. }
            | Self::NotOurs { .. }
            | Self::Replaced { .. }
            | Self::Busy { .. }
            | Self::InUse { .. } => Exit::Refused,
            _ => Exit::Failed,
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Io { .. } => "run as root".to_owned(),
            Self::Busy { .. } => "wait for it; if the kernel keeps it, see the kernel log".to_owned(),
            Self::Record { path, .. } => {
                format!(
                    "give the controller back with `fastice device unbind --driver nvme PCI`, which replaces {}",
                    path.display()
                )
            }
            Self::Sysfs(_) | Self::NotNvme { .. } => {
                "`fastice device list` shows the controllers of this host".to_owned()
            }
            Self::Refused { address, obstacles } => list(obstacles.iter().map(|o| o.remedy(*address))),
            Self::Module { module, .. } => {
                format!("install the modules of the running kernel, then: modprobe {module}")
            }
            Self::Step { address, undone: Undone::No, .. } => {
                format!("see the kernel log, then: fastice device unbind {address}")
            }
            Self::Step { .. } => "run as root; the kernel log may say more".to_owned(),
            Self::NotBound { address, .. } => {
                format!("see the kernel log; `fastice device unbind {address}` gives it back")
            }
            Self::NotOurs { address } => {
                format!("name the driver that shall have it: fastice device unbind --driver nvme {address}")
            }
            Self::Replaced { address } => format!(
                "the record is of no use any more; to give this one to a driver: \
                 fastice device unbind --driver nvme {address}"
            ),
            Self::InUse { .. } => "end that process in order first".to_owned(),
        }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        let forbidden = match &error {
            DeviceError::Io { source, .. }
            | DeviceError::Step { source, .. }
            | DeviceError::Sysfs(SysfsError::Read { source, .. }) => {
                source.kind() == io::ErrorKind::PermissionDenied
            }
            _ => false,
        };
        let exit = if forbidden { Exit::Permission } else { error.exit() };
        let remedy = error.remedy();
        Self::new(exit, error).with_remedy(remedy)
    }
}
