//! `fastice man`: the manual pages, made from the same definitions as the help.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory as _;

use super::exit::{Exit, Outcome};

/// Write the manual pages
///
/// For example: fastice man /usr/local/share/man/man1
#[derive(Clone, Debug, clap::Args)]
pub struct ManArgs {
    /// Directory for one page a command; without it, the main page is printed
    pub dir: Option<PathBuf>,
}

/// Writes or prints them.
///
/// # Errors
/// When the directory or standard output cannot be written.
pub fn run(args: &ManArgs) -> Outcome {
    let command = super::Cli::command();
    match &args.dir {
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            std::io::stdout().lock().write_all(&page)?;
        }
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            clap_mangen::generate_to(command, dir)
                .with_context(|| format!("cannot write manual pages to {}", dir.display()))?;
        }
    }
    Ok(Exit::Ok)
}
