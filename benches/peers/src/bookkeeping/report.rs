//! The table of results and targets.

use std::fmt;

use harness::{Race, Row};

/// The target of a case. A miss is reported, but is not an error.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Target {
    /// The least ratio to the peer.
    pub(crate) ratio: Option<f64>,
    /// The largest allowed value of our number.
    pub(crate) at_most: Option<f64>,
    /// The smallest allowed value of our number.
    pub(crate) at_least: Option<f64>,
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

/// Our time compared with one peer's.
#[derive(Debug, Clone)]
pub(crate) struct Comparison {
    /// The peer's name.
    pub(crate) peer: String,
    /// Our median time in nanoseconds.
    pub(crate) ours: f64,
    /// The peer's median time in nanoseconds.
    pub(crate) theirs: f64,
    /// The median, over the rounds, of the peer's time divided by ours; above 1 we are ahead.
    pub(crate) ratio: f64,
}

/// Compares the first contender of a race with each other one. A turn has this number of `units`; times are of one.
pub(crate) fn comparisons(race: &Race, units: usize) -> impl Iterator<Item = Comparison> {
    race.names().iter().enumerate().skip(1).map(move |(at, peer)| Comparison {
        peer: peer.clone(),
        ours: race.time(0) / units as f64,
        theirs: race.time(at) / units as f64,
        ratio: race.ratio(at, 0),
    })
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Line {
    /// What was measured.
    pub(crate) case: String,
    /// What the number is, e.g. `time`.
    pub(crate) metric: &'static str,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// Our number.
    pub(crate) ours: f64,
    /// The peer that was measured in the same run.
    pub(crate) peer: String,
    /// The peer's number.
    pub(crate) theirs: f64,
    /// The peer's time divided by ours, or our throughput divided by the peer's; above 1 we are ahead.
    pub(crate) ratio: f64,
    /// The target, if this comparison has one.
    pub(crate) target: Option<Target>,
}

impl Line {
    /// A comparison of times in nanoseconds.
    pub(crate) fn time(case: &str, comparison: Comparison, target: Option<Target>) -> Self {
        let Comparison { peer, ours, theirs, ratio } = comparison;
        Self { case: case.into(), metric: "time", unit: "ns", ours, peer, theirs, ratio, target }
    }

    fn row(&self) -> Row {
        Row {
            case: format!("allocation {}", self.case),
            metric: self.metric.into(),
            value: self.ours,
            unit: self.unit.into(),
            floor_ratio: None,
            peer: Some(self.peer.clone()),
            peer_ratio: Some(self.ratio),
        }
    }
}

/// All comparisons of one benchmark.
#[derive(Debug, Default)]
pub(crate) struct Report {
    lines: Vec<Line>,
}

impl Report {
    /// Adds a comparison.
    pub(crate) fn push(&mut self, line: Line) {
        self.lines.push(line);
    }

    /// The comparisons as rows of the record.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Row> {
        self.lines.iter().map(Line::row)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn line(target: Target) -> Line {
        let comparison = Comparison { peer: "b".into(), ours: 10.0, theirs: 30.0, ratio: 3.0 };
        Line::time("a", comparison, Some(target))
    }

    #[test]
    fn a_target_is_met_if_all_its_limits_are() {
        let met = |target: Target| target.is_met(&line(target));
        assert!(met(Target { ratio: Some(3.0), at_most: Some(10.0), at_least: Some(10.0) }));
        assert!(!met(Target { ratio: Some(3.1), ..Target::default() }));
        assert!(!met(Target { at_most: Some(9.9), ..Target::default() }));
        assert!(!met(Target { at_least: Some(10.1), ..Target::default() }));
    }
}
