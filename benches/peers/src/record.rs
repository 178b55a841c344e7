//! The record of a run, in the format of all benchmarks of this repository.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::is_smoke_test;
use crate::machine::Machine;
use crate::turns::Standings;

/// One measured number, compared with at most one peer's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured, e.g. `decode 32/8x128 f16 batch 8 context 4096 threads 2`.
    pub case: String,
    /// What the number is, e.g. `time`.
    pub metric: String,
    /// Our number.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// The floor's time divided by ours; 1 is the limit of the machine.
    pub floor_ratio: Option<f64>,
    /// The peer that was measured in the same run, with its version.
    pub peer: Option<String>,
    /// The peer's time divided by ours; above 1 we are ahead.
    pub peer_ratio: Option<f64>,
}

/// The machine that a record was made on. Unlike [`Machine`] it can be read from a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// The processor's model name, or its architecture if the system does not say.
    pub cpu: String,
    /// Threads that can run at once.
    pub cores: usize,
    /// The operating system.
    pub os: String,
}

impl Place {
    fn this() -> Self {
        let Machine { cpu, cores, os } = Machine::this();
        Self { cpu, cores, os: os.into() }
    }
}

/// All numbers of one run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// The machine.
    pub machine: Place,
    /// The date of the run.
    pub date: String,
    /// The numbers.
    pub rows: Vec<Row>,
}

impl Default for Record {
    fn default() -> Self {
        Self { machine: Place::this(), date: jiff::Zoned::now().date().to_string(), rows: Vec::new() }
    }
}

impl Record {
    /// Adds the median time in nanoseconds of the first contender, with its ratios to the contender `floor` and to each
    /// of the others. Ratios are medians of each round's ratio.
    pub fn raced(&mut self, case: &str, standings: &Standings, floor: &str) {
        self.push_raced(case, "time", standings.time(0), "ns", standings, floor);
    }

    /// Does the same with a rate in place of the time: one piece of work is `units` tokens.
    pub fn raced_rate(&mut self, case: &str, standings: &Standings, floor: &str, units: f64) {
        self.push_raced(case, "rate", units / standings.time(0) * 1e9, "tokens/s", standings, floor);
    }

    fn push_raced(&mut self, case: &str, metric: &str, value: f64, unit: &str, standings: &Standings, floor: &str) {
        let floor_ratio = standings.find(floor).map(|floor| standings.ratio(floor, 0));
        let peers = standings.names().iter().enumerate().skip(1).filter(|(_, name)| *name != floor);
        let mut peers: Vec<_> = peers.map(|(i, name)| (Some(name.clone()), Some(standings.ratio(i, 0)))).collect();
        if peers.is_empty() {
            peers.push((None, None));
        }
        self.rows.extend(peers.into_iter().map(|(peer, peer_ratio)| Row {
            case: case.into(),
            metric: metric.into(),
            value,
            unit: unit.into(),
            floor_ratio,
            peer,
            peer_ratio,
        }));
    }

    /// Adds a rate, compared with the name and rate of a peer if there is one.
    pub fn compared(&mut self, case: &str, value: f64, unit: &str, peer: Option<(String, f64)>) {
        let (peer, peer_ratio) = peer.map(|(name, rate)| (name, value / rate)).unzip();
        let (case, metric, unit) = (case.into(), "rate".into(), unit.into());
        self.rows.push(Row { case, metric, value, unit, floor_ratio: None, peer, peer_ratio });
    }

    /// Adds another number about a case.
    pub fn value(&mut self, case: &str, metric: &str, value: f64, unit: &str) {
        let (case, metric, unit) = (case.into(), metric.into(), unit.into());
        self.rows.push(Row { case, metric, value, unit, floor_ratio: None, peer: None, peer_ratio: None });
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

    /// Writes the record to `target/benchmarks/peers.json` of the repository.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&self) -> Result<()> {
        let folder = target().join("benchmarks");
        // A smoke test's numbers mean nothing and must not replace real ones.
        let folder = if is_smoke_test() { folder.join("smoke") } else { folder };
        let file = folder.join("peers.json");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        fs::write(&file, serde_json::to_string_pretty(self)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The repository's `target` folder, not this package's own.
pub fn target() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("."));
    target.unwrap_or_else(|| repository.join("target"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_has_the_format_of_the_other_benchmarks() {
        let mut record = Record::default();
        record.compared("a", 30.0, "tokens/s", Some(("b".into(), 10.0)));
        record.value("a", "bandwidth", 1.0, "GB/s");
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!(
            json["rows"][0],
            serde_json::json!({"case": "a", "metric": "rate", "value": 30.0, "unit": "tokens/s", "floor_ratio": null,
                "peer": "b", "peer_ratio": 3.0})
        );
        assert!(json["machine"]["cores"].as_u64() > Some(0) && json["rows"][1]["peer"].is_null());
        assert_eq!(json["date"].as_str().map(str::len), Some(10));
        let again: Record = serde_json::from_value(json).unwrap();
        assert_eq!(again.rows, record.rows);
    }
}
