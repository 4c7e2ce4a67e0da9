//! The ways to a controller.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use async_nvme::access::AccessError;
use async_nvme::vfio::{OpenError, PciAddress, Sysfs, SysfsError, UnsafeNoIommuVfio, Vfio, VfioOptions};
use async_nvme::{Access, VfioUserAccess, VfioUserOptions};
use hugepage_alloc::physical::UnsafeWithoutIommu;
use nvme_model::{ControllerOptions, Model, NamespaceOptions, Subsystem};

use super::ProbeArgs;
use crate::cli::exit::{Exit, Failure};

/// A controller that can be driven.
#[derive(Debug)]
pub(super) struct Reached {
    /// By which way: a word for scripts.
    pub(super) way: &'static str,
    /// What it was reached by.
    pub(super) name: String,
    pub(super) access: Arc<dyn Access>,
    /// A controller in this process: it works only when it is stepped.
    model: Option<Arc<Model>>,
}

impl Reached {
    /// Called while the driver waits.
    pub(super) fn idle(&self) {
        match &self.model {
            Some(model) => {
                model.step();
            }
            None => std::hint::spin_loop(),
        }
    }
}

/// Reaches what the arguments name.
pub(super) fn reach(args: &ProbeArgs) -> Result<Reached, Failure> {
    match (&args.address, &args.vfio_user, &args.model) {
        (Some(address), ..) => by_vfio(*address, args.no_iommu),
        (None, Some(socket), _) => by_vfio_user(socket),
        (None, None, Some(path)) => by_model(path),
        (None, None, None) => Err(Failure::new(Exit::Usage, anyhow::anyhow!("name a controller"))),
    }
}

fn by_vfio(address: PciAddress, no_iommu: bool) -> Result<Reached, Failure> {
    let name = address.to_string();
    let (way, access): (_, Arc<dyn Access>) = if no_iommu {
        let sure = UnsafeWithoutIommu::accept_that_the_device_can_write_anywhere();
        let opened = UnsafeNoIommuVfio::open(address, &Sysfs::default(), sure);
        ("vfio-no-iommu", Arc::new(opened.map_err(|error| refused(address, error))?))
    } else {
        let opened = Vfio::open(address, &VfioOptions::default());
        ("vfio", Arc::new(opened.map_err(|error| refused(address, error))?))
    };
    Ok(Reached { way, name, access, model: None })
}

/// An error of VFIO, with the command that mends it.
fn refused(address: PciAddress, error: OpenError) -> Failure {
    let (exit, remedy) = match &error {
        OpenError::NotBound { .. } => (Exit::Refused, format!("fastice device bind {address}")),
        OpenError::Sysfs { source: SysfsError::NoSuch { .. }, .. } | OpenError::NotNvme { .. } => {
            (Exit::Refused, "`fastice device list` shows the controllers of this host".to_owned())
        }
        OpenError::Permission { .. } => {
            (Exit::Permission, "run as root, or see vfio-access in `fastice doctor`".to_owned())
        }
        OpenError::Busy { .. } => {
            (Exit::Refused, "`fastice device list` shows who has it; end that process in order".to_owned())
        }
        OpenError::NoIommu { .. } | OpenError::IommuPresent { .. } | OpenError::GroupNotViable { .. } => {
            (Exit::Refused, "`fastice doctor` prints the commands that mend it".to_owned())
        }
        _ => (Exit::Failed, "`fastice doctor` and the kernel log may say more".to_owned()),
    };
    Failure::new(exit, error).with_remedy(remedy)
}

/// The controller of a server that listens at `socket`.
fn by_vfio_user(socket: &Path) -> Result<Reached, Failure> {
    let refused = |error: AccessError| {
        let exit = match &error {
            AccessError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Exit::Permission
            }
            _ => Exit::Unreachable,
        };
        let remedy = "start its server, and have it listen there; it serves one client at a time";
        Failure::new(exit, error).with_remedy(remedy)
    };
    let access = VfioUserAccess::connect(socket, &VfioUserOptions::default()).map_err(refused)?;
    let name = socket.display().to_string();
    Ok(Reached { way: "vfio-user", name, access: Arc::new(access), model: None })
}

/// The model over an image or block device, which is opened for reading only.
fn by_model(path: &Path) -> Result<Reached, Failure> {
    let cannot = |error: std::io::Error| {
        let exit = match error.kind() {
            std::io::ErrorKind::PermissionDenied => Exit::Permission,
            _ => Exit::Failed,
        };
        let error = anyhow::Error::new(error).context(format!("cannot open {}", path.display()));
        Failure::new(exit, error).with_remedy("name an image file or a block device that can be read")
    };
    let file = File::open(path).map_err(cannot)?;
    if file.metadata().map_err(cannot)?.is_dir() {
        return Err(cannot(std::io::ErrorKind::IsADirectory.into()));
    }
    let in_blocks = |shift: u8| {
        let file = file.try_clone()?;
        NamespaceOptions::file(1, shift, file)
    };
    let small = in_blocks(9).map_err(cannot)?;
    // Blocks of 4096 bytes where they lose nothing.
    let options = if small.blocks.is_multiple_of(8) { in_blocks(12).map_err(cannot)? } else { small };
    let subsystem = Subsystem::new("MODEL");
    subsystem.add_namespace(NamespaceOptions { read_only: true, ..options }).map_err(|error| {
        let remedy = "name an image or a block device of at least 512 bytes";
        Failure::new(Exit::Refused, error).with_remedy(remedy)
    })?;
    let name = path.display().to_string();
    let model =
        subsystem.controller(ControllerOptions { name: name.clone(), ..ControllerOptions::default() });
    Ok(Reached { way: "model", name, access: model.clone(), model: Some(model) })
}
