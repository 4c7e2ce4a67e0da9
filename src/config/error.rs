//! Errors of a configuration file, each with its place in the text.

use std::fmt;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use super::CONFIG_BYTES_MAX;

/// The longest part of a source line that is shown.
const SHOWN_CHARS_MAX: usize = 100;

/// Why a configuration was refused: every problem that was found, in the order of the text.
#[derive(Debug)]
pub struct ConfigError {
    name: String,
    problems: Vec<Problem>,
    source: Option<io::Error>,
}

/// One problem, with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1; 0 when the file could not be read.
    pub line: usize,
    /// Column in characters, from 1; 0 when the file could not be read.
    pub column: usize,
    /// What is wrong, and what would be right.
    pub reason: String,
    /// The part of the line around the place, control characters replaced.
    excerpt: String,
    /// Characters of `excerpt` before the caret.
    caret_at: usize,
    /// Carets: at least one.
    caret_len: usize,
}

/// A problem as the checks find it: a span of bytes and a reason.
pub(super) struct Finding {
    pub(super) span: Range<usize>,
    pub(super) reason: String,
}

impl ConfigError {
    /// The file could not be read.
    pub(super) fn read(name: &str, source: io::Error) -> Self {
        let reason = "cannot read the configuration file".to_owned();
        let problem =
            Problem { line: 0, column: 0, reason, excerpt: String::new(), caret_at: 0, caret_len: 0 };
        Self { name: name.to_owned(), problems: vec![problem], source: Some(source) }
    }

    /// The file is not text.
    pub(super) fn not_utf8(name: &str, bytes: &[u8], valid_up_to: usize) -> Self {
        let text = String::from_utf8_lossy(bytes.get(..valid_up_to).unwrap_or_default());
        let finding =
            Finding { span: text.len()..text.len(), reason: "the file is not UTF-8 here".to_owned() };
        Self::invalid(name, &text, vec![finding])
    }

    /// The text is not TOML, or has keys or types that the schema has not.
    pub(super) fn syntax(name: &str, text: &str, error: &toml::de::Error) -> Self {
        let finding =
            Finding { span: error.span().unwrap_or(0..0), reason: error.message().replace('\n', "; ") };
        Self::invalid(name, text, vec![finding])
    }

    /// The text is of the schema, but says what cannot be done.
    pub(super) fn invalid(name: &str, text: &str, mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| finding.span.start);
        let problems = findings.into_iter().map(|finding| Problem::locate(text, finding)).collect();
        Self { name: name.to_owned(), problems, source: None }
    }

    /// What the errors call the text: the path of the file.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Every problem found; never empty.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            if problem.line == 0 {
                write!(f, "{}: {}", self.name, problem.reason)?;
                continue;
            }
            writeln!(f, "{}:{}:{}: {}", self.name, problem.line, problem.column, problem.reason)?;
            let number = problem.line.to_string();
            let margin = " ".repeat(number.len());
            writeln!(f, " {number} | {}", problem.excerpt)?;
            let (before, carets) = (" ".repeat(problem.caret_at), "^".repeat(problem.caret_len));
            write!(f, " {margin} | {before}{carets}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

impl Problem {
    /// Turns a byte span into line, column and the excerpt that is shown. Any span is accepted.
    fn locate(text: &str, finding: Finding) -> Self {
        let start = floor_boundary(text, finding.span.start);
        let end = floor_boundary(text, finding.span.end.max(start));
        let before = text.get(..start).unwrap_or_default();
        let line = before.matches('\n').count().saturating_add(1);
        let line_start = before.rfind('\n').map_or(0, |at| at.saturating_add(1));
        let line_text = text.get(line_start..).unwrap_or_default().lines().next().unwrap_or_default();
        let column_z = before.get(line_start..).unwrap_or_default().chars().count();

        let skip = column_z.saturating_sub(SHOWN_CHARS_MAX / 2);
        let excerpt: String = line_text
            .chars()
            .skip(skip)
            .take(SHOWN_CHARS_MAX)
            .map(|c| {
                if c == '\t' {
                    ' '
                } else if c.is_control() {
                    '\u{fffd}'
                } else {
                    c
                }
            })
            .collect();
        let caret_at = column_z.saturating_sub(skip);
        let room = excerpt.chars().count().saturating_sub(caret_at).max(1);
        let marked = text.get(start..end).unwrap_or_default();
        let caret_len = marked.lines().next().unwrap_or_default().chars().count().clamp(1, room);
        let column = column_z.saturating_add(1);
        Self { line, column, reason: finding.reason, excerpt, caret_at, caret_len }
    }
}

/// The nearest character boundary at or before `at`, within the text.
fn floor_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at = at.saturating_sub(1);
    }
    at
}

/// Reads a configuration file that is not absurdly large.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > CONFIG_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 4 MiB: is it the right file?"));
    }
    Ok(bytes)
}
