//! Replays the corpus of the command fuzzer, and goes a little beyond it.

use std::path::Path;

use super::super::fuzz_commands;

#[test]
fn the_corpus_neither_panics_nor_breaks_a_promise() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/fabrics_command");
    let mut count = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        fuzz_commands(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count >= 8, "{count} files in {}", dir.display());
}

#[test]
fn seeded_noise_neither_panics_nor_breaks_a_promise() {
    for seed in 1..400u64 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let noise: Vec<u8> = (0..2048)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            })
            .collect();
        fuzz_commands(&noise);
    }
}
