//! What commands print on standard output: lines and tables for people, one JSON document for scripts.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

/// The columns to draw for when the output is no terminal.
const COLUMNS_DEFAULT: usize = 100;
const COLUMNS_MIN: usize = 40;

/// `--json`, for the commands whose output a script would read.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct JsonFlag {
    /// Print one JSON document instead of text; errors are JSON too, on standard error
    #[arg(long)]
    pub json: bool,
}

/// Standard output, locked and buffered as a whole.
///
/// When nobody reads it any more (`fastice pin FILE | head -1`), the rest is not told, and that is no error: what a command
/// does is done all the same, to its end.
pub struct Out {
    stdout: io::BufWriter<io::StdoutLock<'static>>,
    /// Nobody reads it any more.
    unread: bool,
    columns: usize,
    colour: bool,
}

impl Out {
    /// Standard output.
    #[must_use]
    pub fn stdout() -> Self {
        let stdout = io::stdout();
        let terminal = stdout.is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none();
        Self { stdout: io::BufWriter::new(stdout.lock()), unread: false, columns: columns(terminal), colour }
    }

    /// How many columns there are to draw on.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Whether colours are wanted: on a terminal, unless `NO_COLOR` is set.
    #[must_use]
    pub fn colour(&self) -> bool {
        self.colour
    }

    /// One line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn line(&mut self, text: impl AsRef<str>) -> io::Result<()> {
        self.tell(|stdout| writeln!(stdout, "{}", text.as_ref()))
    }

    /// A table: columns as wide as their longest cell, numbers (columns whose name ends in a blank) to the right.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn table<const N: usize>(&mut self, head: [&str; N], rows: &[[String; N]]) -> io::Result<()> {
        for line in table(head, rows) {
            self.line(line)?;
        }
        Ok(())
    }

    /// One JSON document, indented, with a newline at its end.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        self.tell(|stdout| {
            serde_json::to_writer_pretty(&mut *stdout, value)?;
            writeln!(stdout)
        })
    }

    /// Hands everything to the kernel; the destructor would not tell of errors.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.tell(Write::flush)
    }

    fn tell(
        &mut self,
        write: impl FnOnce(&mut io::BufWriter<io::StdoutLock<'static>>) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.unread {
            return Ok(());
        }
        match write(&mut self.stdout) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.unread = true;
                Ok(())
            }
            result => result,
        }
    }
}

/// A moment as logs have it.
pub(super) fn time_of(unix_ms: u64) -> String {
    let at = i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    at.map_or_else(|| unix_ms.to_string(), |at| format!("{at:.3}"))
}

/// The lines of a table; see [`Out::table`].
fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> Vec<String> {
    let numeric = head.map(|name| name.ends_with(' '));
    let head = head.map(|name| name.trim_end().to_owned());
    let mut widths = head.each_ref().map(|name| name.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    std::iter::once(&head)
        .chain(rows)
        .map(|row| {
            let mut line = String::new();
            for ((cell, width), right) in row.iter().zip(widths).zip(numeric) {
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
                let (before, after) = if right { (pad.as_str(), "") } else { ("", pad.as_str()) };
                line.push_str(before);
                line.push_str(cell);
                line.push_str(after);
                line.push_str("  ");
            }
            line.trim_end().to_owned()
        })
        .collect()
}

/// The width of the terminal; else `COLUMNS`; else a default.
fn columns(terminal: bool) -> usize {
    let asked = || terminal.then(|| rustix::termios::tcgetwinsize(io::stdout()).ok()).flatten();
    let told = || std::env::var("COLUMNS").ok().and_then(|text| text.parse::<usize>().ok());
    let width = asked().map(|size| usize::from(size.ws_col)).filter(|&width| width > 0).or_else(told);
    width.unwrap_or(COLUMNS_DEFAULT).clamp(COLUMNS_MIN, 400)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_words_left_and_numbers_right() {
        let rows = [["a".to_owned(), "5".to_owned()], ["bcd".to_owned(), "1234".to_owned()]];
        assert_eq!(table(["name", "n "], &rows), ["name     n", "a        5", "bcd   1234"]);
    }
}
