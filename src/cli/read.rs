//! `fastice read`: the current bytes of a file that is being served.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::StateDirArg;
use super::exit::{Exit, Failure, Outcome};
use super::files::{Stages, required_record};
use crate::extent::{ExtentError, ReadOutcome, read_left, read_pinned};

/// Read a pinned file as hosts see it: by its frozen map, from the disk
///
/// A served file cannot be opened, and what the page cache had of it would be old. This reads what lies on the disk
/// now. Hosts go on writing meanwhile: it is no snapshot of a moment.
#[derive(Clone, Debug, Args)]
pub struct ReadArgs {
    /// The file
    pub file: PathBuf,
    /// Where to write it [default: standard output]; must not exist
    #[arg(long, short, value_name = "PATH")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub state: StateDirArg,
}

/// Reads it.
///
/// # Errors
/// When it is not pinned, cannot be read, or was let go meanwhile.
pub fn run(args: &ReadArgs) -> Outcome {
    let (state, pin) = required_record(&args.state.state_dir, &args.file)?;
    let is_held = state.holder(&pin.identity.key())?.is_some();
    let mut output = Output::create(args.output.as_deref())?;
    let read = |output: &mut Output| -> Result<ReadOutcome, Failure> {
        if !is_held {
            // Nobody denies it, and nobody writes behind the filesystem's back.
            read_left(&pin, &args.file, output)?;
            return Ok(ReadOutcome::Whole);
        }
        let mut stages = Stages::of(&args.file, args.output.is_none());
        Ok(read_pinned(&pin, &args.file, &state, output, &mut stages)?)
    };
    let outcome = match read(&mut output) {
        Ok(outcome) => outcome,
        Err(failure) => {
            output.leave_nothing_empty();
            return Err(failure);
        }
    };
    output.finish()?;
    match outcome {
        ReadOutcome::Whole => Ok(Exit::Ok),
        ReadOutcome::LetGo => {
            let error = anyhow::anyhow!("the pin of {} was let go while it was read", args.file.display());
            let remedy = "what was written may be of another file: throw it away, look at `fastice pins`, and try again";
            Err(Failure::new(Exit::Differs, error).with_remedy(remedy))
        }
    }
}

/// Where the bytes go.
enum Output {
    Stdout(io::Stdout),
    File(File, PathBuf),
}

impl Output {
    fn create(path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else { return Ok(Self::Stdout(io::stdout())) };
        // A copy of what may be a secret: the owner may give it to others.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file =
            file.map_err(|source| ExtentError::Io { action: "create", path: path.to_owned(), source })?;
        Ok(Self::File(file, path.to_owned()))
    }

    /// A file that was made for what did not come goes again, so that the next try is not refused for it.
    fn leave_nothing_empty(self) {
        if let Self::File(file, path) = self
            && file.metadata().is_ok_and(|meta| meta.len() == 0)
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove an empty file");
        }
    }

    fn finish(self) -> Result<(), Failure> {
        let (result, path) = match self {
            Self::Stdout(mut stdout) => (stdout.flush(), PathBuf::from("standard output")),
            Self::File(file, path) => (file.sync_all(), path),
        };
        result.map_err(|source| ExtentError::Io { action: "write", path, source }.into())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout(stdout) => stdout.write(bytes),
            Self::File(file, _) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout(stdout) => stdout.flush(),
            Self::File(file, _) => file.flush(),
        }
    }
}
