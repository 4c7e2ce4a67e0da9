//! A target in this process, on loopback, and a host to connect to it.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use fastice::config::Config;
use fastice::control::{self, Running};
use fastice::extent::NoProgress;
use fastice::initiator::controller::{ConnectOptions, Controller, Host};

/// The subsystem that [`memory_target`] serves.
pub(crate) const NQN: &str = "nqn.2026-11.io.fastice:test";

/// A started target and its state directory.
pub(crate) struct TestTarget {
    /// The target.
    pub(crate) running: Running,
    _state: tempfile::TempDir,
}

impl TestTarget {
    /// Starts a target with `body` (everything but the state directory) as its configuration.
    pub(crate) fn start(body: &str) -> Self {
        let state = tempfile::tempdir().expect("a temporary directory");
        let config = config(state.path(), body);
        let running = control::start(config, &mut NoProgress).expect("the target starts");
        Self { running, _state: state }
    }

    /// Its first address.
    pub(crate) fn address(&self) -> SocketAddr {
        self.running.addresses()[0]
    }
}

/// A configuration with a state directory of its own.
pub(crate) fn config(state: &Path, body: &str) -> Config {
    let text = format!("state_dir = {:?}\n{body}", state.display().to_string());
    Config::parse(&text, "test.toml").unwrap_or_else(|error| panic!("{error}"))
}

/// 64 MiB of memory behind two cores, open to every host.
pub(crate) fn memory_config() -> String {
    format!(
        r#"
        buffer_memory = "32MiB"
        [[listener]]
        address = "127.0.0.1:0"
        [[subsystem]]
        nqn = "{NQN}"
        allow_any_host = true
        [[subsystem.namespace]]
        nsid = 1
        memory = "64MiB"
        "#
    )
}

/// The target of [`memory_config`].
pub(crate) fn memory_target() -> TestTarget {
    TestTarget::start(&memory_config())
}

/// Options for a host that connects to `target`.
pub(crate) fn options(target: &TestTarget) -> ConnectOptions {
    ConnectOptions::new(target.address(), NQN, Host::random())
}

/// A connected controller.
pub(crate) fn connect(target: &TestTarget) -> Controller {
    Controller::connect(&options(target)).expect("the host connects")
}

/// Waits until `condition` holds; panics when it does not within ten seconds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
