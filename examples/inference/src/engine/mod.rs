//! Continuous batching: a waiting sequence starts when enough blocks are available, and leaves the batch when it
//! finishes.
//!
//! A prefix that several prompts have in common is computed once. When the pool is full, sequences that do not fit are
//! left out of the step, and the one with the fewest computed tokens is preempted: it goes back to the front of the
//! queue. Its answer so far is kept. Its full blocks stay cached until they are evicted, and it matches them when it
//! starts again.
//!
//! - `check` refuses requests that can never be answered.
//! - `admit` starts waiting requests.
//! - `step` computes one forward pass, and decides which sequences take part with how many tokens.
//! - `tier` reads from what is below the cache.
//! - `state` has the state of each sequence, and updates it after a step.

mod admit;
mod check;
mod state;
mod step;
mod tier;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use candle_core::Tensor;
use paged_attention::{Attention, KvCache, Snapshot, Step, Tier};

use crate::sampling::Sampling;
pub use check::check;
use state::{Engine, Sequence};
use tier::Loads;

/// The usual limit of new tokens in a step. Long prompts are computed in chunks of this size, so that the other
/// sequences go on decoding.
pub const STEP_TOKENS: usize = 512;

/// What the engine needs from a model.
pub trait LanguageModel {
    /// The maximum number of tokens in a sequence.
    fn context(&self) -> usize;

    /// The options of its attention.
    fn attention(&self) -> Attention;

    /// One forward pass: the logits of the step's [`logits_rows`](Step::logits_rows), `(rows, vocabulary)` of f32.
    ///
    /// # Errors
    ///
    /// If a token is not in the vocabulary, or a tensor operation fails.
    fn forward(&self, step: &Step<'_>) -> candle_core::Result<Tensor>;
}

/// The tokens of a prompt, and the maximum length of its answer.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The maximum number of tokens of the answer.
    pub max_tokens: usize,
}

/// How requests are answered.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The maximum number of sequences that run together.
    pub max_batch: usize,
    /// The maximum number of new tokens in a step, for example [`STEP_TOKENS`]. A sequence that decodes computes one
    /// token in every step. Prompts share the rest, which is always at least one token.
    pub step_tokens: usize,
    /// Answers per prompt.
    pub samples: usize,
    /// Sample `i` uses the seed `seed + i`.
    pub seed: u64,
    /// How tokens are drawn.
    pub sampling: Sampling,
}

/// One answer to one prompt.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The index of the request that it answers.
    pub request: usize,
    /// The generated tokens, including the end token if the model generated one.
    pub tokens: Vec<u32>,
    /// The number of tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that were not computed for this answer, because another sequence had computed them, or an
    /// earlier process.
    pub cached_tokens: usize,
    /// How often it was preempted.
    pub preemptions: usize,
}

/// The answers to all requests, and statistics.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// In the order of the requests; the samples of a request follow one another.
    pub answers: Vec<Answer>,
    /// The number of forward passes.
    pub steps: usize,
    /// Tokens of prompts that were computed, including those computed again after a preemption.
    pub computed_prompt_tokens: usize,
    /// Tokens that were matched in the cache after a preemption, instead of computed again.
    pub resumed_tokens: usize,
    /// The pool in the step that used most blocks.
    pub fullest: Option<Snapshot>,
    /// The largest number of units of the pool in use in a step: blocks, if there is one group of layers.
    pub peak_blocks: usize,
    /// Tokens per slot of the blocks in use, the mean over all steps. It is more than 1 if sequences share blocks.
    pub mean_utilisation: f64,
    /// The tokens that sequences attended to in all steps together, in the first group of layers.
    pub read_tokens: usize,
    /// Those of them that were read together with those of another sequence, because the blocks were the same.
    pub shared_tokens: usize,
    /// Tokens that were read from the tier, and how long that took.
    pub read_from_tier: Work,
    /// New tokens in steps that computed a part of a prompt, and the time of these steps.
    pub prefill: Work,
    /// New tokens in all other steps, and their time.
    pub decode: Work,
}

/// A number of computed tokens, and the time they took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    /// Tokens.
    pub tokens: usize,
    /// Time.
    pub time: Duration,
}

impl Work {
    /// Tokens per second; `None` if there were no tokens.
    pub fn rate(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.tokens as f64 / self.time.as_secs_f64())
    }
}

/// The progress of [`generate`] after a step.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Tokens generated so far, of all answers.
    pub generated: usize,
    /// Answers that are complete.
    pub finished: usize,
    /// Running sequences.
    pub running: usize,
    /// Waiting sequences.
    pub waiting: usize,
    /// Units of the pool in use: blocks, if there is one group of layers.
    pub in_use: usize,
    sequences: &'a [Sequence],
}

impl<'a> Progress<'a> {
    /// The tokens of each answer so far, and whether it is complete, in the order of [`Outcome::answers`].
    pub fn answers(&self) -> impl Iterator<Item = (&'a [u32], bool)> {
        self.sequences.iter().map(|sequence| (&sequence.answer.tokens[..], sequence.finished))
    }
}

/// Answers all requests, and calls `progress` after every step.
///
/// # Errors
///
/// If a request can never be answered with this model and pool; then nothing is computed. If a step fails. If tables
/// outside the engine use so many blocks that no request can run.
pub fn generate(
    model: &impl LanguageModel,
    cache: &KvCache,
    requests: &[Request],
    settings: &Settings,
    is_end: impl Fn(u32) -> bool,
    progress: impl FnMut(Progress<'_>),
) -> Result<Outcome> {
    generate_over(None, model, cache, requests, settings, is_end, progress)
}

/// The same, with a tier below the cache: what prompts have in common with sequences that were stored there is read
/// instead of computed. The engine stores nothing there: that is what `BlockPool::offload_to` is
/// for.
///
/// # Errors
///
/// As [`generate`]. A tier that fails is no error.
pub fn generate_over(
    tier: Option<Arc<dyn Tier>>,
    model: &impl LanguageModel,
    cache: &KvCache,
    requests: &[Request],
    settings: &Settings,
    is_end: impl Fn(u32) -> bool,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<Outcome> {
    check(model.context(), cache, requests, settings)?;
    let mut engine = Engine::new(cache, requests, settings);
    engine.loads = tier.map(Loads::new);
    // Why this terminates. The *longest* is the running sequence with the most computed tokens, the earliest among
    // equals. It gets tokens and blocks first in each step, and it is never preempted while another sequence runs. So
    // each step is one of these cases:
    //
    // 1. A sequence finishes.
    // 2. The longest computes at least one token.
    // 3. The longest does not fit. Then another sequence is preempted, and none is admitted until all running sequences
    //    have fitted into a step, so fewer sequences run in the next step. Alone, the longest fits: `check` has counted
    //    its blocks, and all blocks that it does not use are available then. If its last block is cached, it is written
    //    in place when there is no room for a copy.
    //
    // With a tier there are other steps in between: the longest waits for what is read, as long as it would take to compute
    // it, and others compute meanwhile. It does so once, since it is not admitted again, and its length never decreases.
    //
    // Let S be the number of sequences, B the maximum batch, and T the maximum number of computed tokens of a sequence.
    // Case 3 happens fewer than B times in a row. Between two finishes, the number of computed tokens of the longest
    // never decreases and cannot exceed T, so case 2 happens at most T times. Case 1 happens S times. So there are at
    // most S * (T + 1) * B steps.
    while engine.admit()? {
        engine.step(model, &is_end)?;
        progress(engine.progress());
    }
    Ok(engine.outcome())
}
