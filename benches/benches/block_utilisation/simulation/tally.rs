//! The results of a replay.

use std::time::Duration;

use super::allocator::{Step, Usage};

/// The memory at one moment of a replay.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Seconds since the first arrival; steps if the queue is never empty.
    pub(crate) at: f64,
    /// The contents of the memory at that moment.
    pub(crate) usage: Usage,
}

/// Sums over the steps of a replay. Averages over time weight each step by its duration.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pool: usize,
    seconds: f64,
    live: f64,
    reserved: f64,
    logical: f64,
    running: f64,
    busy: f64,
    computed: u64,
    recomputed: u64,
    generated: u64,
    prompt_tokens: u64,
    matched: u64,
    preemptions: u64,
    skipped: u32,
    /// Seconds from the arrival of each request to its first step, under timed arrivals.
    pub(super) waits: Vec<f64>,
    /// The bookkeeping time of the steps in the current window, and the tokens generated in them.
    window: (Duration, usize),
    /// Nanoseconds per token of each finished window.
    windows: Vec<f64>,
}

/// Tokens in a window: enough for many requests to start and finish in it.
const WINDOW: usize = 10_000;

impl Outcome {
    pub(crate) fn of(pool: usize) -> Self {
        Self { pool, ..Self::default() }
    }

    /// Adds a step that took `seconds`, and the contents of the memory during it.
    pub(crate) fn add(&mut self, step: &Step, usage: &Usage, seconds: f64) {
        self.seconds += seconds;
        self.live += usage.live as f64 * seconds;
        self.reserved += usage.reserved as f64 * seconds;
        self.logical += usage.logical as f64 * seconds;
        self.running += usage.running as f64 * seconds;
        self.busy += if usage.running > 0 { seconds } else { 0.0 };
        // Sequences that have just started compute `prefilled` tokens; each of the others computes its previous token.
        self.computed += (step.prefilled + step.generated - step.started) as u64;
        self.recomputed += step.recomputed as u64;
        self.generated += step.generated as u64;
        self.prompt_tokens += step.prompt_tokens as u64;
        self.matched += step.matched as u64;
        self.preemptions += step.preempted as u64;
        self.skipped = self.skipped.max(step.skipped);
        self.window.0 += step.bookkeeping;
        self.window.1 += step.generated;
        if !self.window.0.is_zero() && self.window.1 >= WINDOW {
            self.windows.push(per_token(std::mem::take(&mut self.window)));
        }
    }

    /// Live slots as a share of all slots of the pool.
    pub(crate) fn live_over_pool(&self) -> f64 {
        share(self.live, self.pool as f64 * self.seconds)
    }

    /// Live slots as a share of the reserved slots; the difference to 1 is internal fragmentation.
    pub(crate) fn live_over_reserved(&self) -> f64 {
        share(self.live, self.reserved)
    }

    /// Tokens of the sequences divided by live slots; above 1 if prefixes are shared.
    pub(crate) fn logical_over_physical(&self) -> f64 {
        share(self.logical, self.live)
    }

    /// The mean number of running sequences while at least one runs.
    pub(crate) fn mean_batch(&self) -> f64 {
        share(self.running, self.busy)
    }

    /// Tokens computed again as a share of all computed tokens.
    pub(crate) fn recomputed(&self) -> f64 {
        share(self.recomputed as f64, self.computed as f64)
    }

    /// Prompt tokens matched in the prefix cache when a request first started, as a share of all prompt tokens.
    pub(crate) fn prefix_hit(&self) -> f64 {
        share(self.matched as f64, self.prompt_tokens as f64)
    }

    pub(crate) fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// How often other requests were admitted ahead of one waiting request, at most.
    pub(crate) fn skipped(&self) -> u32 {
        self.skipped
    }

    /// The quantile `q` of the seconds that requests waited before they started; `None` unless arrivals are timed.
    pub(crate) fn wait(&self, q: f64) -> Option<f64> {
        let mut waits = self.waits.clone();
        waits.sort_by(f64::total_cmp);
        waits.get(((waits.len() as f64 * q) as usize).min(waits.len().saturating_sub(1))).copied()
    }

    pub(crate) fn generated(&self) -> u64 {
        self.generated
    }

    /// Nanoseconds of all bookkeeping (admission, prompts, growth, end of sequences) per generated token. The median
    /// over windows of steps, since other load on the machine disturbs some. `None` for models, which have no
    /// bookkeeping.
    pub(crate) fn ns_per_token(&self) -> Option<f64> {
        let mut windows = self.windows.clone();
        if windows.is_empty() && !self.window.0.is_zero() {
            windows.push(per_token(self.window));
        }
        windows.sort_by(f64::total_cmp);
        windows.get(windows.len() / 2).copied()
    }
}

fn per_token((time, tokens): (Duration, usize)) -> f64 {
    time.as_nanos() as f64 / tokens.max(1) as f64
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
