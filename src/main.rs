//! The `fastice` binary: everything is in the library, see [`fastice::cli`].

fn main() -> std::process::ExitCode {
    fastice::cli::main()
}
