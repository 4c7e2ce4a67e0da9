//! Goal: the job files for users (`bench/fio/`) say what they do, and those of both hosts do the same.
//! Method: their text, compared.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What is said of the host, and not of the work.
const REACH: [&str; 7] =
    ["ioengine=", "direct=", "filename=", "include ", "hdr_digest=", "data_digest=", "hostnqn="];

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fio").join(name)
}

fn jobs(host: &str) -> BTreeMap<String, String> {
    let entries = fs::read_dir(directory(host)).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.extension().is_some_and(|extension| extension == "fio"));
    files
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect()
}

/// The options that make the work.
fn work(text: &str) -> Vec<&str> {
    let is_work = |line: &&str| {
        !line.is_empty() && !line.starts_with('#') && !REACH.iter().any(|reach| line.starts_with(reach))
    };
    text.lines().map(str::trim).filter(is_work).collect()
}

#[test]
fn both_hosts_do_the_same_work() {
    let (kernel, engine) = (jobs("kernel"), jobs("engine"));
    assert!(kernel.len() >= 7, "{:?}", kernel.keys());
    assert_eq!(kernel.keys().collect::<Vec<_>>(), engine.keys().collect::<Vec<_>>());
    for (name, text) in &kernel {
        assert_eq!(work(text), work(&engine[name]), "{name}");
        assert!(text.contains("filename=${DEVICE}"), "{name}: no device of somebody's is written down");
    }
}

#[test]
fn what_destroys_data_says_so_in_its_first_line() {
    for host in ["kernel", "engine"] {
        for (name, text) in jobs(host) {
            let writes = work(&text).iter().any(|line| {
                line.starts_with("rw=") && line.contains('w') && *line != "rw=read" && *line != "rw=randread"
            });
            let says = text.lines().next().unwrap().contains("DESTROYS DATA");
            assert_eq!(writes, says, "{host}/{name}");
            assert!(text.contains("How to read it:"), "{host}/{name}");
        }
    }
}
