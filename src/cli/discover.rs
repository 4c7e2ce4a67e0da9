//! `fastice discover`: what a target offers.

use clap::Args;
use serde::Serialize;

use super::exit::{Exit, Outcome};
use super::out::{JsonFlag, Out};
use super::peer::{HostArgs, PORT_DISCOVERY, resolve};
use crate::initiator::discovery::{DiscoveryEntry, discover};

/// Ask a target which subsystems it offers to this host
#[derive(Clone, Debug, Args)]
pub struct DiscoverArgs {
    /// Address of a discovery controller, with or without port: 192.0.2.1, [2001:db8::1]:4420 [default port: 8009]
    pub address: String,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub host: HostArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub json: JsonFlag,
}

/// One entry of the discovery log, as `--json` prints it. Names as in the output of nvme-cli.
#[derive(Serialize)]
struct Record {
    trtype: String,
    adrfam: String,
    subtype: String,
    traddr: String,
    trsvcid: String,
    subnqn: String,
    portid: u16,
    cntlid: u16,
    asqsz: u16,
    treq: u8,
    eflags: u16,
    sectype: u8,
}

impl From<&DiscoveryEntry> for Record {
    fn from(entry: &DiscoveryEntry) -> Self {
        // Known numbers print their names, unknown ones the number.
        let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_ascii_lowercase();
        Self {
            trtype: word(&entry.transport),
            adrfam: word(&entry.address_family),
            subtype: word(&entry.subsystem_type).replace('_', "-"),
            traddr: entry.address.clone(),
            trsvcid: entry.service.clone(),
            subnqn: entry.subsystem_nqn.clone(),
            portid: entry.portid,
            cntlid: entry.cntlid,
            asqsz: entry.asqsz,
            treq: entry.treq,
            eflags: entry.eflags,
            sectype: entry.sectype,
        }
    }
}

/// Asks, and prints the entries.
///
/// # Errors
/// When the target cannot be reached, or its log makes no sense.
pub fn run(args: &DiscoverArgs) -> Outcome {
    let address = resolve(&args.address, PORT_DISCOVERY)?;
    let entries = discover(address, &args.host.host())?;
    let records: Vec<Record> = entries.iter().map(Record::from).collect();
    let mut out = Out::stdout();
    if args.json.json {
        out.json(&serde_json::json!({ "records": records }))?;
    } else {
        let cells = |record: &Record| {
            [
                record.subtype.clone(),
                record.trtype.clone(),
                record.traddr.clone(),
                record.trsvcid.clone(),
                record.subnqn.clone(),
            ]
        };
        let rows: Vec<_> = records.iter().map(cells).collect();
        out.table(["type", "transport", "address", "port ", "subsystem"], &rows)?;
    }
    out.flush()?;
    Ok(Exit::Ok)
}
