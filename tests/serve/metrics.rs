//! Metrics are scraped over loopback while a host reads and writes, and `pins` and `map verify` tell what the target knows.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use fastice::config::Config;
use fastice::control::start;
use fastice::extent::NoProgress;

use super::daemon::{Lab, PATIENCE, any_port, eventually};
use super::load::{Load, options};
use super::loopfs::Spec;

/// What `GET /metrics` gives.
pub(crate) fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {address}\r\n\r\n").expect("it reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("it answers and closes");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(body.ends_with("# EOF\n"), "{body}");
    body.to_owned()
}

/// The sum of the samples of one name.
fn value(page: &str, name: &str) -> f64 {
    let samples = page.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
    });
    samples
        .map(|line| line.rsplit(' ').next().and_then(|text| text.parse::<f64>().ok()).expect("a number"))
        .sum()
}

#[test]
fn a_scrape_tells_of_pins_watch_and_hosts() {
    let Some(lab) = Lab::new("metrics", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let head = "[metrics]\nlisten = \"127.0.0.1:0\"\n";
    let namespace = format!("allow_any_host = true\n[[subsystem.namespace]]\nfile = {path:?}\n");
    let config = Config::load(&lab.config(head, any_port(), &namespace)).expect("a good configuration");
    let running = start(config, &mut NoProgress).expect("served");
    let status = lab.json(&["status", "--json"], 0);
    let address = status["targets"][0]["metrics"].as_str().expect("an address").to_owned();

    let load = Load::start(options(running.addresses()[0], 1, 7));
    load.goes_on();
    eventually("a host is told of, and a look", || {
        let page = scrape(&address);
        value(&page, "fastice_host_commands_total") > 0.0 && value(&page, "fastice_watch_checks_total") > 1.0
    });
    let page = scrape(&address);
    let file = path.display();
    let grant = format!("nsid=\"1\",path=\"{file}\",grant=\"live\"}} 1");
    assert!(page.contains(&grant), "{page}");
    assert_eq!(value(&page, "fastice_pin_guard"), 3.0, "{page}");
    assert!(value(&page, "fastice_pin_extents") > 100.0, "{page}");
    assert!(value(&page, "fastice_watch_interval_seconds") >= 0.1, "{page}");
    assert!(value(&page, "fastice_host_written_bytes_total") > 0.0, "{page}");
    assert_eq!(value(&page, "fastice_fences_total"), 0.0, "{page}");
    assert!(value(&page, "fastice_core_state_seconds_total") > 0.0, "{page}");
    assert!(value(&page, "fastice_command_seconds_count") > 0.0, "{page}");
    let stages = value(&page, "fastice_command_stage_seconds_count");
    // What is sent while they are read is in the one already, and not yet in the other.
    let apart = stages - 6.0 * value(&page, "fastice_command_seconds_count");
    assert!(apart.abs() <= 6.0 * 64.0, "{page}");
    assert_eq!(stages, value(&page, "fastice_core_command_stage_seconds_count"), "{page}");
    assert!(page.contains("nsid=\"1\",host=\"nqn.") && page.contains("stage=\"device\"}"), "{page}");

    let pins = lab.json(&["pins", "--json"], 0);
    let served = &pins["pins"][0]["served"];
    assert_eq!(served["grant"], "live", "{pins}");
    assert_eq!(served["guards"].as_array().map(Vec::len), Some(3), "{pins}");
    assert!(served["watch"]["checks"].as_u64() >= Some(1), "{pins}");
    let verdict = lab.json(&["map", "verify", "--json", &file.to_string()], 0);
    assert_eq!((&verdict["same"], &verdict["served"]["pid"]), (&true.into(), &std::process::id().into()));
    let told = lab.fastice(&["map", "verify"], &[&path], 0);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("guards: open-permission mark") && told.contains("looked at every"), "{told}");

    drop(load.end_clean());
    running.stop(PATIENCE).expect("a clean end");
    assert!(
        TcpStream::connect(&address).is_err() || scrape_is_refused(&address),
        "the page outlives the target"
    );
}

/// Whether what still listens for a moment answers nothing any more.
fn scrape_is_refused(address: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else { return true };
    let asked = stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
    let mut text = String::new();
    asked.is_err() || stream.read_to_string(&mut text).is_err() || !text.starts_with("HTTP/1.1 200")
}

#[test]
fn a_kept_pin_that_nobody_serves_says_so() {
    let Some(lab) = Lab::new("not served", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    lab.fastice(&["pin"], &[&path], 0);
    let pins = lab.json(&["pins", "--json"], 0);
    assert_eq!(pins["pins"][0]["served"], serde_json::Value::Null, "{pins}");
    let pins = lab.fastice(&["pins"], &[], 0);
    assert!(String::from_utf8_lossy(&pins.stdout).contains("nobody serves it"), "{pins:?}");
    let told = lab.fastice(&["map", "verify"], &[&path], 0);
    assert!(String::from_utf8_lossy(&told.stdout).contains("nobody serves it"), "{told:?}");
    lab.fastice(&["unpin"], &[&path], 0);
}
