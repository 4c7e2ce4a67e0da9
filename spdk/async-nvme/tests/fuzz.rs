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

/// Goal: all faults of the model, by seed: the same ones in each run.
#[test]
fn no_seed_of_faults_breaks_a_promise() {
    for seed in 0u64..150 {
        let mut state = seed;
        let mut byte = || {
            // splitmix64.
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            (z ^ z >> 31).to_le_bytes()[0]
        };
        let mut data = vec![byte(), byte()];
        for _ in 0..60 {
            // A fault, operations, and some time.
            data.extend([9 | byte() & 16, byte(), byte() & 7, byte(), byte(), byte(), 7, byte() & 63]);
        }
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
