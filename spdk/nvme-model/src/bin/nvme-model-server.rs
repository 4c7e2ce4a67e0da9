//! An NVMe controller in software behind a UNIX socket, for drivers in other processes (vfio-user).
//!
//! `nvme-model-server --socket /run/nvme0.sock --image disk.img --block-size 4096`
#![expect(clippy::print_stdout, reason = "a program that says when it is ready")]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use nvme_model::vfio_user::{Server, ServerOptions};
use nvme_model::{Backing, ControllerOptions, NamespaceOptions, Subsystem};

/// Offers one NVMe controller with one namespace over vfio-user.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where to listen.
    #[arg(long)]
    socket: PathBuf,
    /// A file or block device that holds the blocks. Without one they are in memory and lost at the end.
    #[arg(long)]
    image: Option<PathBuf>,
    /// The namespace's size in bytes, with K, M, G or T for powers of 1024. With an image its own size by default.
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// The size of a block in bytes.
    #[arg(long, default_value_t = 4096)]
    block_size: u32,
    /// The serial number.
    #[arg(long, default_value = "FASTICEMODEL")]
    serial: String,
    /// The most I/O queue pairs.
    #[arg(long, default_value_t = 64)]
    queues: u16,
    /// The most entries of a queue.
    #[arg(long, default_value_t = 1024)]
    entries: u16,
    /// Doorbells by messages instead of shared memory: slower, but an idle server sleeps.
    #[arg(long)]
    message_doorbells: bool,
}

fn main() -> ExitCode {
    match serve(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nvme-model-server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let subsystem = Subsystem::new(&arguments.serial);
    subsystem.add_namespace(namespace(arguments)?)?;
    let model = subsystem.controller(ControllerOptions {
        name: arguments.socket.display().to_string(),
        mqes_z: arguments.entries.max(2) - 1,
        io_queues_max: arguments.queues.max(1),
        ..ControllerOptions::default()
    });
    let options =
        ServerOptions { mapped_doorbells: !arguments.message_doorbells, ..ServerOptions::default() };
    let server = Server::bind(&arguments.socket, model, options)
        .map_err(|error| format!("listening at {}: {error}", arguments.socket.display()))?;
    println!("listening at {}", arguments.socket.display());
    io::stdout().flush()?;
    server.run(&AtomicBool::new(false))?;
    Ok(())
}

fn namespace(arguments: &Arguments) -> Result<NamespaceOptions, Box<dyn std::error::Error>> {
    if !arguments.block_size.is_power_of_two() {
        return Err(format!("a block size of {} bytes is no power of two", arguments.block_size).into());
    }
    let shift = u8::try_from(arguments.block_size.trailing_zeros())?;
    let Some(path) = &arguments.image else {
        let size = arguments.size.ok_or("neither an image nor a size is given: add --image or --size")?;
        return Ok(NamespaceOptions::memory(1, shift, size >> shift));
    };
    let (file, size) = open(path).map_err(|error| format!("opening {}: {error}", path.display()))?;
    let wanted = arguments.size.unwrap_or(size);
    if wanted > size {
        return Err(format!("{} has {size} bytes, not {wanted}", path.display()).into());
    }
    let options = NamespaceOptions::memory(1, shift, wanted >> shift);
    Ok(NamespaceOptions { backing: Backing::File(file), ..options })
}

/// Opens a file or block device, with its size in bytes.
fn open(path: &PathBuf) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    // Block devices have no length of their own, but an end.
    let size = file.seek(SeekFrom::End(0))?;
    Ok((file, size))
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        unit => return Err(format!("{unit} is no unit: use K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|error| format!("{error}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert!(parse_size("M").is_err() && parse_size("1X").is_err() && parse_size("99999999T").is_err());
    }
}
