//! Requests to the page of metrics.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fastice::control::fuzz_metrics_request(data));
