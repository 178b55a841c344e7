//! Answers a list of requests.

use std::sync::Arc;

use anyhow::Result;
use paged_attention::{KvCache, Tier};

use super::{Answer, Engine, Event, LanguageModel, Limits, Request, RequestOptions, Statistics, check};
use crate::sampling::Sampling;

/// How requests are answered.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The maximum number of sequences that run together.
    pub max_batch: usize,
    /// The maximum number of new tokens in a step, for example [`STEP_TOKENS`](super::STEP_TOKENS). A sequence that
    /// decodes computes one token in every step. Prompts share the rest, which is always at least one token.
    pub step_tokens: usize,
    /// Answers per prompt.
    pub samples: usize,
    /// Sample `i` uses the seed `seed + i`.
    pub seed: u64,
    /// How tokens are drawn.
    pub sampling: Sampling,
}

/// The answers to all requests, and statistics.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// In the order of the requests; the samples of a request follow one another.
    pub answers: Vec<Answer>,
    /// Numbers of all steps.
    pub stats: Statistics,
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
    answers: &'a [(Vec<u32>, bool)],
}

impl<'a> Progress<'a> {
    /// The tokens of each answer so far, and whether it is complete, in the order of [`Outcome::answers`].
    pub fn answers(&self) -> impl Iterator<Item = (&'a [u32], bool)> {
        self.answers.iter().map(|(tokens, finished)| (&tokens[..], *finished))
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
    let Settings { max_batch, step_tokens, samples, seed, sampling } = *settings;
    let mut engine = Engine::new(cache, Limits { max_batch, step_tokens, step_time: None });
    if let Some(tier) = tier {
        engine = engine.over(tier);
    }
    for (number, request) in (0u64..).zip(requests) {
        // The random numbers of an answer do not depend on the requests before it.
        let seed = seed.wrapping_add(number << 32);
        engine.submit(request.clone(), RequestOptions { samples, seed, sampling, ..RequestOptions::default() });
    }
    let mut answers: Vec<Option<Answer>> = vec![None; requests.len() * samples];
    let mut so_far: Vec<(Vec<u32>, bool)> = vec![Default::default(); answers.len()];
    let mut finished = 0;
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
    while !engine.is_idle() {
        for event in engine.step(model, &is_end)? {
            match event {
                Event::Started { .. } => {}
                Event::Token { sequence, token, .. } => so_far[sequence].0.push(token),
                // No other request is submitted, so no number is given to another.
                Event::Finished { sequence, answer, .. } => {
                    so_far[sequence].1 = true;
                    answers[sequence] = Some(answer);
                    finished += 1;
                }
            }
        }
        progress(Progress {
            generated: so_far.iter().map(|(tokens, _)| tokens.len()).sum(),
            finished,
            running: engine.running(),
            waiting: engine.waiting(),
            in_use: cache.pool().in_use(),
            answers: &so_far,
        });
    }
    Ok(Outcome { answers: answers.into_iter().flatten().collect(), stats: engine.statistics() })
}
