//! The checks of `[[nvme]]`: which controllers may be taken, and what their namespaces must say of themselves.

use std::path::{Component, Path, PathBuf};

use toml::Spanned;

use super::NvmeChoice;
use super::check::{Checker, clip, without_dots};
use super::raw::RawNvme;
use crate::block::nvme::NvmeWay;
use crate::extent::{NamespaceIdentity, parse_identifier};

/// NSIDs end before the broadcast value and the one that is reserved (NVM Express Base Specification 2.1, section
/// 3.2.1.2).
const NVME_NSID_MAX: u32 = 0xFFFF_FFFD;
/// SN of Identify Controller.
const SERIAL_BYTES_MAX: usize = 20;

impl Checker<'_> {
    pub(super) fn controllers(&mut self, raw: Vec<Spanned<RawNvme>>) -> Vec<NvmeChoice> {
        let mut choices: Vec<NvmeChoice> = Vec::with_capacity(raw.len());
        for item in raw {
            let span = item.span();
            let raw = item.into_inner();
            let given = [raw.pci.is_some(), raw.vfio_user.is_some(), raw.model.is_some()];
            if given.iter().filter(|&&is| is).count() > 1 {
                self.refuse(span, "a controller has one of pci, vfio_user and model, not several");
                continue;
            }
            let is_placed = given.contains(&true);
            let identity = NamespaceIdentity {
                nguid: self.identifier("nguid", raw.nguid),
                eui64: self.identifier("eui64", raw.eui64),
                uuid: None,
                serial: self.label("serial", raw.serial, SERIAL_BYTES_MAX),
                nsid: self.device_nsid(raw.nsid),
            };
            let unsafe_no_iommu = raw.unsafe_no_iommu.as_ref().is_some_and(|no_iommu| *no_iommu.get_ref());
            if let (Some(no_iommu), None) = (&raw.unsafe_no_iommu, &raw.pci) {
                self.refuse(no_iommu.span(), "unsafe_no_iommu has a meaning for pci only");
            }
            let way = match (raw.pci, raw.vfio_user, raw.model) {
                (Some(pci), _, _) => self.pci(&pci, unsafe_no_iommu),
                (_, Some(path), _) => self.place("vfio_user", &path).map(NvmeWay::VfioUser),
                (_, _, Some(path)) => self.place("model", &path).map(NvmeWay::Model),
                _ => None,
            };
            match &way {
                // Its place was refused.
                None if is_placed => continue,
                None if identity.nguid.is_none() && identity.eui64.is_none() && identity.serial.is_none() => {
                    let wanted = "a controller has a place (pci, vfio_user or model) or an identity (nguid, eui64 or serial)";
                    self.refuse(span, wanted);
                    continue;
                }
                None => {}
                Some(way) => {
                    let is_it =
                        |other: &NvmeChoice| other.way.as_ref().is_some_and(|it| it.is_same_place(way));
                    if choices.iter().any(is_it) {
                        self.refuse(span, format!("{way} is named twice"));
                        continue;
                    }
                }
            }
            choices.push(NvmeChoice { way, identity });
        }
        choices
    }

    fn pci(&mut self, text: &Spanned<String>, unsafe_no_iommu: bool) -> Option<NvmeWay> {
        match text.get_ref().parse() {
            Ok(address) if unsafe_no_iommu => Some(NvmeWay::PciWithoutIommu(address)),
            Ok(address) => Some(NvmeWay::Pci(address)),
            Err(_) => {
                let reason = format!("`{}` is no PCI address: write 0000:01:00.0", clip(text.get_ref()));
                self.refuse(text.span(), reason);
                None
            }
        }
    }

    fn place(&mut self, key: &str, path: &Spanned<PathBuf>) -> Option<PathBuf> {
        let is_odd = |path: &Path| path.components().any(|part| matches!(part, Component::ParentDir));
        if !path.get_ref().is_absolute() || is_odd(path.get_ref()) {
            self.refuse(path.span(), format!("{key} must be an absolute path without `..`"));
            return None;
        }
        Some(without_dots(path.get_ref()))
    }

    fn identifier<const N: usize>(&mut self, key: &str, text: Option<Spanned<String>>) -> Option<[u8; N]> {
        let text = text?;
        let identifier = parse_identifier(text.get_ref());
        if identifier.is_none() {
            let digits = N * 2;
            let reason = format!(
                "{key} has {digits} hexadecimal digits, not all zero, as /sys/block/nvme*/ shows them"
            );
            self.refuse(text.span(), reason);
        }
        identifier
    }

    fn device_nsid(&mut self, nsid: Option<Spanned<i64>>) -> Option<u32> {
        let nsid = nsid?;
        let number = u32::try_from(*nsid.get_ref()).ok().filter(|nsid| (1..=NVME_NSID_MAX).contains(nsid));
        if number.is_none() {
            self.refuse(nsid.span(), format!("nsid {} is not that of a namespace", nsid.get_ref()));
        }
        number
    }
}
