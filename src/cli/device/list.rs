//! `fastice device list`: every NVMe controller, and whether it can be taken.

use clap::Args;
use serde::Serialize;

use super::error::Obstacle;
use super::host::Host;
use super::inventory::{Controller, Inventory, Wish};
use super::nvme::{Namespace, PathTo};
use super::record::{Records, boot_id};
use super::usage::{Process, Use};
use crate::cli::StateDirArg;
use crate::cli::exit::{Exit, Outcome};
use crate::cli::out::{JsonFlag, Out};
use crate::config::format_size;

/// List the NVMe controllers of this host, what is used on them, and whether they can be taken
///
/// Only looks. What nothing but the kernel knows (a ZFS pool, say) is found by `device bind`, which asks the kernel.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    pub state: StateDirArg,
    #[command(flatten)]
    pub json: JsonFlag,
}

/// Whether a controller can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// It can.
    Free,
    /// It cannot, see the obstacles.
    InUse,
    /// VFIO has it already.
    Taken,
}

/// One controller, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Row {
    address: String,
    vendor_id: String,
    device_id: String,
    driver: Option<String>,
    driver_override: Option<String>,
    /// What the kernel's driver calls it.
    name: Option<String>,
    state: Option<String>,
    model: Option<String>,
    serial: Option<String>,
    firmware: Option<String>,
    subsystem_nqn: Option<String>,
    numa_node: Option<u32>,
    iommu_group: Option<u32>,
    /// The others in its IOMMU group.
    group_members: Vec<MemberRow>,
    /// Whose virtual function it is.
    physical_function: Option<String>,
    virtual_functions: Vec<MemberRow>,
    namespaces: Vec<NamespaceRow>,
    /// Uses of the controller's own node.
    uses: Vec<Use>,
    verdict: Verdict,
    obstacles: Vec<ObstacleRow>,
    /// What it was before, when fastice took it.
    taken: Option<TakenRow>,
    /// Who has it open through VFIO.
    users: Vec<Process>,
}

#[derive(Debug, Serialize)]
struct MemberRow {
    address: String,
    driver: Option<String>,
}

#[derive(Debug, Serialize)]
struct NamespaceRow {
    name: String,
    nsid: Option<u32>,
    size_bytes: Option<u64>,
    logical_block_bytes: Option<u32>,
    metadata_bytes: Option<u32>,
    nguid: Option<String>,
    eui64: Option<String>,
    uuid: Option<String>,
    paths: Vec<PathTo>,
    uses: Vec<Use>,
}

#[derive(Debug, Serialize)]
struct ObstacleRow {
    kind: &'static str,
    message: String,
    remedy: String,
}

#[derive(Debug, Serialize)]
struct TakenRow {
    /// The driver that had it.
    previous_driver: Option<String>,
    /// Whether that was in this boot; a record of an earlier one is of no use any more.
    this_boot: bool,
    /// Why the record cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

/// Lists them.
///
/// # Errors
/// When sysfs or the records cannot be read.
pub(super) fn run(args: &ListArgs) -> Outcome {
    let rows = rows(&Host::system(), &Records::at(&args.state.state_dir))?;
    let mut out = Out::stdout();
    if args.json.json {
        out.json(&serde_json::json!({ "controllers": rows }))?;
    } else if rows.is_empty() {
        out.line("no NVMe controllers on this host's PCI buses")?;
    } else {
        for line in rows.iter().flat_map(text) {
            out.line(line)?;
        }
    }
    out.flush()?;
    Ok(Exit::Ok)
}

fn rows(host: &Host, records: &Records) -> Result<Vec<Row>, super::error::DeviceError> {
    let inventory = Inventory::read(host, records)?;
    let boot_id = boot_id(host);
    Ok(inventory.controllers.iter().map(|one| row(&inventory, one, &boot_id)).collect())
}

fn row(inventory: &Inventory, one: &Controller, boot_id: &str) -> Row {
    let function = &one.function;
    let obstacles = inventory.obstacles(one, &Wish::of(function.address));
    let taken = function.is_bound_to_vfio();
    let verdict = match (taken, obstacles.is_empty()) {
        (true, _) => Verdict::Taken,
        (false, true) => Verdict::Free,
        (false, false) => Verdict::InUse,
    };
    let member = |member: &async_nvme::vfio::GroupMember| MemberRow {
        address: member.address.to_string(),
        driver: member.driver.clone(),
    };
    let members = function.group.iter().flat_map(|group| &group.members);
    let binding = one.binding.as_ref().and_then(|binding| binding.as_ref().ok());
    let kernel = one.kernel.as_ref();
    // While VFIO has it, only the record knows what it is.
    let known = |live: Option<&Option<String>>, recorded: Option<&Option<String>>| {
        live.or(recorded.filter(|_| taken)).cloned().flatten()
    };
    Row {
        address: function.address.to_string(),
        vendor_id: format!("{:04x}", function.vendor),
        device_id: format!("{:04x}", function.device),
        driver: function.driver.clone(),
        driver_override: function.driver_override.clone(),
        name: kernel.map(|kernel| kernel.name.clone()),
        state: kernel.and_then(|kernel| kernel.state.clone()),
        model: known(kernel.map(|kernel| &kernel.model), binding.map(|binding| &binding.model)),
        serial: known(kernel.map(|kernel| &kernel.serial), binding.map(|binding| &binding.serial)),
        firmware: known(kernel.map(|kernel| &kernel.firmware), binding.map(|binding| &binding.firmware)),
        subsystem_nqn: kernel.and_then(|kernel| kernel.subsystem_nqn.clone()),
        numa_node: function.numa_node,
        iommu_group: function.group.as_ref().map(|group| group.number),
        group_members: members.filter(|other| other.address != function.address).map(member).collect(),
        physical_function: function.physical_function.map(|address| address.to_string()),
        virtual_functions: one.virtual_functions.iter().map(member).collect(),
        namespaces: one.namespaces.iter().map(namespace_row).collect(),
        uses: one.own_uses.clone(),
        verdict,
        obstacles: if taken { Vec::new() } else { obstacle_rows(&obstacles, function.address) },
        taken: one.binding.as_ref().map(|binding| taken_row(binding, boot_id)),
        users: one.vfio_users.clone(),
    }
}

fn obstacle_rows(obstacles: &[Obstacle], address: async_nvme::vfio::PciAddress) -> Vec<ObstacleRow> {
    let one = |obstacle: &Obstacle| ObstacleRow {
        kind: obstacle.kind(),
        message: obstacle.to_string(),
        remedy: obstacle.remedy(address),
    };
    obstacles.iter().map(one).collect()
}

fn namespace_row((namespace, uses): &(Namespace, Vec<Use>)) -> NamespaceRow {
    NamespaceRow {
        name: namespace.name.clone(),
        nsid: namespace.nsid,
        size_bytes: namespace.size_bytes,
        logical_block_bytes: namespace.logical_block_bytes,
        metadata_bytes: namespace.metadata_bytes,
        nguid: namespace.nguid.clone(),
        eui64: namespace.eui64.clone(),
        uuid: namespace.uuid.clone(),
        paths: namespace.paths.clone(),
        uses: uses.clone(),
    }
}

fn taken_row(binding: &Result<super::record::Binding, super::error::DeviceError>, boot_id: &str) -> TakenRow {
    match binding {
        Ok(binding) => TakenRow {
            previous_driver: binding.driver.clone(),
            this_boot: binding.boot_id == boot_id,
            damage: None,
        },
        Err(error) => TakenRow { previous_driver: None, this_boot: false, damage: Some(error.to_string()) },
    }
}

/// One controller for people: a head line, and indented below it what hangs on it.
fn text(row: &Row) -> Vec<String> {
    let mut lines = vec![head(row)];
    let mut place = Vec::new();
    place.push(row.iommu_group.map_or("no IOMMU group".to_owned(), |group| format!("IOMMU group {group}")));
    if !row.group_members.is_empty() {
        let with: Vec<String> = row.group_members.iter().map(member_text).collect();
        place.push(format!("shared with {}", with.join(", ")));
    }
    place.extend(row.numa_node.map(|node| format!("NUMA node {node}")));
    place.extend(row.physical_function.as_ref().map(|of| format!("virtual function of {of}")));
    if !row.virtual_functions.is_empty() {
        let with: Vec<String> = row.virtual_functions.iter().map(member_text).collect();
        place.push(format!("virtual functions {}", with.join(", ")));
    }
    lines.push(format!("    {}", place.join("; ")));
    for namespace in &row.namespaces {
        lines.extend(namespace_text(namespace));
    }
    lines.extend(row.uses.iter().map(|used| format!("    {used}")));
    match row.verdict {
        Verdict::Free => lines.push("    can be taken".to_owned()),
        Verdict::Taken => lines.push(format!("    {}", taken_text(row))),
        Verdict::InUse => {
            for obstacle in &row.obstacles {
                lines.push(format!("    cannot be taken: {}", obstacle.message));
                lines.push(format!("        -> {}", obstacle.remedy));
            }
        }
    }
    if row.verdict != Verdict::Taken && row.taken.is_some() {
        let address = &row.address;
        lines.push("    a taking of it was cut short, or is of an earlier boot".to_owned());
        lines.push(format!("        -> fastice device unbind {address}"));
    }
    lines
}

fn head(row: &Row) -> String {
    let driver = row.driver.as_deref().unwrap_or("none");
    let mut head = vec![row.address.clone(), format!("driver {driver}")];
    head.extend(row.name.clone());
    head.extend(row.state.clone().filter(|state| state != "live").map(|state| format!("({state})")));
    head.push(row.model.clone().unwrap_or_else(|| format!("{}:{}", row.vendor_id, row.device_id)));
    head.extend(row.serial.as_ref().map(|serial| format!("serial {serial}")));
    head.extend(row.firmware.as_ref().map(|firmware| format!("firmware {firmware}")));
    head.join("  ")
}

fn member_text(member: &MemberRow) -> String {
    format!("{} ({})", member.address, member.driver.as_deref().unwrap_or("no driver"))
}

fn namespace_text(namespace: &NamespaceRow) -> Vec<String> {
    let mut parts = vec![namespace.name.clone()];
    parts.extend(namespace.nsid.map(|nsid| format!("namespace {nsid}")));
    parts.extend(namespace.size_bytes.map(format_size));
    parts.extend(namespace.logical_block_bytes.map(|bytes| {
        let metadata = namespace.metadata_bytes.filter(|&bytes| bytes > 0);
        let more = metadata.map(|bytes| format!(" + {bytes}")).unwrap_or_default();
        format!("{bytes}{more} B blocks")
    }));
    parts.extend(namespace.nguid.as_ref().map(|id| format!("nguid {id}")));
    parts.extend(namespace.eui64.as_ref().map(|id| format!("eui64 {id}")));
    if namespace.paths.len() > 1 {
        let one = |path: &PathTo| {
            let state = path.state.as_deref().unwrap_or("?");
            let ana = path.ana_state.as_ref().map(|ana| format!(", {ana}")).unwrap_or_default();
            format!("{} ({state}{ana})", path.controller)
        };
        let paths: Vec<String> = namespace.paths.iter().map(one).collect();
        parts.push(format!("paths {}", paths.join(" ")));
    }
    let mut lines = vec![format!("    {}", parts.join("  "))];
    lines.extend(namespace.uses.iter().map(|used| format!("        {used}")));
    lines
}

fn taken_text(row: &Row) -> String {
    let was = match &row.taken {
        Some(TakenRow { damage: Some(damage), .. }) => format!("; {damage}"),
        Some(TakenRow { this_boot: true, previous_driver, .. }) => {
            format!("; before: driver {}", previous_driver.as_deref().unwrap_or("none"))
        }
        _ => "; not by fastice".to_owned(),
    };
    let users: Vec<String> = row.users.iter().map(ToString::to_string).collect();
    let by = if users.is_empty() { "no process".to_owned() } else { users.join(", ") };
    format!("taken{was}; used by {by}")
}

#[cfg(test)]
mod tests;
