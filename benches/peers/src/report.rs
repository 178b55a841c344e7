//! The table to read and the record to keep.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{Machine, Standing, is_smoke_test};

/// What we want of a case. A miss is reported and fails nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Target {
    /// How far to be ahead of the peer, at least.
    pub ratio: Option<f64>,
    /// Our number, at most.
    pub at_most: Option<f64>,
    /// Our number, at least.
    pub at_least: Option<f64>,
}

impl Target {
    fn is_met(self, line: &Line) -> bool {
        self.ratio.is_none_or(|least| line.ratio >= least)
            && self.at_most.is_none_or(|most| line.ours <= most)
            && self.at_least.is_none_or(|least| line.ours >= least)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.ratio.map(|least| format!("ahead {least}x")),
            self.at_most.map(|most| format!("<= {most}")),
            self.at_least.map(|least| format!(">= {least}")),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

/// One comparison.
#[derive(Debug)]
pub struct Line {
    /// What was measured.
    pub case: String,
    /// Which number it is, e.g. `time`.
    pub metric: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Our number.
    pub ours: f64,
    /// Who was measured beside us.
    pub peer: String,
    /// The peer's number.
    pub theirs: f64,
    /// Above 1 we are ahead.
    pub ratio: f64,
    /// What we want, if this is the comparison it is about.
    pub target: Option<Target>,
}

impl Line {
    /// A comparison of times in nanoseconds.
    pub fn time(case: &str, standing: Standing, target: Option<Target>) -> Self {
        let Standing { peer, ours, theirs, ratio } = standing;
        Self { case: case.into(), metric: "time", unit: "ns", ours, peer, theirs, ratio, target }
    }

    fn row(&self) -> Row<'_> {
        Row {
            case: &self.case,
            metric: self.metric,
            value: self.ours,
            unit: self.unit,
            floor_ratio: None,
            peer: &self.peer,
            peer_ratio: self.ratio,
        }
    }
}

/// A line as the record has it: the shape that all benchmarks of this repository write.
#[derive(Serialize)]
struct Row<'a> {
    case: &'a str,
    metric: &'a str,
    value: f64,
    unit: &'a str,
    floor_ratio: Option<f64>,
    peer: &'a str,
    peer_ratio: f64,
}

#[derive(Serialize)]
struct Record<'a> {
    machine: Machine,
    date: String,
    rows: Vec<Row<'a>>,
}

/// All comparisons of one benchmark.
#[derive(Debug, Default)]
pub struct Report {
    lines: Vec<Line>,
}

impl Report {
    /// Adds a comparison.
    pub fn push(&mut self, line: Line) {
        self.lines.push(line);
    }

    /// Prints the table and writes the record to `target/benchmarks/<name>.json`.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&self, name: &str) -> Result<()> {
        print!("{self}");
        let file = folder().join(format!("{name}.json"));
        fs::create_dir_all(folder())?;
        fs::write(&file, serde_json::to_string_pretty(&self.record())?)
            .with_context(|| format!("cannot write {}", file.display()))
    }

    fn record(&self) -> Record<'_> {
        Record {
            machine: Machine::this(),
            date: jiff::Zoned::now().date().to_string(),
            rows: self.lines.iter().map(Line::row).collect(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |text: fn(&Line) -> &str| self.lines.iter().map(|line| text(line).len()).max().unwrap_or(0);
        let (case, peer) = (width(|line| &line.case), width(|line| &line.peer));
        writeln!(
            f,
            "\n{:case$}  {:peer$}  {:>8} {:>8} {:2} {:>6}  {:20} met",
            "case", "peer", "ours", "theirs", "", "ahead", "target"
        )?;
        for line in &self.lines {
            let Line { ours, theirs, unit, ratio, .. } = line;
            let (target, met) = match line.target {
                None => (String::new(), ""),
                Some(target) => (target.to_string(), if target.is_met(line) { "yes" } else { "no" }),
            };
            writeln!(
                f,
                "{:case$}  {:peer$}  {ours:8.2} {theirs:8.2} {unit:2} {ratio:5.2}x  {target:20} {met}",
                line.case, line.peer
            )?;
        }
        Ok(())
    }
}

/// The repository's, which is not this package's own. A smoke test's numbers mean nothing, and must not replace those
/// that do.
fn folder() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/benchmarks");
    if is_smoke_test() { folder.join("smoke") } else { folder }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(target: Target) -> Line {
        let standing = Standing { peer: "b".into(), ours: 10.0, theirs: 30.0, ratio: 3.0 };
        Line::time("a", standing, Some(target))
    }

    #[test]
    fn the_record_has_the_shape_of_all_others() {
        let mut report = Report::default();
        report.push(line(Target::default()));
        let json = serde_json::to_value(report.record()).unwrap();
        assert_eq!(
            json["rows"][0],
            serde_json::json!({"case": "a", "metric": "time", "value": 10.0, "unit": "ns", "floor_ratio": null,
                "peer": "b", "peer_ratio": 3.0})
        );
        assert!(json["machine"]["cores"].as_u64() > Some(0));
        assert_eq!(json["date"].as_str().map(str::len), Some(10));
    }

    #[test]
    fn a_target_is_met_when_all_of_it_is() {
        let met = |target: Target| target.is_met(&line(target));
        assert!(met(Target { ratio: Some(3.0), at_most: Some(10.0), at_least: Some(10.0) }));
        assert!(!met(Target { ratio: Some(3.1), ..Target::default() }));
        assert!(!met(Target { at_most: Some(9.9), ..Target::default() }));
        assert!(!met(Target { at_least: Some(10.1), ..Target::default() }));
    }
}
