//! Draws extents so that a person sees the layout of a file: which run lies where on the device.
//!
//! ```text
//!   file  aaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccdddddddddddddddddddd
//!   disk  ccccccc······aaaaaaaaaaa····················dddddddddddddddddd········bbbbbbbbbbbbb
//!         1 MiB                                                                         97 MiB
//! ```
//!
//! A letter stands for one extent, or for several that follow each other in the file when there are more extents
//! than letters. A cell shows the letter that fills most of it; `·` is space of others, or nobody's.

use crate::config::format_size;
use crate::extent::Extent;

/// Letters, and so the greatest number of runs told apart.
const LETTERS: &[u8; 52] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// 256-colour palette numbers that are readable on black and on white.
const COLOURS: [u8; 12] = [33, 166, 34, 162, 136, 37, 61, 160, 70, 126, 31, 172];
/// What stands before each drawn line.
const LABEL_COLUMNS: usize = 6;
const HISTOGRAM_BAR: usize = 40;

/// The lines of the drawing, at most `columns` wide.
pub(super) fn layout(extents: &[Extent], columns: usize, colour: bool) -> Vec<String> {
    let cells = columns.saturating_sub(LABEL_COLUMNS).max(10);
    let device_start = extents.iter().map(|extent| extent.device_offset.get()).min().unwrap_or_default();
    let device_end = extents.iter().map(device_end).max().unwrap_or_default();
    let file_end = extents.last().map_or(0, |last| last.file_offset.get().saturating_add(last.len.get()));
    let group = extents.len().div_ceil(LETTERS.len()).max(1);

    let mut file = Scale::new(0, file_end, cells);
    let mut disk = Scale::new(device_start, device_end, cells);
    for (index, extent) in extents.iter().enumerate() {
        let letter = index / group;
        file.add(letter, extent.file_offset.get(), extent.len.get());
        disk.add(letter, extent.device_offset.get(), extent.len.get());
    }
    let (left, right) = (format_size(device_start), format_size(device_end));
    let gap = " ".repeat(cells.saturating_sub(left.len()).saturating_sub(right.len()).max(1));
    let mut lines = vec![
        format!("file  {}", file.draw(colour)),
        format!("disk  {}", disk.draw(colour)),
        format!("      {left}{gap}{right}"),
    ];
    if group > 1 {
        lines.push(format!("      a letter stands for {group} extents that follow each other in the file"));
    }
    lines
}

/// How many extents there are of which size: one line a power of two.
pub(super) fn histogram(extents: &[Extent]) -> Vec<String> {
    let mut counts = [0u64; 64];
    for extent in extents {
        let class = extent.len.get().checked_ilog2().unwrap_or_default() as usize;
        if let Some(count) = counts.get_mut(class) {
            *count = count.saturating_add(1);
        }
    }
    let most = counts.iter().copied().max().unwrap_or_default().max(1);
    let first = counts.iter().position(|&count| count > 0).unwrap_or_default();
    let last = counts.iter().rposition(|&count| count > 0).unwrap_or_default();
    (first..=last)
        .filter_map(|class| Some((class, *counts.get(class)?)))
        .map(|(class, count)| {
            let size = format_size(1u64.checked_shl(u32::try_from(class).unwrap_or(63)).unwrap_or_default());
            let full = u128::from(count) * HISTOGRAM_BAR as u128 / u128::from(most);
            let bar = "#".repeat(usize::try_from(full).unwrap_or_default().max(usize::from(count > 0)));
            format!("  from {size:>9}  {count:>8}  {bar}").trim_end().to_owned()
        })
        .collect()
}

fn device_end(extent: &Extent) -> u64 {
    extent.device_offset.get().saturating_add(extent.len.get())
}

/// A range of bytes cut into cells, and how much of each cell each letter fills.
struct Scale {
    start: u64,
    len: u64,
    filled: Vec<[u64; LETTERS.len()]>,
}

impl Scale {
    fn new(start: u64, end: u64, cells: usize) -> Self {
        Self { start, len: end.saturating_sub(start).max(1), filled: vec![[0; LETTERS.len()]; cells] }
    }

    /// The first byte of a cell, from the start of the scale.
    fn edge(&self, cell: usize) -> u64 {
        let scaled = u128::from(self.len) * cell as u128 / self.filled.len().max(1) as u128;
        u64::try_from(scaled).unwrap_or(u64::MAX)
    }

    fn add(&mut self, letter: usize, offset: u64, len: u64) {
        let from = offset.saturating_sub(self.start);
        let to = from.saturating_add(len);
        let cells = self.filled.len();
        let first = u128::from(from) * cells as u128 / u128::from(self.len);
        let mut cell = usize::try_from(first).unwrap_or(cells);
        while cell < cells && self.edge(cell) < to {
            let upper = self.edge(cell.saturating_add(1)).min(to);
            let share = upper.saturating_sub(self.edge(cell).max(from));
            if let Some(slot) = self.filled.get_mut(cell).and_then(|letters| letters.get_mut(letter)) {
                *slot = slot.saturating_add(share);
            }
            cell = cell.saturating_add(1);
        }
    }

    fn draw(&self, colour: bool) -> String {
        let mut line = String::new();
        for letters in &self.filled {
            let best =
                letters.iter().enumerate().max_by_key(|&(index, share)| (*share, std::cmp::Reverse(index)));
            match best {
                Some((letter, share)) if *share > 0 => {
                    let glyph = char::from(LETTERS.get(letter).copied().unwrap_or(b'?'));
                    if colour {
                        let shade = COLOURS.get(letter % COLOURS.len()).copied().unwrap_or(7);
                        line.push_str(&format!("\u{1b}[38;5;{shade}m{glyph}\u{1b}[0m"));
                    } else {
                        line.push(glyph);
                    }
                }
                _ => line.push('·'),
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{ByteLen, ByteOffset};

    fn extents(runs: &[(u64, u64)]) -> Vec<Extent> {
        let mut file_offset = 0;
        runs.iter()
            .map(|&(device_offset, len)| {
                let extent = Extent {
                    file_offset: ByteOffset(file_offset),
                    device_offset: ByteOffset(device_offset),
                    len: ByteLen(len),
                };
                file_offset += len;
                extent
            })
            .collect()
    }

    #[test]
    fn runs_are_seen_in_file_order_and_in_device_order() {
        const M: u64 = 1 << 20;
        let drawing = layout(&extents(&[(30 * M, 10 * M), (10 * M, 10 * M), (50 * M, 20 * M)]), 36, false);
        insta::assert_snapshot!(drawing.join("\n"), @r"
        file  aaaaaaaabbbbbbbccccccccccccccc
        disk  bbbbb·····aaaaa·····cccccccccc
              10 MiB                  70 MiB
        ");
    }

    #[test]
    fn many_extents_share_letters_and_widths_hold() {
        let runs: Vec<(u64, u64)> = (0..1000).map(|index| (index * 16384, 4096)).collect();
        let drawing = layout(&extents(&runs), 80, false);
        assert!(drawing.iter().all(|line| line.chars().count() <= 80));
        assert!(drawing[0].starts_with("file  a") && drawing[0].ends_with('X'), "{}", drawing[0]);
        assert_eq!(drawing[3].trim(), "a letter stands for 20 extents that follow each other in the file");
    }

    #[test]
    fn extremes_are_drawn_without_overflow() {
        let far = [(u64::MAX - 4096, 4095), (0, 512)];
        assert_eq!(layout(&extents(&far), 40, false).len(), 3);
        assert_eq!(layout(&[], 40, false).len(), 3);
        assert!(layout(&extents(&[(4096, 4096)]), 200, true)[1].contains("\u{1b}[38;5;"));
    }

    #[test]
    fn sizes_are_counted_by_powers_of_two() {
        let runs = [(0, 4096), (1 << 20, 5000), (2 << 20, 8192), (4 << 20, 65536)];
        insta::assert_snapshot!(histogram(&extents(&runs)).join("\n"), @r"
          from     4 KiB         2  ########################################
          from     8 KiB         1  ####################
          from    16 KiB         0
          from    32 KiB         0
          from    64 KiB         1  ####################
        ");
    }
}
