//! What is below the cache: a sequence starts with what is there.

use std::time::{Duration, Instant};

use paged_attention::{BlockTable, FetchLimits, Tier};

use super::state::Engine;

/// The most that is read from the tier before a step. Sequences that decode wait that long; a sequence whose prefix is
/// longer reads on before the next steps.
const BYTES_PER_STEP: usize = 64 << 20;

/// How many tokens a second are computed, as long as that was not measured: more than a processor does.
const ASSUMED_RATE: f64 = 1000.0;

/// What is read from the tier before one step.
pub(super) struct Loads<'a> {
    tier: Option<&'a dyn Tier>,
    bytes_left: usize,
    rate: f64,
    /// Tokens that sequences have gained.
    pub(super) tokens: usize,
    pub(super) time: Duration,
}

impl<'a> Engine<'a> {
    pub(super) fn loads(&self) -> Loads<'a> {
        let rate = self.outcome.prefill.rate().unwrap_or(ASSUMED_RATE);
        Loads { tier: self.tier, bytes_left: BYTES_PER_STEP, rate, tokens: 0, time: Duration::ZERO }
    }
}

impl Loads<'_> {
    /// Adds to a table what the tier has of its `tokens`, which takes at most as long as to compute them. Returns whether
    /// there seems to be more for the next steps.
    pub(super) fn load(&mut self, table: &mut BlockTable, tokens: &[u32]) -> bool {
        let Some(tier) = self.tier else { return false };
        if self.bytes_left == 0 {
            return true;
        }
        let (started, before) = (Instant::now(), table.len());
        let most = (tokens.len() - before) as f64 / self.rate;
        let limits = FetchLimits::default().max_bytes(self.bytes_left).max_time(Duration::from_secs_f64(most));
        let fetched = table.fetch(tier, tokens, &limits);
        // What does not fit, or cannot be written, is computed.
        let inserted = table.insert(&fetched).unwrap_or(0);
        self.tokens += inserted;
        self.time += started.elapsed();
        // Not even one block fits into what may be read before a step, or it cannot be inserted: it is computed.
        let is_stuck = inserted == 0 && (fetched.bytes() > 0 || self.bytes_left == BYTES_PER_STEP);
        let waits = fetched.has_more() && !is_stuck;
        self.bytes_left = if waits { 0 } else { self.bytes_left - fetched.bytes() };
        waits
    }
}
