//! The tables of a record, as text and as Markdown.

use std::fmt::Write as _;

use anyhow::{Context, Result};

use harness::{Record, Row};

/// One table: the cases of one part, with a column for each peer.
struct Table<'a> {
    part: &'a str,
    peers: Vec<&'a str>,
    /// Each case with its rows: those with a peer or a ratio to the floor, and its other numbers.
    cases: Vec<(&'a str, Vec<&'a Row>)>,
}

impl<'a> Table<'a> {
    /// The tables of `record`, in its order. The first word of a case is its part.
    fn all(record: &'a Record) -> Vec<Self> {
        let mut tables: Vec<Self> = Vec::new();
        for row in &record.rows {
            let (part, case) = row.case.split_once(' ').unwrap_or(("", &row.case));
            let table = match tables.iter().position(|table| table.part == part) {
                Some(at) => &mut tables[at],
                None => {
                    tables.push(Self { part, peers: Vec::new(), cases: Vec::new() });
                    let last = tables.len() - 1;
                    &mut tables[last]
                }
            };
            if let Some(peer) = row.peer.as_deref().filter(|peer| !table.peers.contains(peer)) {
                table.peers.push(peer);
            }
            match table.cases.iter_mut().find(|(other, _)| *other == case) {
                Some((_, rows)) => rows.push(row),
                None => table.cases.push((case, vec![row])),
            }
        }
        tables
    }

    /// The heading, and a row of cells for each case.
    fn cells(&self) -> Vec<Vec<String>> {
        let extra = self.cases.iter().flat_map(|(_, rows)| rows).find(|row| is_extra(row));
        let floor = self.cases.iter().flat_map(|(_, rows)| rows).any(|row| row.floor_ratio.is_some());
        let mut heading = vec!["case".to_owned(), "ours".to_owned()];
        heading.extend(extra.map(|row| row.unit.clone()));
        heading.extend(floor.then(|| "of the floor".to_owned()));
        heading.extend(self.peers.iter().map(|peer| peer.to_string()));
        let body = self.cases.iter().map(|(case, rows)| {
            let first = rows[0];
            let mut cells = vec![case.to_string(), value(first)];
            if extra.is_some() {
                let number = rows.iter().find(|row| is_extra(row)).map(|row| digits(row.value));
                cells.push(number.unwrap_or_default());
            }
            if floor {
                cells.push(first.floor_ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default());
            }
            cells.extend(self.peers.iter().map(|peer| {
                let ratio = rows.iter().find(|row| row.peer.as_deref() == Some(peer)).and_then(|row| row.peer_ratio);
                ratio.map(digits).unwrap_or_default()
            }));
            cells
        });
        [vec![heading], body.collect()].concat()
    }
}

/// Whether the row is a further number about a case, without a peer or a floor.
fn is_extra(row: &Row) -> bool {
    row.peer.is_none() && row.floor_ratio.is_none() && row.unit.ends_with("/s") && row.unit != "tokens/s"
}

fn value(row: &Row) -> String {
    match (row.unit.as_str(), row.value) {
        ("ns", ns) if ns >= 1e6 => format!("{} ms", digits(ns / 1e6)),
        ("ns", ns) if ns >= 1e3 => format!("{} us", digits(ns / 1e3)),
        (unit, value) => format!("{} {unit}", digits(value)),
    }
}

/// Formats `x` with three significant digits.
fn digits(x: f64) -> String {
    match x.abs() {
        x if !x.is_finite() => "-".into(),
        size if size >= 100.0 => format!("{x:.0}"),
        size if size >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

/// The tables as text.
pub fn text(record: &Record) -> String {
    let mut out = String::new();
    for table in Table::all(record) {
        // Names of peers are too long for column headings, so the columns have numbers.
        let _ = writeln!(out, "\n{}: a peer's time divided by ours, above 1 we are ahead", table.part);
        for (i, peer) in table.peers.iter().enumerate() {
            let _ = writeln!(out, "  [{}] {peer}", i + 1);
        }
        let mut cells = table.cells();
        let first = cells[0].len() - table.peers.len();
        for (i, cell) in cells[0][first..].iter_mut().enumerate() {
            *cell = format!("[{}]", i + 1);
        }
        let widths: Vec<usize> = (0..cells[0].len())
            .map(|column| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for row in &cells {
            let mut line = format!("{:<width$}", row[0], width = widths[0]);
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                let _ = write!(line, "  {cell:>width$}");
            }
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
    out
}

/// The tables as Markdown; cells in which a peer is ahead are bold.
pub fn markdown(record: &Record) -> String {
    let mut out = String::new();
    let machine = &record.machine;
    let _ = writeln!(out, "{}, {} cores, {}, {}.", machine.cpu, machine.cores, machine.os, record.date);
    for table in Table::all(record) {
        let _ = writeln!(out, "\n### {}\n", capitalised(table.part));
        let mut cells = table.cells();
        let first = cells[0].len() - table.peers.len();
        for row in &mut cells[1..] {
            for cell in &mut row[first..] {
                if cell.parse::<f64>().is_ok_and(|ratio| ratio < 1.0) {
                    *cell = format!("**{cell}**");
                }
            }
        }
        for (i, row) in cells.iter().enumerate() {
            let _ = writeln!(out, "| {} |", row.join(" | "));
            if i == 0 {
                let _ = writeln!(out, "|---|{}", "---:|".repeat(row.len() - 1));
            }
        }
    }
    out
}

/// Replaces the text between the two marks of `page` by `tables`.
///
/// # Errors
///
/// If a mark is missing.
pub fn put(page: &str, tables: &str) -> Result<String> {
    const MARKS: [&str; 2] = ["<!-- tables -->\n", "<!-- end of tables -->"];
    let missing = |mark: &str| format!("there is no line `{}`", mark.trim_end());
    let (before, rest) = page.split_once(MARKS[0]).with_context(|| missing(MARKS[0]))?;
    let (_, after) = rest.split_once(MARKS[1]).with_context(|| missing(MARKS[1]))?;
    Ok([before, MARKS[0], "\n", tables, "\n", MARKS[1], after].concat())
}

fn capitalised(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let row = |case: &str, value, peer: &str, ratio| Row {
            case: case.into(),
            metric: "time".into(),
            value,
            unit: "ns".into(),
            floor_ratio: Some(0.5),
            peer: Some(peer.into()),
            peer_ratio: Some(ratio),
        };
        let mut record = Record {
            rows: vec![row("decode a", 2.5e6, "x", 3.0), row("decode a", 2.5e6, "y", 0.75)],
            ..Record::default()
        };
        record.value("decode a", "bandwidth", 12.34, "GB/s");
        record.rows.push(row("append b", 321.0, "x", 123.4));
        record
    }

    #[test]
    fn a_case_is_a_row_and_a_peer_is_a_column() {
        let markdown = markdown(&record());
        assert!(
            markdown.contains("### Decode\n\n| case | ours | GB/s | of the floor | x | y |\n|---|---:|"),
            "{markdown}"
        );
        assert!(markdown.contains("\n| a | 2.50 ms | 12.3 | 0.50 | 3.00 | **0.75** |\n"), "{markdown}");
        assert!(markdown.contains("### Append\n\n| case | ours | of the floor | x |"), "{markdown}");
        assert!(markdown.contains("\n| b | 321 ns | 0.50 | 123 |\n"), "{markdown}");
    }

    #[test]
    fn new_tables_replace_old_ones() {
        let page = "a\n<!-- tables -->\nold\n<!-- end of tables -->\nb\n";
        let put_in = put(page, "new\n").unwrap();
        assert_eq!(put_in, "a\n<!-- tables -->\n\nnew\n\n<!-- end of tables -->\nb\n");
        assert_eq!(put(&put_in, "new\n").unwrap(), put_in);
        assert_eq!(put("a", "b").unwrap_err().to_string(), "there is no line `<!-- tables -->`");
    }

    #[test]
    fn text_names_peers_above_the_numbers() {
        let text = text(&record());
        assert!(text.contains("  [1] x\n  [2] y\ncase     ours  GB/s  of the floor   [1]   [2]\n"), "{text}");
        assert!(text.contains("a     2.50 ms  12.3          0.50  3.00  0.75\n"), "{text}");
    }
}
