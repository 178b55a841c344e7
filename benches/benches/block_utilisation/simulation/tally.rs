//! What a replay adds up to.

use std::time::Duration;

use super::allocator::{Step, Usage};

/// One moment of a replay.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Seconds since the first arrival; without arrivals, steps.
    pub(crate) at: f64,
    /// What the memory held then.
    pub(crate) usage: Usage,
}

/// Sums over the steps of a replay; what is an average over time weighs each step by how long it took.
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
    found: u64,
    preemptions: u64,
    skipped: u32,
    /// The books of some steps, and the tokens generated in them.
    window: (Duration, usize),
    /// Nanoseconds for each token, of each window.
    windows: Vec<f64>,
}

/// Tokens that are timed together: enough for many requests to come and go meanwhile.
const WINDOW: usize = 10_000;

impl Outcome {
    pub(crate) fn of(pool: usize) -> Self {
        Self { pool, ..Self::default() }
    }

    /// Adds a step that took `seconds`, and what the memory held meanwhile.
    pub(crate) fn add(&mut self, step: &Step, usage: &Usage, seconds: f64) {
        self.seconds += seconds;
        self.live += usage.live as f64 * seconds;
        self.reserved += usage.reserved as f64 * seconds;
        self.logical += usage.logical as f64 * seconds;
        self.running += usage.running as f64 * seconds;
        self.busy += if usage.running > 0 { seconds } else { 0.0 };
        // Who has just started generates from its prompt; the others store the token before.
        self.computed += (step.prefilled + step.generated - step.started) as u64;
        self.recomputed += step.recomputed as u64;
        self.generated += step.generated as u64;
        self.prompt_tokens += step.prompt_tokens as u64;
        self.found += step.found as u64;
        self.preemptions += step.preempted as u64;
        self.skipped = self.skipped.max(step.skipped);
        self.window.0 += step.bookkeeping;
        self.window.1 += step.generated;
        if !self.window.0.is_zero() && self.window.1 >= WINDOW {
            self.windows.push(per_token(std::mem::take(&mut self.window)));
        }
    }

    /// Places with tokens, of all places of the pool.
    pub(crate) fn live_over_pool(&self) -> f64 {
        share(self.live, self.pool as f64 * self.seconds)
    }

    /// Places with tokens, of the places set aside: what is missing to 1 is lost inside.
    pub(crate) fn live_over_reserved(&self) -> f64 {
        share(self.live, self.reserved)
    }

    /// Tokens of the sequences, for each place that holds one: above 1 where prefixes are shared.
    pub(crate) fn logical_over_physical(&self) -> f64 {
        share(self.logical, self.live)
    }

    /// Sequences that run at once, while any does.
    pub(crate) fn mean_batch(&self) -> f64 {
        share(self.running, self.busy)
    }

    /// Tokens computed again, of all tokens computed.
    pub(crate) fn recomputed(&self) -> f64 {
        share(self.recomputed as f64, self.computed as f64)
    }

    /// Prompt tokens found in the cache when a request first started, of all prompt tokens.
    pub(crate) fn prefix_hit(&self) -> f64 {
        share(self.found as f64, self.prompt_tokens as f64)
    }

    pub(crate) fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// How often others went ahead of one request, at most.
    pub(crate) fn skipped(&self) -> u32 {
        self.skipped
    }

    pub(crate) fn generated(&self) -> u64 {
        self.generated
    }

    /// Nanoseconds in the books for each token generated, everything included: admission, prompts, growth, leaving.
    /// The median of windows of steps, since neighbours of the machine disturb some. None for models, which keep no books.
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

fn share(of: f64, all: f64) -> f64 {
    if all > 0.0 { of / all } else { 0.0 }
}
