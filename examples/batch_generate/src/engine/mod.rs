//! Continuous batching: sequences join the running ones when blocks allow, and leave when they finish.
//!
//! What several prompts have in common is computed once. When the pool is full, sequences that do not fit are left
//! out of the step, and the one with the fewest computed tokens goes back to the front of the queue; its answer so far
//! is kept, and what it had computed is found again if its memory was not needed meanwhile.
//!
//! - `check` refuses what can never be answered.
//! - `admit` lets waiting requests start.
//! - `step` is one forward pass: which sequences take part, and with how many tokens.
//! - `state` is what the engine knows of each sequence, and what becomes of it after a step.

mod admit;
mod check;
mod state;
mod step;

use std::time::Duration;

use anyhow::Result;
use candle_core::Tensor;
use paged_attention::{KvCache, Snapshot, Step};

use crate::sampling::Sampling;
pub use check::check;
use state::Engine;

/// New tokens of one step: long prompts are computed in pieces of so many, so that the others go on talking.
pub const STEP_TOKENS: usize = 512;

/// What the engine asks of a model.
pub trait LanguageModel {
    /// The most tokens a sequence can have.
    fn context(&self) -> usize;

    /// One forward pass: the logits of each sequence's last token, `(sequences, vocabulary)` of f32.
    ///
    /// # Errors
    ///
    /// If a token is not in the vocabulary, or a tensor operation fails.
    fn forward(&self, step: &Step<'_>) -> candle_core::Result<Tensor>;
}

/// A prompt in tokens, and how long its answer may be.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Tokens of the answer, at most.
    pub max_tokens: usize,
}

/// How to answer.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Sequences that run together, at most.
    pub max_batch: usize,
    /// New tokens of one step, at most, [`STEP_TOKENS`] say. A sequence that has its prompt computes one in every step;
    /// prompts share what is left, at least one token.
    pub step_tokens: usize,
    /// Answers for each prompt.
    pub samples: usize,
    /// Sample `i` draws with `seed + i`.
    pub seed: u64,
    /// How tokens are drawn.
    pub sampling: Sampling,
}

/// One answer to one prompt.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Which request it answers.
    pub request: usize,
    /// The generated tokens, the end token included if the model came to an end.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that it did not have to compute, because another had.
    pub cached_tokens: usize,
    /// How often it had to make room for others.
    pub preemptions: usize,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Request after request, sample after sample.
    pub answers: Vec<Answer>,
    /// Forward passes.
    pub steps: usize,
    /// Tokens of prompts that were computed, those computed again after a preemption included.
    pub computed_prompt_tokens: usize,
    /// Tokens that were found again after a preemption.
    pub resumed_tokens: usize,
    /// The pool when it was fullest.
    pub fullest: Option<Snapshot>,
    /// The most blocks held at once.
    pub peak_blocks: usize,
    /// Tokens per reserved slot, the mean over all steps; more than 1 when sequences share blocks.
    pub mean_utilisation: f64,
    /// New tokens in steps that computed some prompt, and the time of these steps.
    pub prefill: Work,
    /// New tokens in all other steps, and their time.
    pub decode: Work,
}

/// Tokens, and the time they took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    /// Tokens.
    pub tokens: usize,
    /// Time.
    pub time: Duration,
}

impl Work {
    /// Tokens per second, or nothing if there were none.
    pub fn rate(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.tokens as f64 / self.time.as_secs_f64())
    }
}

/// How far it has come, told after every step.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Tokens generated so far, of all answers.
    pub generated: usize,
    /// Answers that are complete.
    pub finished: usize,
    /// Sequences running.
    pub running: usize,
    /// Sequences waiting.
    pub waiting: usize,
    /// Blocks held.
    pub held: usize,
}

/// Answers all requests.
///
/// # Errors
///
/// If a request can never be answered with this model and pool: then nothing is computed. If a step fails, or if tables
/// that are not the engine's hold so many blocks that a request cannot start.
pub fn generate(
    model: &impl LanguageModel,
    cache: &KvCache,
    requests: &[Request],
    settings: &Settings,
    is_end: impl Fn(u32) -> bool,
    mut progress: impl FnMut(Progress),
) -> Result<Outcome> {
    check(model.context(), cache, requests, settings)?;
    let mut engine = Engine::new(cache, requests, settings);
    // Why this ends. The *longest* is the running sequence with the most computed tokens, the earliest among equals. It
    // is the first to be given tokens and blocks in a step, and it never yields while another runs. So in each step
    //
    // 1. a sequence finishes; or
    // 2. the longest computes at least one token; or
    // 3. the longest does not fit. Then one of the others yields, and none is admitted until all have fitted into a
    //    step: fewer sequences run in the next one. Alone the longest fits: `check` has counted its blocks, all blocks
    //    that it does not hold are available then, and its last block, if others could find it by its tokens, is
    //    written in place when there is no room for a copy.
    //
    // With S sequences in all, B in a batch and T computed tokens at most in each: 3 happens fewer than B times in a
    // row. Between two finishes the most computed tokens never fall and cannot exceed T, so 2 happens at most T times.
    // 1 happens S times. That makes S * (T + 1) * B steps at most.
    while engine.admit()? {
        engine.step(model, &is_end)?;
        progress(engine.progress());
    }
    Ok(engine.outcome())
}
