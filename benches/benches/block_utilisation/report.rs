//! The printed table and the record.

use std::fmt::Write;

use anyhow::{Result, ensure};
use benches::Record;

use crate::simulation::{ALLOCATORS, Outcome, Sample};

/// The result of one workload replayed through one allocator.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) workload: String,
    /// Slots of the pool.
    pub(crate) pool: usize,
    pub(crate) allocator: &'static str,
    pub(crate) block_size: usize,
    pub(crate) outcome: Outcome,
    /// The pool over time, where arrivals are timed.
    pub(crate) samples: Vec<Sample>,
}

/// All rows, in the order in which they were replayed.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) rows: Vec<Row>,
}

impl Report {
    /// The rows from `first` on as a table, in Markdown.
    pub(crate) fn table(&self, first: usize) -> String {
        let mut table = String::from(
            "| allocator | block | live / pool | live / reserved | mean batch | preemptions | recomputed | \
             skipped, most | wait, p50 | wait, p99 | prefix hit | logical / physical | ns per token |\n\
             |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
        );
        for Row { allocator, block_size, outcome, .. } in &self.rows[first..] {
            let percent = |share: f64| format!("{:.2} %", 100.0 * share);
            let ns = outcome.ns_per_token().map_or("-".into(), |ns| format!("{ns:.1}"));
            let [p50, p99] = [0.5, 0.99].map(|q| outcome.wait(q).map_or("-".into(), |wait| format!("{wait:.1} s")));
            // Writing to a string cannot fail.
            let _ = writeln!(
                table,
                "| {allocator} | {block_size} | {} | {} | {:.1} | {} | {} | {} | {p50} | {p99} | {} | {:.3} | {ns} |",
                percent(outcome.live_over_pool()),
                percent(outcome.live_over_reserved()),
                outcome.mean_batch(),
                outcome.preemptions(),
                percent(outcome.recomputed()),
                outcome.skipped(),
                percent(outcome.prefix_hit()),
                outcome.logical_over_physical(),
            );
        }
        table
    }

    /// The same numbers as a record; shares are fractions of 1.
    pub(crate) fn record(&self) -> Record {
        let mut record = Record::default();
        for Row { workload, pool, allocator, block_size, outcome, .. } in &self.rows {
            let case = format!("{workload}/{pool}/{allocator}/{block_size}");
            let mut add = |metric, value, unit| record.value(&case, metric, value, unit);
            add("live_over_pool", outcome.live_over_pool(), "share");
            add("live_over_reserved", outcome.live_over_reserved(), "share");
            add("mean_batch", outcome.mean_batch(), "sequences");
            add("preemptions", outcome.preemptions() as f64, "times");
            add("recomputed", outcome.recomputed(), "share");
            add("skipped_most", f64::from(outcome.skipped()), "times");
            for (metric, q) in [("wait_p50", 0.5), ("wait_p99", 0.99)] {
                if let Some(wait) = outcome.wait(q) {
                    add(metric, wait, "s");
                }
            }
            add("prefix_hit", outcome.prefix_hit(), "share");
            add("logical_over_physical", outcome.logical_over_physical(), "ratio");
            add("generated", outcome.generated() as f64, "tokens");
            if let Some(ns) = outcome.ns_per_token() {
                add("ns_per_token", ns, "ns");
            }
        }
        record
    }

    /// The row of a workload, an allocator and a block size.
    pub(crate) fn find(&self, workload: &str, allocator: &str, block_size: usize) -> Option<&Row> {
        let is = |row: &&Row| row.workload == workload && row.allocator == allocator && row.block_size == block_size;
        self.rows.iter().find(is)
    }

    /// The names of the workloads, sorted, each once.
    pub(crate) fn workloads(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.rows.iter().map(|row| row.workload.as_str()).collect();
        names.dedup();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Checks that every allocator has a row for every workload, and that the numbers are possible.
    ///
    /// # Errors
    ///
    /// Names the row and the number that is impossible, or the allocator that is missing.
    pub(crate) fn check_shape(&self) -> Result<()> {
        ensure!(!self.rows.is_empty(), "there are no rows");
        for workload in self.workloads() {
            for allocator in ALLOCATORS {
                let found = self.rows.iter().any(|row| row.workload == workload && row.allocator == allocator);
                ensure!(found, "{workload} has no row for {allocator}");
            }
        }
        for Row { workload, allocator, block_size, outcome, .. } in &self.rows {
            let row = format!("{workload}/{allocator}/{block_size}");
            let shares =
                [outcome.live_over_pool(), outcome.live_over_reserved(), outcome.recomputed(), outcome.prefix_hit()];
            for share in shares {
                ensure!((0.0..=1.0).contains(&share), "{row}: a share is {share}, not between 0 and 1");
            }
            ensure!(outcome.live_over_pool() > 0.0, "{row}: no slot was live");
            ensure!(outcome.generated() > 0, "{row}: no token was generated");
            ensure!(outcome.logical_over_physical() >= 1.0, "{row}: more live slots than tokens");
            ensure!(
                outcome.ns_per_token().is_some() == allocator.starts_with("paged_kv"),
                "{row}: bookkeeping is timed for paged_kv and for no other allocator"
            );
        }
        Ok(())
    }
}
