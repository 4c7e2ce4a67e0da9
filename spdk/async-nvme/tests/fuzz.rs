//! Goal: whatever a controller does, the driver keeps its promises (see `nvme_model::fuzz_model_actions`).
//! Method: random actions from proptest, and every file of the corpus.

use nvme_model::fuzz_model_actions;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_actions_break_no_promise(data in proptest::collection::vec(any::<u8>(), 2..300)) {
        fuzz_model_actions(&data);
    }
}

#[test]
fn the_corpus_breaks_no_promise() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus");
    let mut count = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        fuzz_model_actions(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count >= 5, "the corpus has {count} files");
}
