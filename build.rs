//! How the programs are linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Segments begin at pages of the file, so that an address of code is also where it is in the file: perf takes the one for the
    // other when it attaches to the probes of `src/probes.rs`.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,separate-code");
}
