//! A table with its title, in the width that there is.
//!
//! ```text
//!   too narrow for all   names and words are cut, with a mark, to what still tells one from another
//!   still too narrow     columns are left out, those of least use first; the title counts them
//! ```
//!
//! A number is shown whole or not at all: without a digit it is another one.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Row, Table, Widget};

/// Between columns.
const GAP: u16 = 2;
/// The title, the head, one row, and an empty line before.
const HEIGHT_MIN: u16 = 4;
/// Less of a name is hard to tell from others.
const NAME_MIN: u16 = 12;
/// The longest state of an export that we know, `fenced: device-failed`.
const WORDS_MIN: u16 = 21;
/// Stands where something is cut.
const CUT: &str = "…";

pub(super) const TITLE: Style = Style::new().add_modifier(Modifier::BOLD);
const HEAD: Style = Style::new().fg(Color::Cyan);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Number,
    Words,
    Name,
}

/// A column: what it is called, what is in it, and of which use it is; the first to stay has use 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) title: &'static str,
    content: Content,
    order: u8,
}

impl Column {
    /// Numbers, with their units.
    pub(super) const fn number(title: &'static str, order: u8) -> Self {
        Self { title, content: Content::Number, order }
    }

    /// Words whose beginning says most.
    pub(super) const fn words(title: &'static str, order: u8) -> Self {
        Self { title, content: Content::Words, order }
    }

    /// Paths and NQNs: those of one place begin alike, their ends tell them apart.
    pub(super) const fn name(title: &'static str, order: u8) -> Self {
        Self { title, content: Content::Name, order }
    }

    /// The least width, of a column that could do with `whole`.
    fn least(self, whole: u16) -> u16 {
        match self.content {
            Content::Number => whole,
            Content::Words => whole.min(WORDS_MIN),
            Content::Name => whole.min(NAME_MIN),
        }
    }

    /// What of a text is shown in this width.
    fn cut(self, text: &str, width: u16) -> String {
        if width_of(text) <= width {
            return text.to_owned();
        }
        let fits = |part: &&str| width_of(part) < width;
        let starts = text.char_indices().map(|(at, _)| at);
        if self.content == Content::Name {
            let end = starts.map(|at| &text[at..]).find(fits).unwrap_or_default();
            format!("{CUT}{end}")
        } else {
            let beginning = starts.rev().map(|at| &text[..at]).find(fits).unwrap_or_default();
            format!("{beginning}{CUT}")
        }
    }
}

/// In cells of a terminal.
pub(super) fn width_of(text: &str) -> u16 {
    u16::try_from(Line::raw(text).width()).unwrap_or(u16::MAX)
}

/// A line in this width: of one that is too long, as many whole parts, or else whole words, as there is room for. None of its
/// numbers is cut.
pub(super) fn clip(text: &str, width: u16) -> String {
    if width_of(text) <= width {
        return text.to_owned();
    }
    let up_to = |end: &str| {
        let parts = text.rmatch_indices(end).map(|(at, _)| text[..at + end.len()].trim_end());
        parts.map(|part| format!("{part} {CUT}")).find(|line| width_of(line) <= width)
    };
    up_to(", ").or_else(|| up_to(" ")).unwrap_or_else(|| CUT.to_owned())
}

/// Areas of these heights, one below the other; those that have no room are empty.
pub(super) fn rows_of<const N: usize>(area: Rect, heights: [u16; N]) -> [Rect; N] {
    let mut y = area.y;
    heights.map(|height| {
        let room = area.bottom().saturating_sub(y);
        let it = Rect { y, height: height.min(room), ..area };
        y = y.saturating_add(it.height);
        it
    })
}

/// A table with its title.
pub(super) struct Section {
    pub(super) title: &'static str,
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<Vec<(String, Style)>>,
}

impl Section {
    /// What each column takes, whole.
    fn widths(&self) -> Vec<u16> {
        let width = |(at, column): (usize, &Column)| {
            let cells = self.rows.iter().filter_map(|row| row.get(at)).map(|(text, _)| width_of(text));
            cells.chain([width_of(column.title)]).max().unwrap_or_default()
        };
        self.columns.iter().enumerate().map(width).collect()
    }

    /// What it takes, whole.
    pub(super) fn width(&self) -> u16 {
        let sum = |sum: u16, width| sum.saturating_add(width).saturating_add(GAP);
        self.widths().into_iter().fold(0, sum).saturating_sub(GAP)
    }

    /// With its title, its head and an empty line before.
    pub(super) fn height(&self) -> u16 {
        u16::try_from(self.rows.len()).unwrap_or(u16::MAX).saturating_add(3)
    }

    /// The height below which it does not tell anything that it could tell.
    pub(super) fn height_min(&self) -> u16 {
        self.height().min(HEIGHT_MIN)
    }

    /// The columns that there is room for, by their places, and their widths.
    fn fit(&self, width: u16) -> Vec<(usize, u16)> {
        let whole = self.widths();
        let mut by_use: Vec<_> = self.columns.iter().zip(&whole).enumerate().collect();
        by_use.sort_by_key(|(_, (column, _))| column.order);
        // Behind the last there is no gap.
        let mut room = width.saturating_add(GAP);
        let mut shown = Vec::new();
        for (at, (column, whole)) in by_use {
            let least = column.least(*whole);
            // None of less use takes the place: which are shown would change with every width.
            let Some(rest) = room.checked_sub(least.saturating_add(GAP)) else { break };
            room = rest;
            shown.push((at, least));
        }
        shown.sort_unstable();
        // The others share what is left, until all are whole.
        while room > 0 {
            let cut = shown.iter_mut().filter(|(at, width)| *width < whole[*at]);
            let Some((_, narrowest)) = cut.min_by_key(|(_, width)| *width) else { break };
            *narrowest += 1;
            room -= 1;
        }
        shown
    }

    /// The title, which says what there is no room for.
    fn title(&self, rows: usize, columns: usize, width: u16) -> String {
        let hidden = self.columns.len().saturating_sub(columns);
        let first = (rows < self.rows.len()).then(|| format!("first {rows} of {}", self.rows.len()));
        let (long, short) = match hidden {
            0 => (None, None),
            1 => (Some("1 column needs more width".to_owned()), Some("1 more column".to_owned())),
            _ => (Some(format!("{hidden} columns need more width")), Some(format!("{hidden} more columns"))),
        };
        let with = |columns: Option<String>| {
            let notes: Vec<_> = first.iter().cloned().chain(columns).collect();
            if notes.is_empty() {
                self.title.to_owned()
            } else {
                format!("{} ({})", self.title, notes.join(", "))
            }
        };
        Some(with(long)).filter(|title| width_of(title) <= width).unwrap_or_else(|| clip(&with(short), width))
    }

    pub(super) fn draw(&self, area: Rect, buffer: &mut Buffer) {
        let [_, title, table] = rows_of(area, [1, 1, area.height.saturating_sub(2)]);
        let shown = self.fit(area.width);
        let rows = usize::from(table.height.saturating_sub(1));
        Line::styled(self.title(rows, shown.len(), area.width), TITLE).render(title, buffer);
        let cell = |at: usize, width: u16, text: &str, style: Style| {
            let column = self.columns[at];
            let text = Text::styled(column.cut(text, width), style);
            Cell::new(if column.content == Content::Number { text.right_aligned() } else { text })
        };
        let head = shown.iter().map(|(at, width)| cell(*at, *width, self.columns[*at].title, HEAD));
        let rows = self.rows.iter().map(|row| {
            let cells = shown.iter().filter_map(|(at, width)| Some((*at, *width, row.get(*at)?)));
            Row::new(cells.map(|(at, width, (text, style))| cell(at, width, text, *style)))
        });
        let widths = shown.iter().map(|(_, width)| Constraint::Length(*width));
        let widget = Table::new(rows, widths).header(Row::new(head)).column_spacing(GAP);
        Widget::render(widget, table, buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number of 7 cells, words of 24, and names of 30, one of use and one of less.
    fn section() -> Section {
        let columns = vec![
            Column::name("path", 3),
            Column::number("n", 0),
            Column::words("state", 1),
            Column::name("nqn", 2),
        ];
        let (path, nqn) =
            ("/srv/images/".to_owned() + &"x".repeat(14) + ".img", "nqn.".to_owned() + &"y".repeat(26));
        let texts = [path, "12345.6".to_owned(), "fenced: nobody knows why".to_owned(), nqn];
        Section { title: "things", columns, rows: vec![texts.map(|text| (text, Style::new())).into()] }
    }

    #[test]
    fn names_and_words_shrink_before_columns_are_left_out_in_the_order_of_their_use() {
        let section = section();
        assert_eq!(section.width(), 30 + 7 + 24 + 30 + 3 * GAP);
        let all = |widths: [u16; 4]| widths.into_iter().enumerate().collect::<Vec<_>>();
        assert_eq!(section.fit(u16::MAX), all([30, 7, 24, 30]));
        assert_eq!(section.fit(section.width()), all([30, 7, 24, 30]));
        let widths: Vec<_> = section.fit(section.width() - 10).into_iter().map(|(_, width)| width).collect();
        assert_eq!((widths[1], widths.iter().sum::<u16>()), (7, 30 + 7 + 24 + 30 - 10), "no cell is wasted");
        assert_eq!(section.fit(12 + 7 + 21 + 12 + 6), all([12, 7, 21, 12]));
        assert_eq!(section.fit(12 + 7 + 21 + 12 + 5), [(1, 7), (2, 23), (3, 23)]);
        assert_eq!(section.fit(7 + 21 + 12 + 3), [(1, 7), (2, 24)]);
        assert_eq!(section.fit(7 + 21 + 1), [(1, 7)]);
        assert_eq!(section.fit(6), [], "a number is whole, or not there");
        assert_eq!(section.fit(0), []);
    }

    #[test]
    fn a_title_says_what_there_is_no_room_for_as_far_as_it_has_room_itself() {
        let mut section = section();
        assert_eq!(section.title(1, 4, 80), "things");
        assert_eq!(section.title(1, 3, 80), "things (1 column needs more width)");
        assert_eq!(section.title(1, 1, 80), "things (3 columns need more width)");
        assert_eq!(section.title(1, 1, 33), "things (3 more columns)");
        section.rows = vec![section.rows[0].clone(); 20];
        assert_eq!(section.title(10, 4, 80), "things (first 10 of 20)");
        assert_eq!(section.title(10, 3, 80), "things (first 10 of 20, 1 column needs more width)");
        assert_eq!(section.title(10, 3, 38), "things (first 10 of 20, 1 more column)");
        assert_eq!(section.title(10, 3, 30), "things (first 10 of 20, …");
        assert_eq!(section.title(10, 3, 21), "things (first 10 of …");
    }

    #[test]
    fn names_keep_their_ends_and_words_their_beginnings() {
        let (name, words) = (Column::name("", 0), Column::words("", 0));
        assert_eq!(name.cut("/srv/images/a.img", 17), "/srv/images/a.img");
        assert_eq!(name.cut("/srv/images/a.img", 6), "…a.img");
        assert_eq!(words.cut("fenced: gone", 8), "fenced:…");
        assert_eq!((name.cut("abc", 1), words.cut("abc", 1)), (CUT.to_owned(), CUT.to_owned()));
        // One of these takes two cells.
        assert_eq!(name.cut("漢字漢字", 6), "…漢字");
        assert_eq!(words.cut("漢字漢字", 6), "漢字…");
    }

    #[test]
    fn a_line_is_cut_between_its_parts_or_else_between_its_words() {
        let line = "3005 commands/s, read 3.9 MiB/s, written 502.5 KiB/s";
        assert_eq!(clip(line, width_of(line)), line);
        assert_eq!(clip(line, width_of(line) - 1), "3005 commands/s, read 3.9 MiB/s, …");
        assert_eq!(clip(line, 33), "3005 commands/s, …");
        assert_eq!(clip(line, 17), "3005 …");
        assert_eq!(clip(line, 5), "…");
    }
}
