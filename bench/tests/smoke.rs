//! Goal: the bench runs, and its report is one. Not how fast anything is.
//! Method: the program, with rounds of a millisecond, twice into the same report.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;

use fastice_bench::profiles::windows;
use fastice_bench::report::Report;

fn bench(arguments: &[&str], report: &Path) -> String {
    bench_with(&mut Command::new(env!("CARGO_BIN_EXE_fastice-bench")), arguments, report)
}

fn bench_with(program: &mut Command, arguments: &[&str], report: &Path) -> String {
    let output = program.args(arguments).arg("--report").arg(report).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn well_formed(report: &Report) {
    for row in &report.rows {
        assert!(row.ours.is_finite() && row.ours_min <= row.ours_max && row.rounds > 0, "{row:?}");
        assert!(!row.unit.is_empty() && !row.machine.is_empty() && !row.method.is_empty(), "{row:?}");
        assert_eq!(row.peer.is_some(), row.peer_name.is_some(), "{row:?}");
        assert_eq!(row.peer.is_some(), row.ratio.is_some(), "{row:?}");
        assert_eq!(row.bar.is_some(), row.met.is_some(), "{row:?}");
    }
}

#[test]
fn the_target_is_measured_beside_the_bare_responder() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    // Longer than a core takes to tell how busy it was: else nobody's processor time is known.
    bench(
        &["target", "--rounds", "1", "--round-ms", "30", "--spare", "0", "--rest", "0", "--depths", "1,32"],
        &path,
    );
    let report = Report::load(&path).unwrap();
    well_formed(&report);
    let names: HashSet<_> = report.rows.iter().map(|row| row.name.as_str()).collect();
    for name in [
        "target/null/randread/qd1/p50",
        "target/null/randwrite/qd1/p99",
        "target/null/randread/qd32/iops",
        "target/memory/randwrite/qd32/iops",
        "target/map-10000-extents/randread/qd1/p50",
        "target/null/randread/qd32/ungathered/cpu",
        // By the bare responder that joins.
        "target/null/randrw/qd32/iops",
        "target/null/randwrite-128k/qd16/p50",
        "target/curve/null/randread/qd2/iops",
        "target/curve/null/randread-connections/64x4/p50",
        "target/cost/null/randwrite/qd1/parse",
        "target/round-trip",
    ] {
        assert!(names.contains(name), "{name} is missing from {names:?}");
    }
    let mut measured = report.rows.iter().filter(|row| !row.name.starts_with("target/cost/"));
    assert!(measured.all(|row| row.ours > 0.0), "something was done: {report:?}");
    let of_curves = |row: &&fastice_bench::report::Row| row.name.starts_with("target/curve/");
    assert!(report.rows.iter().filter(of_curves).all(|row| row.window.is_some()), "{report:?}");
    bench(&["publish"], &path);
    assert!(directory.path().join("plots/null-randread-latency.svg").is_file());
}

#[test]
fn a_profiler_is_told_which_side_was_measured_when() {
    let directory = tempfile::tempdir().unwrap();
    let (path, noted) = (directory.path().join("report.json"), directory.path().join("windows"));
    let program = || {
        let mut program = Command::new(env!("CARGO_BIN_EXE_fastice-bench"));
        program.env(windows::FILE, &noted);
        program
    };
    let case = [
        "target",
        "--only",
        "target/null/randread/qd4",
        "--depths",
        "4",
        "--rounds",
        "2",
        "--round-ms",
        "30",
    ];
    bench_with(&mut program(), &[&case[..], &["--spare", "0", "--rest", "0"]].concat(), &path);
    let light =
        ["idle", "--only", "idle/light", "--rounds", "1", "--idle-ms", "50", "--spare", "0", "--rest", "0"];
    bench_with(&mut program(), &light, &path);
    let windows = windows::read(&noted).unwrap();
    let of = |side: &str| windows.iter().filter(|window| window.side == side).collect::<Vec<_>>();
    for side in ["the bare responder", windows::OURS] {
        assert!(of(side).len() >= 2, "{side}: {windows:?}");
        assert!(of(side).iter().all(|window| window.commands >= 1.0), "{windows:?}");
    }
    for side in [
        "fastice, as installed",
        "fastice, always polling",
        "the bare responder, asleep in recv",
        "the bare responder, polling",
    ] {
        assert!(of(side).iter().all(|window| (3.0..=7.0).contains(&window.commands)), "{windows:?}");
        assert_eq!(of(side).len(), 1, "{side}: {windows:?}");
    }
    let mut in_order = windows.windows(2);
    assert!(
        in_order.all(|pair| pair[0].ended_ns <= pair[1].begun_ns && pair[0].begun_ns < pair[0].ended_ns),
        "{windows:?}"
    );
}

#[test]
fn a_target_is_measured_that_has_little_to_do_and_one_that_grows() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let quick = ["--rounds", "1", "--round-ms", "1", "--idle-ms", "1", "--rest", "0"];
    bench(&[&["idle"], &quick[..]].concat(), &path);
    for part in ["scale/", "growth/namespaces", "growth/cores"] {
        bench(&[&["growth", "--only", part], &quick[..]].concat(), &path);
    }
    let report = Report::load(&path).unwrap();
    well_formed(&report);
    let row =
        |name: &str| report.rows.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("{name}"));
    for name in [
        "idle/100-connections/cpu",
        "idle/light/p99",
        "idle/light/bare/p99",
        "idle/full/iops",
        "scale/start/first-io",
    ] {
        assert!(row(name).ours > 0.0, "{name}");
    }
    for name in ["idle/100-connections/keep-alives", "scale/connections/served", "scale/namespaces/readable"]
    {
        assert_eq!(row(name).met, Some(true), "{name}");
    }
}

#[test]
fn the_driver_is_measured_and_the_report_is_well_formed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let quick = ["driver", "--rounds", "1", "--round-ms", "1", "--depths"];
    bench(&[&quick[..], &["1,8"]].concat(), &path);
    bench(&[&quick[..], &["8,128"]].concat(), &path);

    let report = Report::load(&path).unwrap();
    let names: HashSet<_> = report.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names.len(), report.rows.len(), "one row a name");
    for name in [
        "driver/replay/qd1/cycles",
        "driver/replay/qd8/iops",
        "driver/replay/qd128/cycles-one-by-one",
        "driver/model/qd8/iops",
        "driver/model/qd1/latency",
        "driver/model-5us/qd1/latency",
        "driver/vfio-user/qd1/latency",
        "driver/vfio-user/qd128/iops",
    ] {
        assert!(names.contains(name), "{name} is missing from {names:?}");
    }
    well_formed(&report);
    let barred = report.rows.iter().filter(|row| row.bar.is_some()).count();
    assert_eq!(barred, 6, "what must be met is stated");
    let shown = bench(&["show"], &path);
    assert_eq!(shown.lines().count(), report.rows.len());
    bench(&["publish"], &path);
    let published = std::fs::read_to_string(directory.path().join("REPORT.md")).unwrap();
    assert!(report.rows.iter().all(|row| published.contains(&format!("`{}`", row.name))));

    let other = directory.path().join("other.json");
    bench(&["merge", path.to_str().unwrap()], &other);
    assert_eq!(Report::load(&other).unwrap(), report);
}

#[test]
fn what_lookups_wait_for_is_measured_and_noted_for_a_profiler() {
    let directory = tempfile::tempdir().unwrap();
    let (path, noted) = (directory.path().join("report.json"), directory.path().join("windows"));
    let mut program = Command::new(env!("CARGO_BIN_EXE_fastice-bench"));
    let quick = ["scale", "--only-waits", "--extents", "1000", "--rounds", "1", "--rest", "0"];
    bench_with(program.env(windows::FILE, &noted), &quick, &path);
    let report = Report::load(&path).unwrap();
    well_formed(&report);
    let names: Vec<_> = report.rows.iter().map(|row| row.name.as_str()).collect();
    for label in ["turn", "turn/searched", "turn/own", "turn/indexed", "wait", "bytes", "bytes/index"] {
        assert!(names.contains(&format!("scale/lookup/1000-extents/{label}").as_str()), "{label}: {names:?}");
    }
    assert!(report.rows.iter().all(|row| row.ours > 0.0), "{report:?}");
    let windows = windows::read(&noted).unwrap();
    assert_eq!(windows.len(), 10, "two sides of each that is timed: {windows:?}");
    // As many as a round has, whatever else its time went to.
    assert!(windows.iter().all(|window| (2.6e5..2.7e5).contains(&window.commands)), "{windows:?}");
}

#[test]
fn what_is_counted_does_its_ios_on_every_map() {
    for served in ["null", "1-extent", "10000-extents"] {
        for work in ["randread", "randwrite"] {
            let arguments = ["count-target", served, work, "--depth", "32", "--rounds", "20"];
            let output = Command::new(env!("CARGO_BIN_EXE_fastice-bench")).args(arguments).output().unwrap();
            assert!(output.status.success(), "{arguments:?}: {output:?}");
            let said = String::from_utf8(output.stdout).unwrap();
            let calls: u64 = said.split_whitespace().next().unwrap().parse().unwrap();
            // At least a write and a read of each round.
            assert!(calls >= 40 && said.contains(" other calls on "), "{said}");
        }
    }
}

#[test]
fn another_build_than_the_counted_one_guards_nothing_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("instructions.json");
    let mut guard = Command::new(env!("CARGO_BIN_EXE_fastice-bench"));
    let output = guard.args(["guard", "--accept", "--figures"]).arg(&path).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("--profile counted"), "{output:?}");
    assert!(!path.exists());
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_fastice-bench"))
        .args(["driver", "--depths", "0", "--report"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(!path.exists(), "nothing measured, nothing written");
}

#[test]
fn what_could_not_be_written_or_would_measure_nothing_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing/report.json");
    let there = directory.path().join("report.json");
    let refused = |arguments: &[&str], report: &Path, why: &str| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_fastice-bench"));
        let output = program.args(arguments).arg("--report").arg(report).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{arguments:?}: {said}");
        assert!(!there.exists(), "{arguments:?}");
    };
    for measuring in [&["target"][..], &["idle"], &["growth"], &["scale"], &["driver"]] {
        refused(measuring, &missing, "cannot be written");
    }
    refused(&["target", "--round-ms", "0"], &there, "--round-ms");
    refused(&["idle", "--idle-ms", "0"], &there, "--idle-ms");
    for reading in [&["show"][..], &["publish"], &["readme"]] {
        refused(reading, &there, "does not exist");
    }
}
