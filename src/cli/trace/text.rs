//! Commands as lines of text.

use std::io;

use super::Named;
use crate::cli::out::{Out, time_of};
use crate::cli::status::us;
use crate::control::TraceStatus;
use crate::stage::Stage;

/// Prints all targets.
pub(super) fn tell(targets: &[TraceStatus], out: &mut Out) -> io::Result<()> {
    for target in targets {
        for core in &target.trace {
            out.line(format!(
                "process {}, core {}: {} of {} commands",
                target.pid,
                core.cpu,
                core.commands.len(),
                core.ended
            ))?;
        }
        let rows: Vec<_> = Named::all(target).iter().map(cells).collect();
        out.table(HEAD, &rows)?;
    }
    Ok(())
}

const HEAD: [&str; 20] = [
    "arrived",
    "core ",
    "cntlid ",
    "qid ",
    "cid ",
    "opcode",
    "nsid ",
    "lba ",
    "blocks ",
    "total ",
    "receive ",
    "parse ",
    "lookup ",
    "queue ",
    "device ",
    "send ",
    "sent",
    "status",
    "host",
    "subsystem",
];

fn cells(it: &Named<'_>) -> [String; 20] {
    let none = || "-".to_owned();
    let mut stages = [const { None }; Stage::ALL.len()];
    for (stage, from, to) in it.stages() {
        if let Some(at) = Stage::ALL.iter().position(|other| *other == stage) {
            stages[at] = Some(us(to.saturating_sub(from)));
        }
    }
    let [receive, parse, lookup, queue, device, send] = stages.map(|told| told.unwrap_or_else(none));
    let (lba, blocks) =
        it.blocks().map_or_else(|| (none(), none()), |(lba, blocks)| (lba.to_string(), blocks.to_string()));
    let of = |get: fn(&crate::control::TracedConnection) -> String| it.connection.map_or_else(none, get);
    [
        arrived(it),
        it.core.cpu.to_string(),
        of(|it| it.cntlid.to_string()),
        of(|it| it.qid.to_string()),
        it.command.cid.to_string(),
        it.name(),
        it.nsid().map_or_else(none, |nsid| nsid.to_string()),
        lba,
        blocks,
        us(it.end_ns().saturating_sub(it.arrived_ns())),
        receive,
        parse,
        lookup,
        queue,
        device,
        send,
        if it.is_sent() { "yes" } else { "no" }.to_owned(),
        it.status().to_string(),
        of(|it| it.host.clone()),
        of(|it| it.subsystem.clone()),
    ]
}

/// By the calendar, with microseconds behind what [`time_of`] gives to the millisecond.
fn arrived(it: &Named<'_>) -> String {
    let ago_us = it.target.at_ns.saturating_sub(it.arrived_ns()) / 1000;
    let unix_us = it.target.at_unix_us.saturating_sub(ago_us);
    let time = time_of(unix_us / 1000);
    format!("{}{:03}Z", time.trim_end_matches('Z'), unix_us % 1000)
}

#[cfg(test)]
mod tests {
    use super::super::tests::target;
    use super::*;

    #[test]
    fn a_line_tells_when_what_where_how_long_and_whose() {
        let target = target();
        let text: Vec<_> = Named::all(&target).iter().map(|it| cells(it).join(" ")).collect();
        let times = "96.0 0.1 0.2 0.3 0.4 90.0 5.0 yes";
        let first = format!(
            "2023-11-14T22:13:19.999000Z 6 4 1 1 READ 1 4294967304 8 {times} Successful Completion (0x000) nqn.host nqn.subsystem"
        );
        assert_eq!(text[0], first);
        assert!(text[1].contains(" 0.5 - - - - - - yes LBA Out of Range"), "{}", text[1]);
        assert!(text[2].contains(" - - 9 Fabrics CONNECT - "), "{}", text[2]);
        assert!(text[4].contains(" 91.0 0.1 0.2 0.3 0.4 90.0 - no Successful"), "{}", text[4]);
    }
}
