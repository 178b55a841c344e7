//! The record of one run of a benchmark.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::{Machine, is_smoke_test};

/// One measured number, compared with at most one peer's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured, e.g. `decode 32/8x128 f16 batch 8 context 4096`.
    pub case: String,
    /// What the number is, e.g. `time`.
    pub metric: String,
    /// Our number.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// The floor's time divided by ours; 1 is the limit of the machine.
    pub floor_ratio: Option<f64>,
    /// The peer that was measured in the same run, with its version if it has one.
    pub peer: Option<String>,
    /// The peer's time divided by ours; above 1 we are ahead.
    pub peer_ratio: Option<f64>,
}

/// All numbers of one run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// The machine.
    pub machine: Machine,
    /// The date of the run.
    pub date: String,
    /// The numbers.
    pub rows: Vec<Row>,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            machine: Machine::this(),
            date: TimeZone::UTC.to_datetime(Timestamp::now()).date().to_string(),
            rows: Vec::new(),
        }
    }
}

impl Record {
    /// Adds one number: a row for each peer, with the peer's time divided by ours, or one row without a peer.
    pub fn compared(
        &mut self,
        case: &str,
        metric: &str,
        value: f64,
        unit: &str,
        floor_ratio: Option<f64>,
        peers: impl IntoIterator<Item = (String, f64)>,
    ) {
        let before = self.rows.len();
        let row = |peer, peer_ratio| {
            let (case, metric, unit) = (case.into(), metric.into(), unit.into());
            Row { case, metric, value, unit, floor_ratio, peer, peer_ratio }
        };
        self.rows.extend(peers.into_iter().map(|(peer, ratio)| row(Some(peer), Some(ratio))));
        if self.rows.len() == before {
            self.rows.push(row(None, None));
        }
    }

    /// Adds a time in nanoseconds, if it was measured, compared with the times of the floor and of the peers that were
    /// measured.
    pub fn time(&mut self, case: &str, ours: Option<f64>, floor: Option<f64>, peers: &[(&str, Option<f64>)]) {
        let Some(ours) = ours else { return };
        let peers = peers.iter().filter_map(|&(peer, time)| Some((peer.into(), time? / ours)));
        self.compared(case, "time", ours, "ns", floor.map(|floor| floor / ours), peers);
    }

    /// Adds a number about a case, compared with nothing.
    pub fn value(&mut self, case: &str, metric: &str, value: f64, unit: &str) {
        self.compared(case, metric, value, unit, None, []);
    }

    /// Reads an earlier record.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or is not a record.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a record", path.display()))
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
        let (folder, file) = (results(), results().join(format!("{name}.json")));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        fs::write(&file, serde_json::to_string_pretty(self)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The folder of the results, `benchmarks` in the repository's `target`. A smoke test writes to `smoke` inside it,
/// because its numbers mean nothing and must not replace real ones.
pub fn results() -> PathBuf {
    let folder = target().join("benchmarks");
    if is_smoke_test() { folder.join("smoke") } else { folder }
}

/// The repository's `target` folder, also for a package that is no member of its workspace.
pub fn target() -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("."));
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), PathBuf::from)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_documented_format() {
        let mut record = Record::default();
        record.time("a", Some(10.0), Some(5.0), &[("b", Some(30.0)), ("c", None)]);
        record.time("d", Some(1.0), None, &[]);
        record.time("filtered out", None, None, &[]);
        record.value("e", "bandwidth", 1.0, "GB/s");
        let json = serde_json::to_value(&record).unwrap();
        let row = |i: usize| json["rows"][i].clone();
        assert_eq!(
            row(0),
            serde_json::json!({"case": "a", "metric": "time", "value": 10.0, "unit": "ns", "floor_ratio": 0.5,
                "peer": "b", "peer_ratio": 3.0})
        );
        assert_eq!((row(1)["floor_ratio"].clone(), row(1)["peer"].clone()), (().into(), ().into()));
        assert_eq!((row(2)["metric"].clone(), row(2)["unit"].clone()), ("bandwidth".into(), "GB/s".into()));
        assert!(json["rows"][3].is_null() && json["machine"]["cores"].as_u64() > Some(0));
        assert_eq!(json["date"].as_str().map(str::len), Some(10));
        let again: Record = serde_json::from_value(json).unwrap();
        assert_eq!(again.rows, record.rows);
    }
}
