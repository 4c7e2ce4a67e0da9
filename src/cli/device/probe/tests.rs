//! Goal: a probe finds what a controller is, reads, and writes nothing.
//! Method: the model over an image in memory or in a file.

use std::io::Write as _;

use super::*;

fn args(model: PathBuf, seconds: u64) -> ProbeArgs {
    ProbeArgs {
        address: None,
        vfio_user: None,
        model: Some(model),
        no_iommu: false,
        seconds,
        read_size: ByteLen(4096),
        depth: 8,
        json: JsonFlag::default(),
    }
}

fn image(bytes: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    let content: Vec<u8> = (0..bytes).map(|at| u8::try_from(at % 251).expect("small")).collect();
    file.write_all(&content).expect("written");
    file
}

fn probed(args: &ProbeArgs) -> Result<ProbeReport, Failure> {
    probe(args, reach::reach(args)?)
}

#[test]
fn the_model_is_identified_and_read_and_stays_as_it_was() {
    let file = image(1 << 20);
    let before = std::fs::read(file.path()).expect("a file");
    let report = probed(&args(file.path().to_owned(), 1)).expect("probed");
    let value = serde_json::to_value(&report).expect("serializable");
    assert_eq!((&value["access"], &value["missing"]), (&"model".into(), &serde_json::json!([])));
    assert_eq!(value["controller"]["serial"], "MODEL");
    assert!(value["controller"]["version"].as_str().expect("a text").starts_with("1."), "{value}");
    assert_eq!(value["namespaces"][0]["size_bytes"], 1 << 20);
    assert_eq!(value["namespaces"][0]["logical_block_bytes"], 4096);
    assert_eq!(value["namespaces"][0]["read_only"], true);
    let reads = value["namespaces"][0]["reads"].as_array().expect("two tests");
    let depths: Vec<_> = reads.iter().map(|read| read["depth"].as_u64().expect("a number")).collect();
    assert_eq!(depths, [1, 8]);
    for read in reads {
        assert!(read["reads"]["commands"].as_u64().expect("a number") > 0, "{read}");
        assert!(read["reads"]["latency"]["p50_ns"].as_u64().expect("a number") > 0, "{read}");
    }
    assert!(value["smart"]["available_spare_percent"].is_u64() && value["firmware"]["slots"][0].is_object());
    assert_eq!(std::fs::read(file.path()).expect("a file"), before);
}

#[test]
fn a_probe_without_reads_takes_no_buffers() {
    let file = image(3 << 9);
    let report = probed(&args(file.path().to_owned(), 0)).expect("probed");
    assert_eq!((report.memory, report.namespaces.len()), (None, 1));
    let value = serde_json::to_value(&report.namespaces[0]).expect("serializable");
    assert_eq!((&value["logical_block_bytes"], &value["reads"]), (&512.into(), &serde_json::json!([])));
}

#[test]
fn what_cannot_be_a_namespace_is_refused() {
    let missing = probed(&args(PathBuf::from("/nonexistent"), 0)).expect_err("no file");
    assert_eq!((missing.exit, missing.remedy.is_some()), (Exit::Failed, true));
    let directory = probed(&args(PathBuf::from("/proc"), 0)).expect_err("a directory");
    assert!(directory.error.to_string().contains("/proc"), "{directory}");
    let empty = image(0);
    let refused = probed(&args(empty.path().to_owned(), 0)).expect_err("no blocks");
    assert_eq!(refused.exit, Exit::Refused);
}

#[test]
fn a_controller_in_another_process_is_probed_by_its_socket() {
    use nvme_model::vfio_user::{Server, ServerOptions};
    use nvme_model::{ControllerOptions, NamespaceOptions, Subsystem};

    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("nvme.sock");
    let by_socket = || ProbeArgs { vfio_user: Some(socket.clone()), model: None, ..args(PathBuf::new(), 1) };
    let nobody = probed(&by_socket()).expect_err("nobody listens");
    assert_eq!((nobody.exit, nobody.remedy.is_some()), (Exit::Unreachable, true));

    let subsystem = Subsystem::new("ELSEWHERE");
    subsystem.add_namespace(NamespaceOptions::memory(3, 9, 4096)).expect("a namespace");
    let model = subsystem.controller(ControllerOptions::default());
    let server = Server::bind(&socket, model, ServerOptions::default()).expect("a server");
    let _thread = server.spawn().expect("a thread");
    let value = serde_json::to_value(probed(&by_socket()).expect("probed")).expect("serializable");
    assert_eq!(
        (&value["access"], &value["controller"]["serial"]),
        (&"vfio-user".into(), &"ELSEWHERE".into())
    );
    assert_eq!(value["namespaces"][0]["nsid"], 3);
    let reads = value["namespaces"][0]["reads"].as_array().expect("tests");
    assert!(reads.iter().all(|read| read["reads"]["commands"].as_u64() > Some(0)), "{reads:?}");
}

#[test]
fn a_namespace_smaller_than_a_read_is_not_read() {
    let file = image(4096);
    let wanted = ProbeArgs { read_size: ByteLen(8192), ..args(file.path().to_owned(), 1) };
    assert!(probed(&wanted).expect("probed").namespaces[0].reads.is_empty());
}

#[test]
fn a_controller_that_is_not_there_names_the_list() {
    let nowhere = ProbeArgs {
        address: Some("fffe:1f:1f.7".parse().expect("an address")),
        model: None,
        ..args(PathBuf::new(), 0)
    };
    let failure = reach::reach(&nowhere).expect_err("nothing there");
    assert_eq!(failure.exit, Exit::Refused);
    assert!(failure.remedy.expect("a remedy").contains("device list"));
}
