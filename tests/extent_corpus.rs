//! Replays the fuzz corpora of the extent module, each file as it is and in many mutated forms.

use std::fs;
use std::path::Path;

use fastice::extent::fuzz::{fuzz_fiemap, fuzz_stored_map};

const MUTATIONS: u64 = 400;

fn replay(corpus: &str, target: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(corpus);
    let mut count = 0;
    for entry in fs::read_dir(&directory).unwrap() {
        let data = fs::read(entry.unwrap().path()).unwrap();
        target(&data);
        for seed in 0..MUTATIONS {
            target(&mutate(&data, seed));
        }
        count += 1;
    }
    assert!(count >= 4, "the corpus {corpus} holds {count} files");
}

/// Changes up to four bytes, and cuts the end off one in four.
fn mutate(data: &[u8], seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut data = data.to_vec();
    if data.is_empty() {
        return data;
    }
    for _ in 0..=next() % 4 {
        let at = usize::try_from(next()).unwrap() % data.len();
        data[at] = match next() % 4 {
            0 => 0,
            1 => 0xFF,
            2 => data[at] ^ (1 << (next() % 8)),
            _ => next().to_le_bytes()[3],
        };
    }
    if next() % 4 == 0 {
        data.truncate(usize::try_from(next()).unwrap() % data.len());
    }
    data
}

#[test]
fn fiemap_answers() {
    replay("fiemap", fuzz_fiemap);
}

#[test]
fn stored_maps() {
    replay("stored_map", fuzz_stored_map);
}
