//! Commands to sessions of every kind.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fastice::fabrics::fuzz_commands(data));
