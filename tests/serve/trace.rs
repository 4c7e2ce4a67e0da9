//! `fastice trace` beside a daemon that serves: what a host did is what is told.

use fastice::initiator::controller::Controller;
use fastice::units::Lba;
use nvme_spec::Nsid;
use serde_json::Value;

use super::daemon::{Lab, NQN, any_port};
use super::load::{Load, connect_options, options};
use super::loopfs::Spec;

/// The lines with a word.
fn lines(text: &str, word: &str) -> Vec<String> {
    text.lines().filter(|line| line.contains(word)).map(str::to_owned).collect()
}

#[test]
fn the_last_commands_are_told_in_their_order_with_what_they_were() {
    let Some(lab) = Lab::new("trace", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let options = connect_options(daemon.address());
    let host = Controller::connect(&options).expect("a host");
    let namespace = host.namespace(Nsid(1)).expect("the file");
    let block = usize::try_from(namespace.block_size().bytes()).expect("small");
    let mut data = vec![0x5A; 8 * block];
    namespace.write(Lba(40), &data, false).expect("a write");
    namespace.read(Lba(40), &mut data[..block]).expect("a read");
    namespace.read(Lba(u64::MAX / 2), &mut data[..block]).expect_err("there is no such block");
    namespace.flush().expect("a flush");

    let output = lab.fastice(&["trace"], &[], 0);
    let text = String::from_utf8(output.stdout).expect("text");
    let io = lines(&text, NQN);
    let at = |word: &str| {
        io.iter().position(|line| line.contains(word)).unwrap_or_else(|| panic!("{word}: {text}"))
    };
    let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert!(at(" WRITE ") < at(" READ ") && at(" READ ") < at(" FLUSH "), "{text}");
    // opcode, nsid, lba, blocks
    let write = fields(&io[at(" WRITE ")]);
    assert_eq!(write[5..9], ["WRITE", "1", "40", "8"], "{text}");
    assert!(write.contains(&options.host.nqn) && write.contains(&"Successful".to_owned()), "{text}");
    let stages: Vec<f64> = write[10..16].iter().map(|word| word.parse().expect("a time")).collect();
    let total: f64 = write[9].parse().expect("a time");
    // Each is rounded down to a tenth.
    assert!(total > 0.0 && (total - stages.iter().sum::<f64>()).abs() < 0.7, "{text}");
    assert!(write[16] == "yes" && stages[4] > 0.0, "a write to a disk takes its time: {text}");
    let refused = lines(&text, "LBA Out of Range");
    assert!(refused.len() == 1 && refused[0].contains(" READ "), "{text}");
    assert_eq!(fields(&refused[0])[10..16], ["-"; 6], "{text}");
    assert_eq!(lines(&text, "Fabrics CONNECT").len(), 2, "the admin queue and one for I/O: {text}");
    host.shutdown().expect("the host goes");
    daemon.stop();
}

#[test]
fn perfetto_gets_all_that_cores_remember_of_a_load() {
    let Some(lab) = Lab::new("trace for perfetto", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let load = Load::start(options(daemon.address(), 1, 13));
    // More than the rings hold.
    load.reaches(10_000);
    let document = lab.json(&["trace", "--format", "chrome"], 0);
    load.end_clean();
    daemon.stop();
    let events = document["traceEvents"].as_array().expect("an array");
    let mut open: std::collections::BTreeMap<(u64, u64), (f64, Vec<&Value>)> =
        std::collections::BTreeMap::new();
    let (mut commands, mut stages) = (0, 0);
    for event in events.iter().filter(|event| event["ph"] != "M") {
        let thread = (event["pid"].as_u64().expect("set"), event["tid"].as_u64().expect("set"));
        let (last, stack) = open.entry(thread).or_default();
        let ts = event["ts"].as_f64().expect("a number");
        assert!(ts >= *last, "{event}");
        *last = ts;
        if event["ph"] == "B" {
            let is_stage = event["cat"] == "stage";
            (commands, stages) = (commands + usize::from(!is_stage), stages + usize::from(is_stage));
            assert_eq!(stack.len(), usize::from(is_stage), "{event}");
            stack.push(event);
        } else {
            assert_eq!(stack.pop().expect("begun")["name"], event["name"]);
        }
    }
    assert!(open.values().all(|(_, stack)| stack.is_empty()));
    let names = |name: &str| events.iter().filter(|event| event["name"] == name).count();
    assert_eq!(names("process_name"), 2, "two cores");
    // The load's queues are on one core or on both.
    assert!((4096..=2 * 4096).contains(&commands), "{commands}");
    assert!(stages >= 5 * (commands - 100), "nearly all went to the device: {stages} of {commands}");
    assert!(names("READ") > 0 && names("WRITE") > 0 && names("device") > 0);
}
