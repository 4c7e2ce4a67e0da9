//! The state machine of a connection, on a real core; needs io_uring.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fastice::tcp::fuzz_connection(data));
