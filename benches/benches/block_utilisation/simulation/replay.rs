//! Time: who arrives when, and how long a step takes.

use std::collections::VecDeque;

use anyhow::Result;

use super::allocator::{Allocator, Pool};
use super::request::Request;
use super::tally::{Outcome, Sample};

/// When requests arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrivals {
    /// As soon as there is a place in a queue of 64, which is never empty. The replay ends when no request is left to
    /// fill it with.
    Saturated,
    /// As recorded. The replay ends when all are answered.
    Timed,
}

/// How many wait when the queue is kept full: more than any scheduler here looks at.
const QUEUE: usize = 64;

/// What a step takes under timed arrivals, in seconds: to read the weights and the cache, and for each token of a prompt.
/// About what a model of seven billion parameters takes on one accelerator. The memory's utilisation depends on the load
/// that these make of the arrivals; the books do not.
const STEP: f64 = 0.025;
const PREFILL: f64 = 50e-6;

/// Replays `requests` through an allocator, and shows each step to `watch`. Requests longer than the pool accepts are
/// left out.
///
/// # Errors
///
/// What the allocator fails with.
pub(crate) fn replay<'a>(
    requests: &'a [Request],
    arrivals: Arrivals,
    pool: Pool,
    allocator: &mut dyn Allocator<'a>,
    mut watch: impl FnMut(&Sample),
) -> Result<Outcome> {
    let accepted = requests.iter().filter(|request| request.input + request.output <= pool.max_len);
    let mut coming: VecDeque<&Request> = accepted.collect();
    let mut outcome = Outcome::of(pool.tokens);
    let mut now = 0.0;
    loop {
        match arrivals {
            Arrivals::Saturated => {
                while allocator.waiting() < QUEUE {
                    let Some(request) = coming.pop_front() else { return Ok(outcome) };
                    allocator.enqueue(request);
                }
            }
            Arrivals::Timed => {
                while let Some(request) = coming.front().copied().filter(|request| request.arrival <= now) {
                    coming.pop_front();
                    allocator.enqueue(request);
                }
            }
        }
        let step = allocator.step()?;
        let usage = allocator.usage();
        let seconds = match (arrivals, coming.front()) {
            (Arrivals::Saturated, _) => 1.0,
            (Arrivals::Timed, Some(next)) if usage.running == 0 && allocator.waiting() == 0 => next.arrival - now,
            (Arrivals::Timed, None) if usage.running == 0 && allocator.waiting() == 0 => return Ok(outcome),
            (Arrivals::Timed, _) => STEP + PREFILL * step.prefilled as f64,
        };
        outcome.add(&step, &usage, seconds);
        now += seconds;
        watch(&Sample { at: now, usage });
    }
}
