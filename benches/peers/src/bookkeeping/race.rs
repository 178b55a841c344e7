//! Runs that take turns.

use std::time::Instant;

use crate::{is_smoke_test, median};

const ROUNDS: usize = 201;
/// Rounds that do not count, in which caches and branch predictors warm up and lists grow to their size.
const WARM_UP: usize = 20;

type Run<'a, P> = Box<dyn FnMut(&P) + 'a>;

/// Runs that are timed in turn, ours first, so that other load on the machine disturbs all of them alike.
pub(crate) struct Race<'a, P> {
    runs: Vec<(String, Run<'a, P>)>,
}

/// The result of one peer.
#[derive(Debug, Clone)]
pub(crate) struct Standing {
    /// The peer's name.
    pub(crate) peer: String,
    /// Our median time in nanoseconds.
    pub(crate) ours: f64,
    /// The peer's median time in nanoseconds.
    pub(crate) theirs: f64,
    /// The median, over the rounds, of the peer's time divided by ours; above 1 we are ahead.
    pub(crate) ratio: f64,
}

impl<'a, P> Race<'a, P> {
    /// A race with `ours` and no peers yet.
    pub(crate) fn new(ours: impl FnMut(&P) + 'a) -> Self {
        Self { runs: vec![(String::new(), Box::new(ours))] }
    }

    /// Adds a peer.
    pub(crate) fn against(mut self, peer: impl Into<String>, theirs: impl FnMut(&P) + 'a) -> Self {
        self.runs.push((peer.into(), Box::new(theirs)));
        self
    }

    /// Runs all of them, round after round. `prepare` is called for each round and is not timed. A time is that of a
    /// run divided by its `units`.
    pub(crate) fn run(mut self, units: usize, mut prepare: impl FnMut() -> P) -> Vec<Standing> {
        let (warm_up, rounds) = if is_smoke_test() { (0, 2) } else { (WARM_UP, ROUNDS) };
        let mut times = vec![Vec::with_capacity(rounds); self.runs.len()];
        for round in 0..warm_up + rounds {
            let prepared = prepare();
            for ((_, run), times) in self.runs.iter_mut().zip(&mut times) {
                let started = Instant::now();
                run(&prepared);
                let taken = started.elapsed();
                if round >= warm_up {
                    times.push(taken.as_nanos() as f64 / units as f64);
                }
            }
        }
        let (ours, theirs) = times.split_at(1);
        let standing = |((peer, _), theirs): (&(String, Run<'_, P>), &Vec<f64>)| Standing {
            peer: peer.clone(),
            ours: median(ours[0].clone()),
            theirs: median(theirs.clone()),
            ratio: median(theirs.iter().zip(&ours[0]).map(|(theirs, ours)| theirs / ours).collect()),
        };
        self.runs[1..].iter().zip(theirs).map(standing).collect()
    }
}

impl<P> std::fmt::Debug for Race<'_, P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.runs.iter().map(|(peer, _)| peer)).finish()
    }
}
