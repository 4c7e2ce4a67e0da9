//! A target in this process, on loopback, with a namespace in memory (1) and one that stores nothing (2).

use std::net::SocketAddr;

use fastice::config::Config;
use fastice::control::{self, Running};
use fastice::extent::NoProgress;

/// Its subsystem.
pub(crate) const NQN: &str = "nqn.2026-11.io.fastice:fio-test";
/// The size of both namespaces in bytes.
pub(crate) const LEN: u64 = 32 << 20;

/// A started target, and its state directory.
pub(crate) struct TestTarget {
    pub(crate) running: Running,
    _state: tempfile::TempDir,
}

impl TestTarget {
    pub(crate) fn start() -> Self {
        let state = tempfile::tempdir().expect("a temporary directory");
        let text = format!(
            r#"
            state_dir = {:?}
            buffer_memory = "32MiB"
            [[listener]]
            address = "127.0.0.1:0"
            [[subsystem]]
            nqn = "{NQN}"
            allow_any_host = true
            [[subsystem.namespace]]
            nsid = 1
            memory = "32MiB"
            [[subsystem.namespace]]
            nsid = 2
            null = "32MiB"
            "#,
            state.path().display().to_string()
        );
        let config = Config::parse(&text, "test.toml").unwrap_or_else(|error| panic!("{error}"));
        let running = control::start(config, &mut NoProgress).expect("the target starts");
        Self { running, _state: state }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.running.addresses()[0]
    }
}
