//! Why a controller could not be opened, or a region not mapped, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use super::sysfs::{GroupMember, PciAddress, SysfsError};

/// Why a PCI function could not be opened through VFIO. Whatever was done before is undone.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// sysfs gave no answer.
    #[error("{address} cannot be looked at")]
    Sysfs {
        /// The function.
        address: PciAddress,
        /// The cause.
        #[source]
        source: SysfsError,
    },
    /// It is no NVMe I/O controller.
    #[error("{address} is no NVMe controller: its class is {class:#08x}")]
    NotNvme {
        /// The function.
        address: PciAddress,
        /// Its class code.
        class: u32,
    },
    /// Another driver has it, or none.
    #[error(
        "{address} is not given to user space (its driver: {}): bind it to vfio-pci; what is mounted stays so where \
         another controller leads to it, else unmount it first",
        driver.as_deref().unwrap_or("none")
    )]
    NotBound {
        /// The function.
        address: PciAddress,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// No IOMMU stands before it.
    #[error(
        "no IOMMU stands before {address}: switch VT-d, AMD-Vi or SMMU on in the firmware, and boot with \
         intel_iommu=on on Intel; without one only the unsafe no-IOMMU mode remains"
    )]
    NoIommu {
        /// The function.
        address: PciAddress,
    },
    /// The no-IOMMU mode was asked for, and there is an IOMMU.
    #[error("an IOMMU stands before {address}: open it the safe way")]
    IommuPresent {
        /// The function.
        address: PciAddress,
    },
    /// VFIO's no-IOMMU mode is off, or not in this kernel.
    #[error(
        "the kernel does not offer {address} without an IOMMU: it must be built with CONFIG_VFIO_NOIOMMU, and \
         /sys/module/vfio/parameters/enable_unsafe_noiommu_mode be Y before the function is bound to vfio-pci"
    )]
    NoIommuModeOff {
        /// The function.
        address: PciAddress,
    },
    /// Other members of the group belong to the host.
    #[error(
        "IOMMU group {group} is not viable: {} must be bound to vfio-pci too, or to no driver",
        list(members)
    )]
    GroupNotViable {
        /// The group.
        group: u32,
        /// Who is in the way; empty when that cannot be seen.
        members: Vec<GroupMember>,
    },
    /// A device file may not be opened.
    #[error(
        "no permission to open {}: run as root, or give the file to this user with chown{}",
        path.display(), rawio(path)
    )]
    Permission {
        /// Which one.
        path: PathBuf,
    },
    /// A device file is not there.
    #[error("{} is not there: load the module ({module}) and look for its messages in the kernel log", path.display())]
    Absent {
        /// Which one.
        path: PathBuf,
        /// The kernel module that makes it.
        module: &'static str,
    },
    /// Somebody has it open.
    #[error("{what} is in use: only one process, and one opening in it, can have a group or a device")]
    Busy {
        /// Which group or device.
        what: String,
    },
    /// The IOMMU cannot keep interrupts apart.
    #[error(
        "the kernel refuses the IOMMU of group {group}: without interrupt remapping a device can forge \
         interrupts; switch it on in the firmware, or take that risk with the module option \
         vfio_iommu_type1.allow_unsafe_interrupts=1"
    )]
    NoInterruptRemapping {
        /// The group.
        group: u32,
    },
    /// The kernel, or the device, lacks something.
    #[error("{address} cannot be driven through VFIO: {what}")]
    Unsupported {
        /// The function.
        address: PciAddress,
        /// What is missing.
        what: String,
    },
    /// Its registers read as all ones.
    #[error("{address} is gone: its registers read as all ones")]
    Gone {
        /// The function.
        address: PciAddress,
    },
    /// A controller that was left running, without an IOMMU, and that cannot be reset.
    #[error(
        "{address} is still enabled, may be writing to memory of its last user, and cannot be reset: bind it to \
         the nvme driver and unbind it again, or restart the host"
    )]
    StillEnabled {
        /// The function.
        address: PciAddress,
    },
    /// Any other call that failed.
    #[error("{call} for {address} failed")]
    Kernel {
        /// The call.
        call: &'static str,
        /// The function.
        address: PciAddress,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn list(members: &[GroupMember]) -> String {
    if members.is_empty() {
        return "all of its members".to_owned();
    }
    let one =
        |one: &GroupMember| format!("{} ({})", one.address, one.driver.as_deref().unwrap_or("no driver"));
    members.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn rawio(path: &Path) -> &'static str {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with("noiommu-") { " and run with CAP_SYS_RAWIO" } else { "" }
}

/// A failed call with its explanation, as the source of an [`crate::AccessError`].
#[derive(Debug, thiserror::Error)]
#[error("{remedy}")]
struct Explained {
    remedy: String,
    #[source]
    source: io::Error,
}

fn explained(remedy: String, source: io::Error) -> io::Error {
    io::Error::new(source.kind(), Explained { remedy, source })
}

/// Why a mapping was refused: `len` bytes more, with `mapped` bytes mapped before, under a limit on locked memory
/// (`None`: no limit).
pub(super) fn explain_map(error: io::Error, len: u64, mapped: u64, memlock: Option<u64>) -> io::Error {
    let kib = |bytes: u64| bytes >> 10;
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            let remedy = match memlock {
                Some(limit) => format!(
                    "{} KiB more for the device, with {} KiB mapped, exceed the limit on locked memory of {} KiB: \
                     raise it (ulimit -l, LimitMEMLOCK= in the unit) or run with CAP_IPC_LOCK",
                    kib(len),
                    kib(mapped),
                    kib(limit)
                ),
                None => format!("the kernel is short of memory for mapping {} KiB", kib(len)),
            };
            explained(remedy, error)
        }
        Some(libc::ENOSPC) => {
            let remedy = "the kernel's limit of mappings is reached: raise dma_entry_limit in \
                          /sys/module/vfio_iommu_type1/parameters, or use fewer and larger pools";
            explained(remedy.to_owned(), error)
        }
        Some(libc::EFAULT) => explained("the pages of the region cannot be pinned".to_owned(), error),
        _ => error,
    }
}

/// The soft limit on locked memory in bytes.
pub(super) fn memlock_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn a_limit_on_locked_memory_is_named_with_its_remedy() {
        let errno = || io::Error::from_raw_os_error(libc::ENOMEM);
        let error = explain_map(errno(), 4 << 20, 6 << 20, Some(8 << 20));
        let text = error.to_string();
        assert!(text.contains("4096 KiB more") && text.contains("6144 KiB mapped"), "{text}");
        assert!(text.contains("of 8192 KiB") && text.contains("LimitMEMLOCK="), "{text}");
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
        assert!(error.source().is_some(), "the errno is kept");
        assert!(explain_map(errno(), 1 << 20, 0, None).to_string().contains("short of memory"));
    }

    #[test]
    fn a_limit_of_mappings_is_named_and_other_errors_stay() {
        let error = explain_map(io::Error::from_raw_os_error(libc::ENOSPC), 1, 0, None);
        assert!(error.to_string().contains("dma_entry_limit"));
        let error = explain_map(io::Error::from_raw_os_error(libc::EINVAL), 1, 0, None);
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn members_in_the_way_are_listed() {
        let member = GroupMember { address: "03:00.1".parse().unwrap(), driver: Some("e1000e".to_owned()) };
        let error = OpenError::GroupNotViable { group: 4, members: vec![member] };
        assert!(error.to_string().contains("0000:03:00.1 (e1000e) must be bound"), "{error}");
    }
}
