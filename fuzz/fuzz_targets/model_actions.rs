//! What a broken NVMe controller does to the driver.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nvme_model::fuzz_model_actions(data));
