//! The record of one benchmark.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{Machine, is_smoke_test};

/// One measured number.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was measured, e.g. `32/8x128 f16 batch 8 context 4096`.
    pub case: String,
    /// What the number is, e.g. `time`.
    pub metric: &'static str,
    /// The number.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// The floor's time divided by ours; 1 is the limit of the machine.
    pub floor_ratio: Option<f64>,
    /// The peer that was measured in the same run.
    pub peer: Option<String>,
    /// The peer's time divided by ours; above 1 we are ahead.
    pub peer_ratio: Option<f64>,
}

/// All numbers of one benchmark.
#[derive(Debug, Serialize)]
pub struct Record {
    machine: Machine,
    date: String,
    rows: Vec<Row>,
}

impl Default for Record {
    fn default() -> Self {
        Self { machine: Machine::this(), date: jiff::Zoned::now().date().to_string(), rows: Vec::new() }
    }
}

impl Record {
    /// Adds a time in nanoseconds, if it was measured: one row for each peer that was measured, or one row without a
    /// peer.
    pub fn time(&mut self, case: &str, ours: Option<f64>, floor: Option<f64>, peers: &[(&str, Option<f64>)]) {
        let Some(value) = ours else { return };
        let mut row = |peer: Option<&str>, peer_ratio| {
            self.rows.push(Row {
                case: case.into(),
                metric: "time",
                value,
                unit: "ns",
                floor_ratio: floor.map(|floor| floor / value),
                peer: peer.map(String::from),
                peer_ratio,
            });
        };
        let measured: Vec<_> = peers.iter().filter_map(|(peer, time)| Some((*peer, (*time)?))).collect();
        if measured.is_empty() {
            row(None, None);
        }
        for (peer, time) in measured {
            row(Some(peer), Some(time / value));
        }
    }

    /// Adds our median time in nanoseconds from a race. The ratios are medians over the rounds: `floor_ratio` is the
    /// floor's time divided by ours, and each peer has its time divided by ours.
    pub fn raced(&mut self, case: &str, ours: f64, floor_ratio: f64, peers: &[(&str, Option<f64>)]) {
        let alone = [("", None)];
        for &(peer, peer_ratio) in if peers.is_empty() { &alone[..] } else { peers } {
            let peer = peer_ratio.map(|_| peer.into());
            let (case, value) = (case.into(), ours);
            let floor_ratio = Some(floor_ratio);
            self.rows.push(Row { case, metric: "time", value, unit: "ns", floor_ratio, peer, peer_ratio });
        }
    }

    /// Adds another number about a case.
    pub fn value(&mut self, case: &str, metric: &'static str, value: f64, unit: &'static str) {
        let case = case.into();
        self.rows.push(Row { case, metric, value, unit, floor_ratio: None, peer: None, peer_ratio: None });
    }

    /// Prints the rows and writes them to `target/benchmarks/<name>.json`.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&self, name: &str) -> Result<()> {
        println!("\n{:<64} {:<16} {:>18} {:>6}  peer", "case", "metric", "", "floor");
        for row in &self.rows {
            let ratio = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
            let peer = row.peer.as_deref().map_or(String::new(), |peer| format!("{}x {peer}", ratio(row.peer_ratio)));
            let Row { case, metric, value, unit, .. } = row;
            println!("{case:<64} {metric:<16} {value:>13.2} {unit:<4} {:>6}  {peer}", ratio(row.floor_ratio));
        }
        self.save(name)
    }

    /// Writes the rows to `target/benchmarks/<name>.json` without printing them.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn save(&self, name: &str) -> Result<()> {
        let file = results().join(format!("{name}.json"));
        fs::create_dir_all(results())?;
        fs::write(&file, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The folder of the results, `target/benchmarks`. A smoke test writes to `smoke` inside it, because its numbers mean
/// nothing and must not replace real ones.
pub fn results() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let folder = target.join("benchmarks");
    if is_smoke_test() { folder.join("smoke") } else { folder }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_promised_shape() {
        let mut record = Record::default();
        record.time("a", Some(10.0), Some(5.0), &[("b", Some(30.0)), ("c", None)]);
        record.time("d", Some(1.0), None, &[]);
        record.time("filtered out", None, None, &[]);
        let json = serde_json::to_value(&record).unwrap();
        let row = |i: usize| json["rows"][i].clone();
        assert_eq!(
            row(0),
            serde_json::json!({"case": "a", "metric": "time", "value": 10.0, "unit": "ns", "floor_ratio": 0.5,
                "peer": "b", "peer_ratio": 3.0})
        );
        assert_eq!((row(1)["floor_ratio"].clone(), row(1)["peer"].clone()), (().into(), ().into()));
        assert!(json["rows"][2].is_null() && json["machine"]["cores"].as_u64() > Some(0));
        assert_eq!(json["date"].as_str().map(str::len), Some(10));
    }
}
