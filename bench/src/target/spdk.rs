//! SPDK's target as a peer, where it is installed: one core, polling, and memory without huge pages, so that it needs no
//! preparation. It is told to serve the same kind of namespace, and asked for its own account of how long it was busy.
//!
//! What it does not do: build it, or fetch it.

use std::env;
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::daemon::{Daemon, PATIENCE, Place, on_path, version_of};
use super::work::BLOCK_LEN;
use super::{LEN, NQN, Served};

/// What rows call it, without its version.
pub(super) const NAME: &str = "SPDK's nvmf_tgt";
/// Where the program is, when it is not found by `PATH`.
const PROGRAM: &str = "FASTICE_BENCH_NVMF_TGT";

/// A program that was found.
#[derive(Clone, Debug)]
pub(super) struct Spdk {
    program: PathBuf,
    pub(super) name: String,
}

impl Spdk {
    /// Finds it; the error says why not.
    pub(super) fn find() -> Result<Self> {
        let program = match env::var_os(PROGRAM) {
            Some(program) => PathBuf::from(program),
            None => {
                on_path("nvmf_tgt").with_context(|| format!("it is not on PATH, nor named by {PROGRAM}"))?
            }
        };
        let name = format!("{NAME}, {}", version_of(&program)?);
        Ok(Self { program, name })
    }

    /// Starts it on the first processor; this thread then has the last.
    pub(super) fn start(&self, served: Served) -> Result<SpdkProcess> {
        let place = Place::new()?;
        let (config, socket) = (place.path("config.json"), place.path("rpc.sock"));
        fs::write(&config, serde_json::to_vec(&configuration(served, place.address)?)?)?;
        let mut command = Command::new(&self.program);
        command.args(["-m", &format!("{:#x}", 1_u64 << place.processors[0])]);
        command.args(["--no-huge", "-s", "1024", "--no-pci", "-r"]).arg(socket).arg("--json").arg(config);
        Ok(SpdkProcess { daemon: place.start(&mut command)? })
    }
}

fn configuration(served: Served, address: SocketAddr) -> Result<Value> {
    let blocks = LEN / u64::from(BLOCK_LEN);
    let method = match served {
        Served::Null => "bdev_null_create",
        Served::Memory => "bdev_malloc_create",
        _ => bail!("SPDK has no such namespace"),
    };
    let space =
        json!({"method": method, "params": {"name": "Disk0", "num_blocks": blocks, "block_size": BLOCK_LEN}});
    let (traddr, trsvcid) = (address.ip().to_string(), address.port().to_string());
    let address = json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": traddr, "trsvcid": trsvcid});
    let nvmf = json!([
        {"method": "nvmf_create_transport", "params": {"trtype": "TCP", "max_queue_depth": 256}},
        {"method": "nvmf_create_subsystem", "params": {"nqn": NQN, "allow_any_host": true, "serial_number": "BENCH"}},
        {"method": "nvmf_subsystem_add_ns", "params": {"nqn": NQN, "namespace": {"bdev_name": "Disk0", "nsid": 1}}},
        {"method": "nvmf_subsystem_add_listener", "params": {"nqn": NQN, "listen_address": address}},
    ]);
    Ok(
        json!({"subsystems": [{"subsystem": "bdev", "config": [space]}, {"subsystem": "nvmf", "config": nvmf}]}),
    )
}

/// One that runs as long as this lives.
#[derive(Debug)]
pub(super) struct SpdkProcess {
    pub(super) daemon: Daemon,
}

impl SpdkProcess {
    /// Microseconds for which its threads were busy so far, by their own account (`thread_get_stats`).
    pub(super) fn busy_us(&self) -> Result<f64> {
        let stats = ask(&self.daemon.path("rpc.sock"), "thread_get_stats")?;
        let rate = stats.get("tick_rate").and_then(Value::as_f64).context("no tick rate")?;
        let threads = stats.get("threads").and_then(Value::as_array).context("no threads")?;
        let busy: f64 = threads.iter().filter_map(|thread| thread.get("busy")?.as_f64()).sum();
        Ok(busy / rate * 1e6)
    }
}

/// One call of JSON-RPC 2.0 without parameters; its result.
fn ask(socket: &Path, method: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).context("its RPC socket")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&serde_json::to_vec(&json!({"jsonrpc": "2.0", "id": 1, "method": method}))?)?;
    let (mut text, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let len = match stream.read(&mut piece) {
            // A signal, which is not for here.
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read?,
        };
        ensure!(len > 0, "{NAME} does not answer {method}");
        text.extend_from_slice(piece.get(..len).unwrap_or_default());
        // The answer has no end mark: it is whole when it can be read.
        if let Ok(answer) = serde_json::from_slice::<Value>(&text) {
            let result = answer.get("result").cloned();
            return result.with_context(|| format!("{NAME} refuses {method}: {answer}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_of_the_namespace_that_ours_has() {
        let address = "127.0.0.1:4420".parse().unwrap();
        let told = configuration(Served::Memory, address).unwrap();
        let space = &told["subsystems"][0]["config"][0];
        assert_eq!(space["method"], "bdev_malloc_create");
        let len =
            space["params"]["num_blocks"].as_u64().unwrap() * space["params"]["block_size"].as_u64().unwrap();
        assert_eq!(len, LEN);
        let listener = &told["subsystems"][1]["config"][3]["params"]["listen_address"];
        assert_eq!((&listener["traddr"], &listener["trsvcid"]), (&json!("127.0.0.1"), &json!("4420")));
        assert!(configuration(Served::BareReads, address).is_err());
    }
}
