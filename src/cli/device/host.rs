//! The host as `/sys`, `/proc`, `/dev` and `/etc` show it, below a root that tests replace by a tree of their own.
//!
//! What is read here changes while it is read: devices come and go. A file that is missing or empty is no error but
//! an answer, `None`; who needs it to be there says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The largest file of `/proc` or `/sys` that is read.
const TEXT_LEN_MAX: u64 = 16 << 20;

/// A host. Paths given to it are relative to its root.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Host {
    root: PathBuf,
}

impl Host {
    /// This host.
    pub(in crate::cli) fn system() -> Self {
        Self::at("/")
    }

    /// The host below `root`.
    pub(in crate::cli) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where `relative` is.
    pub(in crate::cli) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// The trimmed text of a file; `None` when it is missing, empty or unreadable.
    pub(in crate::cli) fn text(&self, relative: impl AsRef<Path>) -> Option<String> {
        let file = fs::File::open(self.path(relative)).ok()?;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(file, TEXT_LEN_MAX), &mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// A file that holds one decimal number.
    pub(in crate::cli) fn number<T: FromStr>(&self, relative: impl AsRef<Path>) -> Option<T> {
        self.text(relative)?.parse().ok()
    }

    /// The names in a directory, sorted; none when it is missing.
    pub(in crate::cli) fn names(&self, relative: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(relative)).into_iter().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort_by_cached_key(|name| natural_key(name));
        names
    }

    /// The last part of the path that a symbolic link names.
    pub(in crate::cli) fn link_name(&self, relative: impl AsRef<Path>) -> Option<String> {
        let target = fs::read_link(self.path(relative)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    /// Whether there is something.
    pub(in crate::cli) fn exists(&self, relative: impl AsRef<Path>) -> bool {
        self.path(relative).exists()
    }
}

/// Orders `nvme10` after `nvme9`: numbers count by length first.
fn natural_key(name: &str) -> Vec<(String, usize, String)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let word_len = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (word, tail) = rest.split_at(word_len);
        let number_len = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (number, tail) = tail.split_at(number_len);
        key.push((word.to_owned(), number.len(), number.to_owned()));
        rest = tail;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_in_the_order_of_their_numbers() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["nvme10", "nvme9", "nvme1n10", "nvme1n2", "x"] {
            fs::write(dir.path().join(name), "").expect("a file");
        }
        assert_eq!(Host::at(dir.path()).names(""), ["nvme1n2", "nvme1n10", "nvme9", "nvme10", "x"]);
    }

    #[test]
    fn what_is_missing_or_empty_is_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let host = Host::at(dir.path());
        fs::write(dir.path().join("empty"), "\n").expect("a file");
        fs::write(dir.path().join("word"), "live\n").expect("a file");
        assert_eq!((host.text("empty"), host.text("missing")), (None, None));
        assert_eq!((host.text("word").as_deref(), host.number::<u32>("word")), (Some("live"), None));
        assert_eq!(host.names("missing"), Vec::<String>::new());
    }
}
