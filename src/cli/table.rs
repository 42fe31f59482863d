//! Tables for people: as wide as the terminal, and complete where a program reads them.

use std::fmt::Write;

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::text::shown;

/// The narrowest terminal on which rows are lines; on a narrower one each row is a block.
const NARROW: u16 = 100;

/// The longest text of a cell, in characters.
const MAX_CELL_CHARS: usize = 300;

/// Returns the width of the terminal, `None` where no terminal shows the output. `COLUMNS` says otherwise.
fn width() -> Option<u16> {
    let set = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    set.filter(|columns| *columns > 0).or_else(|| terminal_size::terminal_size().map(|(width, _)| width.0))
}

/// Returns rows below their names, without columns that are empty. On a narrow terminal each row becomes a block of lines, without its empty cells.
pub(super) fn table(names: &[&str], rows: &[Vec<String>]) -> String {
    let width = width();
    let cell = |text: &String| shown(text, MAX_CELL_CHARS);
    if width.is_none_or(|width| width >= NARROW) {
        let used = |column: &usize| rows.iter().any(|row| row.get(*column).is_some_and(|text| !text.is_empty()));
        let columns: Vec<usize> = (0..names.len()).filter(used).collect();
        let mut table = new_table(width);
        table.set_header(columns.iter().map(|&column| names[column]));
        for row in rows {
            table.add_row(columns.iter().map(|&column| cell(&row[column])));
        }
        return lines(&table);
    }
    let blocks = rows.iter().map(|row| {
        let mut table = new_table(width);
        for (name, text) in names.iter().zip(row).filter(|(_, text)| !text.is_empty()) {
            table.add_row([(*name).to_owned(), cell(text)]);
        }
        lines(&table)
    });
    blocks.collect::<Vec<_>>().join("\n")
}

/// Returns names and values, one pair a line. Empty values are left out.
pub(super) fn pairs(pairs: &[(&str, String)]) -> String {
    let mut table = new_table(width());
    for (name, value) in pairs.iter().filter(|(_, value)| !value.is_empty()) {
        table.add_row([(*name).to_owned(), shown(value, 4 * MAX_CELL_CHARS)]);
    }
    lines(&table)
}

fn new_table(width: Option<u16>) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    match width {
        Some(width) => table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    table
}

/// The lines of a table without the spaces around them.
fn lines(table: &Table) -> String {
    let mut text = String::new();
    for line in table.lines() {
        let line = line.strip_prefix(' ').unwrap_or(&line).trim_end();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line}");
    }
    text
}

/// Returns how long ago a time was, as in `2h 5m ago`; the time itself if it cannot be read.
pub(super) fn ago(now: OffsetDateTime, time: &str) -> String {
    let Ok(then) = OffsetDateTime::parse(time, &Rfc3339) else { return time.to_owned() };
    let seconds = u64::try_from((now - then).whole_seconds()).unwrap_or_default();
    let [days, hours, minutes] = [seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60];
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s ago"),
        (0, 0, _) => format!("{minutes}m ago"),
        (0, ..) => format!("{hours}h {minutes}m ago"),
        _ => format!("{days}d {hours}h ago"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_ago_has_its_two_largest_units() {
        let now = OffsetDateTime::parse("2026-11-29T12:00:00Z", &Rfc3339).expect("a time");
        for (time, expected) in [
            ("2026-11-29T11:59:18.500Z", "41s ago"),
            ("2026-11-29T11:30:00.000Z", "30m ago"),
            ("2026-11-29T09:55:00.000Z", "2h 5m ago"),
            ("2026-11-20T11:00:00.000Z", "9d 1h ago"),
            ("2026-11-29T13:00:00.000Z", "0s ago"),
            ("no time", "no time"),
        ] {
            assert_eq!(ago(now, time), expected);
        }
    }
}
