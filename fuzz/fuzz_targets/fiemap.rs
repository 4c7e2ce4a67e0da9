//! What FIEMAP answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fastice::extent::fuzz::fuzz_fiemap(data));
