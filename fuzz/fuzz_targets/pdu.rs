//! PDU decoding.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fastice::tcp::fuzz_pdu(data));
