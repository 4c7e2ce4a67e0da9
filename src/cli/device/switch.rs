//! `fastice device bind` and `unbind`: their arguments, and what they print.

use std::collections::BTreeSet;

use async_nvme::vfio::PciAddress;
use clap::Args;

use super::error::DeviceError;
use super::give::{Given, Return};
use super::handover::Handover;
use super::host::Host;
use super::inventory::Wish;
use super::kernel::Running;
use super::record::{Records, is_driver_name};
use super::take::Taken;
use crate::cli::StateDirArg;
use crate::cli::exit::{Failure, Outcome};
use crate::cli::many::Results;
use crate::cli::out::{JsonFlag, Out};

/// Take NVMe controllers from the kernel and give them to VFIO, for fastice's own driver
///
/// Refused when something that is mounted or otherwise used would lose its last path. What each controller was before
/// is recorded first; `device unbind` goes back to it, after a crash too. A reboot gives everything back by itself.
#[derive(Clone, Debug, Args)]
pub struct BindArgs {
    /// PCI addresses, as `device list` shows them
    #[arg(required = true, value_name = "PCI")]
    pub addresses: Vec<PciAddress>,
    /// Check everything and say what would be done, but change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Unsafe: accept VFIO's no-IOMMU mode, in which a controller can reach all memory
    #[arg(long)]
    pub no_iommu: bool,
    #[command(flatten)]
    pub state: StateDirArg,
    #[command(flatten)]
    pub json: JsonFlag,
}

/// Give NVMe controllers back to the driver that had them
///
/// Does nothing to a controller that was not taken. Waits until the namespaces that were there before are back.
#[derive(Clone, Debug, Args)]
pub struct UnbindArgs {
    /// PCI addresses
    #[arg(required = true, value_name = "PCI")]
    pub addresses: Vec<PciAddress>,
    /// Give them to this driver, whatever is recorded
    #[arg(long, value_name = "NAME", value_parser = driver_name)]
    pub driver: Option<String>,
    #[command(flatten)]
    pub state: StateDirArg,
    #[command(flatten)]
    pub json: JsonFlag,
}

fn driver_name(text: &str) -> Result<String, String> {
    if is_driver_name(text) { Ok(text.to_owned()) } else { Err("it is no name of a driver".to_owned()) }
}

/// Takes the controllers, all or, when one of them cannot be taken, none.
///
/// # Errors
/// When the records cannot be used; what is wrong with single controllers is told, and decides the exit status.
pub(super) fn bind(args: &BindArgs) -> Outcome {
    let json = args.json.json;
    let (host, records) = (Host::system(), Records::at(&args.state.state_dir));
    let handover = Handover { host: &host, kernel: &Running, records: &records };
    let wish = Wish { addresses: args.addresses.iter().copied().collect(), no_iommu: args.no_iommu };
    let results = take_all(&handover, &wish, args.dry_run, json)?;
    let mut out = Out::stdout();
    if json {
        let (dry_run, errors) = (args.dry_run, results.errors("address"));
        out.json(&serde_json::json!({ "bound": results.done, "dry_run": dry_run, "errors": errors }))?;
    } else {
        for line in results.done.iter().flat_map(|taken| taken_text(taken, args.dry_run)) {
            out.line(line)?;
        }
    }
    out.flush()?;
    Ok(results.exit())
}

fn take_all(
    handover: &Handover<'_>,
    wish: &Wish,
    dry_run: bool,
    json: bool,
) -> Result<Results<Taken>, DeviceError> {
    let mut results = Results::default();
    // The lock makes the state directory: not for an address where nothing is.
    let found = handover.find(wish);
    let lock = if dry_run || found.is_err() { None } else { Some(handover.records.lock()?) };
    let cleared = match found.and_then(|()| handover.clear(wish)) {
        Ok(cleared) => cleared,
        Err(errors) => {
            for error in errors {
                results.add(address_of(&error).unwrap_or_default(), json, Err(error.into()));
            }
            return Ok(results);
        }
    };
    for &address in &wish.addresses {
        let taken = match &lock {
            Some(lock) => handover.take(lock, &cleared, address),
            None => handover.plan(&cleared, address),
        };
        results.add(address, json, taken.map_err(Failure::from));
    }
    Ok(results)
}

/// The controller that an error is about.
fn address_of(error: &DeviceError) -> Option<String> {
    let address = match error {
        DeviceError::NotNvme { address, .. }
        | DeviceError::Refused { address, .. }
        | DeviceError::Sysfs(async_nvme::vfio::SysfsError::NoSuch { address }) => address,
        _ => return None,
    };
    Some(address.to_string())
}

fn taken_text(taken: &Taken, dry_run: bool) -> Vec<String> {
    let address = &taken.address;
    let before = taken.previous_driver.as_deref().unwrap_or("none");
    if taken.already {
        return vec![format!("{address}: is with VFIO already (driver before: {before})")];
    }
    if dry_run {
        let mut lines = vec![format!("{address}: can be taken (driver now: {before}); it would be done so:")];
        lines.extend(taken.steps.iter().map(|step| format!("    {step}")));
        return lines;
    }
    let node = taken.node.as_ref().map(|node| format!(", open it by {node}")).unwrap_or_default();
    vec![
        format!("{address}: taken (driver before: {before}){node}"),
        format!("    give it back with: fastice device unbind {address}"),
    ]
}

/// Gives the controllers back.
///
/// # Errors
/// When the records cannot be used; what is wrong with single controllers is told, and decides the exit status.
pub(super) fn unbind(args: &UnbindArgs) -> Outcome {
    let json = args.json.json;
    let (host, records) = (Host::system(), Records::at(&args.state.state_dir));
    let handover = Handover { host: &host, kernel: &Running, records: &records };
    let addresses: BTreeSet<PciAddress> = args.addresses.iter().copied().collect();
    let results = give_all(&handover, &addresses, args.driver.as_deref(), json)?;
    let mut out = Out::stdout();
    if json {
        let errors = results.errors("address");
        out.json(&serde_json::json!({ "unbound": results.done, "errors": errors }))?;
    } else {
        for given in &results.done {
            out.line(given_text(given))?;
        }
    }
    out.flush()?;
    Ok(results.exit())
}

fn give_all(
    handover: &Handover<'_>,
    addresses: &BTreeSet<PciAddress>,
    driver: Option<&str>,
    json: bool,
) -> Result<Results<Given>, DeviceError> {
    let mut results = Results::default();
    let lock = handover.records.lock()?;
    for &address in addresses {
        let given = handover.give_back(&lock, address, driver);
        results.add(address, json, given.map_err(Failure::from));
    }
    Ok(results)
}

fn given_text(given: &Given) -> String {
    let address = &given.address;
    let driver = given.driver.as_deref().unwrap_or("none");
    let name = given.name.as_ref().map(|name| format!(" as {name}")).unwrap_or_default();
    let mut text = match given.result {
        Return::Given => format!("{address}: given back, driver {driver}{name}"),
        Return::Nothing => format!("{address}: was not taken, driver {driver}{name}"),
        Return::Forgotten => format!("{address}: a record without use was removed, driver {driver}{name}"),
    };
    if !given.namespaces.is_empty() {
        text.push_str(": ");
        text.push_str(&given.namespaces.join(", "));
    }
    if given.namespaces_missing {
        text.push_str("; not all of its namespaces are back yet: see the kernel log");
    }
    text
}
