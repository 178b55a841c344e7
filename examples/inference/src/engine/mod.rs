//! Continuous batching: a waiting sequence starts when enough blocks are available, and leaves the batch when it
//! finishes.
//!
//! A prefix that several prompts have in common is computed once. When the pool is full, sequences that do not fit are
//! left out of the step, and the one with the fewest computed tokens is preempted: it goes back to the front of the
//! queue. Its answer so far is kept. Its full blocks stay cached until they are evicted, and it matches them when it
//! starts again.
//!
//! [`Engine`] gets requests at any time and is stepped, for a server; [`generate`] answers a list of requests with it.
//!
//! - `check` refuses requests that can never be answered.
//! - `admit` starts waiting requests.
//! - `step` computes one forward pass, and decides which sequences take part with how many tokens.
//! - `pace` keeps steps with prompts short, so that those who decode do not wait.
//! - `tier` reads from what is below the cache.
//! - `state` has the state of each sequence, and updates it after a step.
//! - `logprobs` has the probabilities of a token and its alternatives.
//! - `batch` has [`generate`].

mod admit;
mod batch;
mod check;
mod logprobs;
mod pace;
mod state;
mod step;
mod tier;

use std::time::Duration;

use candle_core::Tensor;
use paged_attention::{Attention, Salt, Snapshot, Step};

use crate::sampling::Sampling;
pub use batch::{Outcome, Progress, Settings, generate, generate_over};
pub use check::{check, why_never};
pub use logprobs::{Logprobs, TokenLogprob};
pub use state::Engine;

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

/// How a request is answered.
#[derive(Debug, Clone)]
pub struct RequestOptions {
    /// Answers to the prompt, which is computed once.
    pub samples: usize,
    /// Sample `i` uses the seed `seed + i`.
    pub seed: u64,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Only requests with an equal salt share what they have in common.
    pub salt: Salt,
    /// Also report the log probability of each token, and of this many alternatives.
    pub logprobs: Option<usize>,
}

impl Default for RequestOptions {
    /// One answer of the most likely tokens.
    fn default() -> Self {
        Self { samples: 1, seed: 0, sampling: Sampling::greedy(), salt: Salt::none(), logprobs: None }
    }
}

/// What bounds a step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The maximum number of sequences that run together.
    pub max_batch: usize,
    /// The maximum number of new tokens in a step, for example [`STEP_TOKENS`]. A sequence that decodes computes one
    /// token in every step. Prompts share the rest, which is always at least one token.
    pub step_tokens: usize,
    /// Steps compute so much of prompts that they take about this long, as far as the steps before tell.
    pub step_time: Option<Duration>,
}

/// What has happened to a sequence in a step.
#[derive(Debug, Clone)]
pub enum Event {
    /// It runs for the first time.
    Started {
        /// The number that [`Engine::submit`] returned.
        sequence: usize,
    },
    /// It has one more token.
    Token {
        /// The number that [`Engine::submit`] returned.
        sequence: usize,
        /// The token.
        token: u32,
        /// Its log probability, if the request asks for it.
        logprobs: Option<Logprobs>,
    },
    /// It is complete; its number may be given to another.
    Finished {
        /// The number that [`Engine::submit`] returned.
        sequence: usize,
        /// The whole answer.
        answer: Answer,
        /// Why it is complete.
        reason: FinishReason,
    },
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model generated an end token.
    Stop,
    /// It has as many tokens as it may have.
    Length,
}

/// One answer to one prompt.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The index of the request that it answers, in the order in which they were submitted.
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

/// Numbers of all steps so far.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
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
