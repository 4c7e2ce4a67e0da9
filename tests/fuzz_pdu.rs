//! Replays the corpus of the PDU decoder's fuzz target.

use fastice::tcp::fuzz::fuzz_pdu;
use std::fs;
use std::path::Path;

#[test]
fn the_pdu_corpus_replays_without_a_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/pdu");
    let mut files = 0;
    for entry in fs::read_dir(&corpus).expect("the corpus is part of the repository") {
        let path = entry.expect("a directory entry").path();
        fuzz_pdu(&fs::read(&path).expect("a corpus file"));
        files += 1;
    }
    assert!(files >= 20, "only {files} files in {}", corpus.display());
}
