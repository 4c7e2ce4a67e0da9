//! `fastice completions`: the completion script of a shell.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::exit::{Exit, Outcome};

/// Print the completion script of a shell
///
/// For bash: fastice completions bash > /etc/bash_completion.d/fastice
#[derive(Clone, Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

/// Prints it.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(args: &CompletionsArgs) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "fastice", &mut script);
    std::io::Write::write_all(&mut std::io::stdout().lock(), &script)?;
    Ok(Exit::Ok)
}
