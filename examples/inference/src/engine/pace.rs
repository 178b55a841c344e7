//! How much of prompts a step computes, so that those who decode get their next tokens in time.

use std::time::Duration;

/// How much of the bound a step is meant to take: some take longer than the ones before them.
const AIM: f64 = 0.8;

/// The tokens of prompts in the first step, whose time nobody knows.
const FIRST: usize = 64;

/// A step computes at least so many tokens of a prompt, however long that takes: with less, its fixed costs would be most
/// of it.
const LEAST: usize = 8;

/// The times of the steps so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Seconds that a step may take.
    bound: Option<f64>,
    /// Seconds of a step without prompts: an average of the last ones.
    without: Option<f64>,
    /// Seconds that a token of a prompt adds: it falls slowly and rises at once.
    per_token: Option<f64>,
}

impl Pace {
    pub(super) fn new(bound: Option<Duration>) -> Self {
        Self { bound: bound.map(|bound| bound.as_secs_f64()), without: None, per_token: None }
    }

    /// How many tokens of prompts a step may compute, of at most `most`.
    pub(super) fn budget(&self, most: usize) -> usize {
        let Some(bound) = self.bound else { return most };
        let tokens = match self.per_token {
            None => FIRST,
            Some(per_token) => ((AIM * bound - self.without.unwrap_or(0.0)) / per_token).max(0.0) as usize,
        };
        tokens.max(LEAST).min(most)
    }

    /// Takes note of the time of a step with so many tokens of prompts.
    pub(super) fn record(&mut self, prompt_tokens: usize, time: Duration) {
        let seconds = time.as_secs_f64();
        if prompt_tokens == 0 {
            self.without = Some(self.without.map_or(seconds, |before| 0.8 * before + 0.2 * seconds));
            return;
        }
        // What was measured without prompts may have been disturbed.
        let added = (seconds - self.without.unwrap_or(0.0)).max(0.1 * seconds) / prompt_tokens as f64;
        self.per_token = Some(self.per_token.map_or(added, |before| added.max(0.9 * before + 0.1 * added)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of a machine on which a step takes 12 ms, and 2 ms for each token of a prompt, which become slower.
    #[test]
    fn steps_stay_below_the_bound_and_use_most_of_it() {
        let mut pace = Pace::new(Some(Duration::from_millis(250)));
        pace.record(0, Duration::from_millis(12));
        let mut took = Vec::new();
        for step in 0..40 {
            let n = pace.budget(512);
            let time = 0.012 + n as f64 * (0.002 + 0.00005 * f64::from(step));
            pace.record(n, Duration::from_secs_f64(time));
            took.push(time);
        }
        assert!(took.iter().all(|&time| time < 0.25), "{took:?}");
        assert!(took[1..].iter().all(|&time| time > 0.15), "{took:?}");
    }

    #[test]
    fn a_disturbed_step_is_forgotten_and_small_chunks_are_not_a_trap() {
        let mut pace = Pace::new(Some(Duration::from_millis(100)));
        let mut step = |factor: f64| {
            let n = pace.budget(512);
            pace.record(n, Duration::from_secs_f64(factor * (0.012 + 0.001 * n as f64)));
            n
        };
        let before = (0..10).map(|_| step(1.0)).last();
        assert_eq!(step(1.0), before.unwrap());
        step(20.0);
        assert_eq!(step(1.0), LEAST);
        let after = (0..60).map(|_| step(1.0)).last();
        assert!(after.unwrap() > 40, "{after:?} of {before:?}");
    }

    #[test]
    fn without_a_bound_there_is_none() {
        let mut pace = Pace::new(None);
        pace.record(1, Duration::from_secs(100));
        assert_eq!(pace.budget(512), 512);
    }
}
