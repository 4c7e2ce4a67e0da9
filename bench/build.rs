//! Tells the program how it was built: counted instructions belong to a compiler and its options (`src/guard/figures.rs`).

use std::env::var;
use std::path::PathBuf;
use std::process::Command;

/// The profile's directory, for `PROFILE` tells only whether it is one for debugging: `.../PROFILE/build/PACKAGE-HASH/out`.
fn profile() -> Option<String> {
    let out = PathBuf::from(var("OUT_DIR").ok()?);
    Some(out.ancestors().nth(3)?.file_name()?.to_string_lossy().into_owned())
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let rustc = var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let version = Command::new(rustc).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let of = |name: &str| var(name).unwrap_or_default();
    for (name, value) in [
        ("RUSTC", version.unwrap_or_default()),
        ("TARGET", of("TARGET")),
        ("PROFILE", profile().unwrap_or_default()),
        // Flags are separated by a character that no flag has.
        ("RUSTFLAGS", of("CARGO_ENCODED_RUSTFLAGS").replace('\u{1f}', " ")),
    ] {
        println!("cargo:rustc-env=FASTICE_BENCH_{name}={value}");
    }
}
