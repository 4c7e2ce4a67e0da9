//! Records of pins.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fastice::extent::fuzz::fuzz_stored_map(data));
