//! What a controller was before fastice took it: written before the first step, removed after the last one back.
//!
//! ```text
//!   STATE/devices/lock                held while something is bound or given back
//!   STATE/devices/0000:01:00.0.json   { "format": "fastice-device", "version": 1, "binding": { ... } }
//! ```
//!
//! The record alone says how to go back, from whichever step a crash left the controller at. It is valid in the boot
//! that it names: the kernel forgets overrides and bindings with every boot.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_nvme::vfio::PciAddress;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::error::DeviceError;
use crate::durable::{self, Locked};

const FORMAT: &str = "fastice-device";
/// The version that this release writes and reads.
const VERSION: u64 = 1;
/// A record has a dozen short fields, and a line for each namespace.
const RECORD_LEN_MAX: u64 = 1 << 20;
/// How long another `fastice device` is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// What a controller was before it was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct Binding {
    /// Its PCI address.
    pub(in crate::cli) address: String,
    /// The driver that had it; `None` when none did.
    pub(in crate::cli) driver: Option<String>,
    /// Its `driver_override`; `None` when it had none.
    pub(in crate::cli) driver_override: Option<String>,
    /// PCI vendor and device, to tell another device in the same slot.
    pub(in crate::cli) vendor_id: u16,
    /// See `vendor_id`.
    pub(in crate::cli) device_id: u16,
    /// What the kernel's driver called it, and said of it.
    pub(in crate::cli) name: Option<String>,
    /// Its model.
    pub(in crate::cli) model: Option<String>,
    /// Its serial number.
    pub(in crate::cli) serial: Option<String>,
    /// Its firmware revision.
    pub(in crate::cli) firmware: Option<String>,
    /// Its namespaces.
    pub(in crate::cli) nsids: Vec<u32>,
    /// The boot in which it was taken (`/proc/sys/kernel/random/boot_id`).
    pub(in crate::cli) boot_id: String,
    /// When, in seconds since 1970.
    pub(in crate::cli) taken_at_unix_s: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<B> {
    format: String,
    version: u64,
    binding: B,
}

/// What every version of the document begins with.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u64,
}

/// The records of taken controllers, in the state directory.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Records {
    state_dir: PathBuf,
}

/// Held while controllers are taken or given back.
#[derive(Debug)]
pub(super) struct RecordsLock {
    _file: Locked,
}

impl Records {
    /// Those in the state directory at `path`. Nothing is made before something is written.
    pub(in crate::cli) fn at(path: impl Into<PathBuf>) -> Self {
        Self { state_dir: path.into() }
    }

    fn directory(&self) -> PathBuf {
        self.state_dir.join("devices")
    }

    /// The file of the record of one controller.
    pub(super) fn path_of(&self, address: PciAddress) -> PathBuf {
        self.directory().join(format!("{address}.json"))
    }

    /// Waits until no other process takes controllers or gives them back. Makes the directory.
    ///
    /// # Errors
    /// When that is not allowed, or the other one takes too long.
    pub(super) fn lock(&self) -> Result<RecordsLock, DeviceError> {
        let directory = self.directory();
        let made = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
            File::open(&self.state_dir)?.sync_all()
        };
        made().map_err(|source| DeviceError::io("make the directory", &directory, source))?;
        let path = directory.join("lock");
        let io = |source| DeviceError::io("lock", &path, source);
        let file = durable::open_lock(&path).map_err(io)?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(RecordsLock { _file: Locked(file) }),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    return Err(DeviceError::Busy { path });
                }
                Err(error) => return Err(io(error.into())),
            }
        }
    }

    /// The addresses of all records, also of those that cannot be read.
    ///
    /// # Errors
    /// When the directory cannot be read; one that is not there holds none.
    pub(in crate::cli) fn addresses(&self) -> Result<Vec<PciAddress>, DeviceError> {
        let directory = self.directory();
        let io = |source| DeviceError::io("read", &directory, source);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(io)?.file_name();
            let address: Option<PciAddress> =
                name.to_str().and_then(|name| name.strip_suffix(".json")?.parse().ok());
            found.extend(address);
        }
        found.sort();
        Ok(found)
    }

    /// The record of one controller; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read, or is no record of this controller.
    pub(in crate::cli) fn load(&self, address: PciAddress) -> Result<Option<Binding>, DeviceError> {
        let path = self.path_of(address);
        let io = |source| DeviceError::io("read", &path, source);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, RECORD_LEN_MAX), &mut bytes).map_err(io)?;
        let damaged = |why: String| DeviceError::Record { path: path.clone(), why };
        let binding = parse(&bytes).map_err(damaged)?;
        if binding.address != address.to_string() {
            return Err(damaged(format!("it is of {}", binding.address)));
        }
        Ok(Some(binding))
    }

    /// Writes a record, durably, in place of one of the same controller.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn store(
        &self,
        _under: &RecordsLock,
        address: PciAddress,
        binding: &Binding,
    ) -> Result<(), DeviceError> {
        let path = self.path_of(address);
        let document = Document { format: FORMAT.to_owned(), version: VERSION, binding };
        durable::replace(&path, |file| {
            serde_json::to_writer_pretty(&mut *file, &document)?;
            file.write_all(b"\n")
        })
        .map_err(|source| DeviceError::io("write", &path, source))
    }

    /// Removes a record, durably.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(super) fn remove(&self, _under: &RecordsLock, address: PciAddress) -> Result<(), DeviceError> {
        let path = self.path_of(address);
        durable::remove(&path).map_err(|source| DeviceError::io("remove", &path, source))
    }
}

/// Reads a document; `Err` with what is wrong with it. What is in it is written to sysfs, so names must be names.
fn parse(bytes: &[u8]) -> Result<Binding, String> {
    let header: Header = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if header.format != FORMAT {
        return Err(format!("the format is not {FORMAT}"));
    }
    if header.version != VERSION {
        return Err(format!("its version is {}, this release knows {VERSION}", header.version));
    }
    let document: Document<Binding> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let binding = document.binding;
    for name in [&binding.driver, &binding.driver_override].into_iter().flatten() {
        if !is_driver_name(name) {
            return Err(format!("{name:?} is no name of a driver"));
        }
    }
    Ok(binding)
}

/// Whether `name` may be one of a PCI driver: it becomes part of a path below `/sys`.
pub(super) fn is_driver_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (1..=64).contains(&name.len()) && name.bytes().all(fits)
}

/// The id of the running boot; empty when `/proc` does not tell.
pub(in crate::cli) fn boot_id(host: &super::host::Host) -> String {
    host.text(Path::new("proc/sys/kernel/random/boot_id")).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::cli::device) fn binding(address: &str) -> Binding {
        Binding {
            address: address.to_owned(),
            driver: Some("nvme".to_owned()),
            driver_override: None,
            vendor_id: 0x1B36,
            device_id: 0x0010,
            name: Some("nvme0".to_owned()),
            model: Some("QEMU NVMe Ctrl".to_owned()),
            serial: Some("S1".to_owned()),
            firmware: Some("7.2".to_owned()),
            nsids: vec![1],
            boot_id: "boot".to_owned(),
            taken_at_unix_s: 1,
        }
    }

    #[test]
    fn a_record_survives_and_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = Records::at(dir.path().join("state"));
        let address: PciAddress = "0000:10:00.0".parse().expect("an address");
        assert!(matches!(records.load(address), Ok(None)));
        assert!(!dir.path().join("state").exists(), "looking makes nothing");
        let lock = records.lock().expect("a lock");
        let written = binding("0000:10:00.0");
        records.store(&lock, address, &written).expect("written");
        assert_eq!(records.load(address).expect("read"), Some(written));
        assert_eq!(records.addresses().expect("read"), [address]);
        records.remove(&lock, address).expect("removed");
        records.remove(&lock, address).expect("as good as removed");
        assert!(matches!(records.load(address), Ok(None)));
    }

    #[test]
    fn damaged_foreign_and_later_records_are_told_apart_from_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = Records::at(dir.path());
        let address: PciAddress = "0000:10:00.0".parse().expect("an address");
        drop(records.lock().expect("a lock"));
        type Change = fn(&mut serde_json::Value);
        let with = |change: Change| {
            let document =
                Document { format: FORMAT.into(), version: VERSION, binding: binding("0000:10:00.0") };
            let mut value = serde_json::to_value(document).expect("serializable");
            change(&mut value);
            fs::write(records.path_of(address), value.to_string()).expect("a file");
            records.load(address)
        };
        assert!(with(|_| ()).expect("read").is_some());
        let broken: [(Change, &str); 4] = [
            (|value| value["version"] = 2.into(), "its version is 2"),
            (|value| value["format"] = "x".into(), "the format is not"),
            (|value| value["binding"]["driver"] = "../../x".into(), "no name of a driver"),
            (|value| value["binding"]["address"] = "0000:11:00.0".into(), "it is of 0000:11:00.0"),
        ];
        for (change, expected) in broken {
            let text = with(change).expect_err("damaged").to_string();
            assert!(text.contains(expected), "{text}");
        }
        assert_eq!(records.addresses().expect("read"), [address], "still to be seen");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
