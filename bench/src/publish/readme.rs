//! The part of README.md that is made of the report: between two marks, and nothing else is touched.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::demands;
use crate::report::Report;

/// A line before what is made, and one after it.
const MARKS: [&str; 2] = ["<!-- bench: begin -->", "<!-- bench: end -->"];
/// The plot that is shown, if it was drawn.
const PLOT: &str = "bench/plots/null-randread-latency.svg";

/// Writes the table, and shows the plot where there is one, in the README at `path`, from whose directory the plot is named.
///
/// # Errors
/// When the file cannot be read or written, or has no marks.
pub fn update(report: &Report, path: &Path) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let has_plot = path.parent().unwrap_or(Path::new("")).join(PLOT).is_file();
    let updated = replaced(&text, &part(report, has_plot)).with_context(|| format!("{}", path.display()))?;
    let beside = path.with_extension("md.new");
    fs::write(&beside, updated).with_context(|| format!("{} cannot be written", beside.display()))?;
    fs::rename(&beside, path).with_context(|| format!("{} cannot be written", path.display()))
}

fn part(report: &Report, has_plot: bool) -> String {
    let plot = if has_plot {
        format!("![4 KiB random reads: median latency against rate]({PLOT})\n\n")
    } else {
        String::new()
    };
    format!("{plot}{}", demands::table(report))
}

/// The text with another part between the marks.
fn replaced(text: &str, part: &str) -> Result<String> {
    let [begin, end] = MARKS;
    let between = text.split_once(begin).and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    let Some((before, after)) = between else {
        bail!("it has no lines `{begin}` and `{end}`, one after the other")
    };
    Ok(format!("{before}{begin}\n{part}{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_replaced_and_again_by_the_same() {
        let text = format!("# A\n{}\nold\n{}\n## B\n", MARKS[0], MARKS[1]);
        let once = replaced(&text, "new\n").unwrap();
        assert_eq!(once, format!("# A\n{}\nnew\n{}\n## B\n", MARKS[0], MARKS[1]));
        assert_eq!(replaced(&once, "new\n").unwrap(), once);
    }

    #[test]
    fn without_marks_in_order_nothing_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("README.md");
        let text = format!("{}\n{}\n", MARKS[1], MARKS[0]);
        fs::write(&path, &text).unwrap();
        assert!(update(&Report::default(), &path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}
