//! What a broken controller can do to the driver; see `nvme_model::fuzz_model_actions`.
//!
//! Run: `cargo +nightly fuzz run --fuzz-dir spdk/nvme-model/fuzz model_actions spdk/async-nvme/tests/corpus`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nvme_model::fuzz_model_actions(data));
