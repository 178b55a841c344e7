//! The replay of a workload: when requests arrive, and how long a step takes.

use std::collections::VecDeque;

use anyhow::Result;

use super::allocator::{Allocator, Pool};
use super::request::Request;
use super::tally::{Outcome, Sample};

/// When requests arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrivals {
    /// As soon as fewer than 256 requests wait (or half of all, if that is less), so that the queue is never empty. The
    /// replay ends when no request is left to fill the queue.
    Saturated,
    /// As recorded. The replay ends when all requests are answered.
    Timed,
}

/// Waiting requests when the queue is kept full: more than any scheduler here considers.
const QUEUE: usize = 256;

/// Seconds of a step under timed arrivals: `STEP` to read the weights and the cache, and `PREFILL` for each token of a
/// prompt, about as long as a model of seven billion parameters takes on one accelerator. They decide the load, and so
/// the utilisation of the memory, but not the cost of the bookkeeping.
const STEP: f64 = 0.025;
const PREFILL: f64 = 50e-6;

/// Replays `requests` through an allocator, and calls `watch` after each step. Requests longer than `pool.max_len` are
/// left out.
///
/// # Errors
///
/// If a step of the allocator fails.
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
    // A short replay is a test.
    let queue = QUEUE.min(coming.len() / 2);
    let mut now = 0.0;
    loop {
        match arrivals {
            Arrivals::Saturated => {
                while allocator.waiting() < queue {
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
        if arrivals == Arrivals::Timed {
            let waited = |number: &u32| now - requests[*number as usize].arrival;
            outcome.waits.extend(step.first_started.iter().map(waited));
        }
        outcome.add(&step, &usage, seconds);
        now += seconds;
        watch(&Sample { at: now, usage });
    }
}
