//! Commands in the Trace Event Format, which Perfetto and chrome://tracing read.
//!
//! ```text
//!   process   a core of a target
//!   thread    a lane of a queue: commands of one lane do not overlap, and a queue has as many lanes as it needs
//!   slice     a command, and in it a slice for each stage
//! ```
//!
//! Slices are told by their beginnings and ends, not by their lengths: times have a digit behind the point that readers may
//! round, and what ends when the next begins must not seem to overlap. Events of one thread are in the order of time.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::Named;
use crate::control::TraceStatus;

/// The whole document. Times are microseconds of the machine's monotonic clock, the same for all targets.
pub(super) fn document(targets: &[TraceStatus]) -> Value {
    let mut events = Vec::new();
    let mut processes = 0_usize;
    for target in targets {
        let commands = Named::all(target);
        for core in &target.trace {
            processes += 1;
            let name = format!("fastice {}, core {}", target.pid, core.cpu);
            events.push(named("process_name", processes, 0, &name));
            let of_core: Vec<_> = commands.iter().filter(|it| std::ptr::eq(it.core, core)).collect();
            add_core(&mut events, processes, &of_core);
        }
    }
    json!({ "displayTimeUnit": "ns", "traceEvents": events })
}

fn named(what: &str, process: usize, thread: usize, name: &str) -> Value {
    json!({ "ph": "M", "name": what, "pid": process, "tid": thread, "args": { "name": name } })
}

/// A lane of a connection, and until when it is taken.
struct Lane {
    thread: usize,
    until_ns: u64,
}

/// The commands of a core, in the order of their arrival.
fn add_core(events: &mut Vec<Value>, process: usize, commands: &[&Named<'_>]) {
    let mut lanes: BTreeMap<Option<usize>, Vec<Lane>> = BTreeMap::new();
    let mut threads = 0;
    for it in commands {
        let mine = lanes.entry(it.command.connection).or_default();
        let free = mine.iter_mut().find(|lane| lane.until_ns <= it.arrived_ns());
        let thread = if let Some(lane) = free {
            lane.until_ns = it.end_ns();
            lane.thread
        } else {
            threads += 1;
            let who = it.connection.map_or_else(
                || "not connected".to_owned(),
                |who| format!("{} cntlid {} qid {}", who.host, who.cntlid, who.qid),
            );
            events.push(named("thread_name", process, threads, &format!("{who}, lane {}", mine.len())));
            mine.push(Lane { thread: threads, until_ns: it.end_ns() });
            threads
        };
        add_command(events, process, thread, it);
    }
}

fn add_command(events: &mut Vec<Value>, process: usize, thread: usize, it: &Named<'_>) {
    let mut args = json!({
        "cid": it.command.cid,
        "status": it.status().to_string(),
        "sent": it.is_sent(),
    });
    if let Some(nsid) = it.nsid() {
        args["nsid"] = nsid.into();
    }
    if let Some((lba, blocks)) = it.blocks() {
        args["lba"] = lba.into();
        args["blocks"] = blocks.into();
    }
    if let Some(who) = it.connection {
        args["subsystem"] = who.subsystem.as_str().into();
    }
    let event = |phase: &str, name: &str, category: &str, ns: u64| json!({ "ph": phase, "name": name, "cat": category, "pid": process, "tid": thread, "ts": us(ns) });
    let name = it.name();
    let mut begin = event("B", &name, "command", it.arrived_ns());
    begin["args"] = args;
    events.push(begin);
    for (stage, from, to) in it.stages() {
        events.push(event("B", stage.word(), "stage", from));
        events.push(event("E", stage.word(), "stage", to));
    }
    events.push(event("E", &name, "command", it.end_ns()));
}

/// Nanoseconds as microseconds: equal times stay equal, whatever is rounded.
#[expect(clippy::cast_precision_loss, reason = "exact for 100 days of the machine's life, then to 2 ns")]
fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::super::tests::target;
    use super::*;

    #[test]
    fn slices_of_a_lane_do_not_overlap_and_stages_lie_in_their_commands() {
        let document = document(&[target(), target()]);
        let events = document["traceEvents"].as_array().expect("an array");
        let mut threads: BTreeMap<(u64, u64), (f64, Vec<&Value>)> = BTreeMap::new();
        let mut slices = BTreeMap::<&str, usize>::new();
        let mut names = 0;
        for event in events {
            let at = (event["pid"].as_u64().expect("set"), event["tid"].as_u64().expect("set"));
            if event["ph"] == "M" {
                names += 1;
                if event["name"] == "thread_name" {
                    assert!(threads.insert(at, (0.0, Vec::new())).is_none(), "{event}");
                }
                continue;
            }
            let (last, open) = threads.get_mut(&at).expect("a thread that has a name");
            let ts = event["ts"].as_f64().expect("set");
            assert!(ts >= *last, "{event}");
            *last = ts;
            if event["ph"] == "B" {
                let inside = open.last().map_or("nothing", |outer| outer["cat"].as_str().expect("set"));
                let category = event["cat"].as_str().expect("set");
                assert_eq!(inside, if category == "stage" { "command" } else { "nothing" }, "{event}");
                *slices.entry(category).or_default() += 1;
                open.push(event);
            } else {
                let begun = open.pop().expect("what begun");
                assert_eq!((&event["ph"], &event["name"]), (&"E".into(), &begun["name"]));
            }
        }
        assert!(threads.values().all(|(_, open)| open.is_empty()));
        assert_eq!((slices["command"], slices["stage"]), (10, 2 * (6 + 6 + 5)));
        // Two processes; in each the host's queue with three lanes, and what is not connected.
        assert_eq!((names, threads.len()), (2 + 2 * 4, 2 * 4));
        let read = events.iter().find(|event| event["name"] == "READ").expect("a read");
        assert_eq!((&read["args"]["lba"], &read["args"]["blocks"]), (&0x1_0000_0008_u64.into(), &8.into()));
    }
}
