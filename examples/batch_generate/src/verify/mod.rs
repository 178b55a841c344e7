//! The same answers by another way, to compare the paged ones with: one sequence at a time, with a contiguous cache.
//!
//! - `reference` is candle's own model, where candle computes what the file says, or else
//! - `contiguous`: this program's model with attention as candle's models compute it, over concatenated tensors.
//! - `scenarios` has the operations of a cache other than appending tokens.
//! - `compare` compares the speed.

pub(crate) mod compare;
mod contiguous;
mod reference;
pub(crate) mod scenarios;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use inference::config::Config;
use inference::engine::{Outcome, Request};
use inference::sampling::{Random, Sampling};
use inference::shown::say;
pub(crate) use reference::Reference;

/// Checks that every sequence fits into the reference.
///
/// # Errors
///
/// If a prompt and its longest possible answer do not.
pub(crate) fn check(config: &Config, requests: &[Request]) -> Result<()> {
    let limit = Reference::limit(config);
    for (i, request) in requests.iter().enumerate() {
        let total = request.prompt.len().saturating_add(request.max_tokens);
        ensure!(
            total <= limit,
            "prompt {} with its answer may have {total} tokens, candle's own model can have {limit}",
            i + 1
        );
    }
    Ok(())
}

/// The most likely tokens after the prompt, one by one, and the time of each step.
pub(crate) fn generate(
    model: &mut Reference<'_>,
    request: &Request,
    is_end: impl Fn(u32) -> bool,
) -> Result<(Vec<u32>, Vec<Duration>)> {
    model.clear();
    let (mut tokens, mut times) = (Vec::new(), Vec::new());
    let mut input = request.prompt.clone();
    let mut position = 0;
    while tokens.len() < request.max_tokens && !tokens.last().is_some_and(|&token| is_end(token)) {
        let started = Instant::now();
        let logits = model.forward(&input, position)?;
        let token = Sampling::greedy().draw(&logits, &mut Random::new(0, 0))?;
        times.push(started.elapsed());
        position += input.len();
        input = vec![token];
        tokens.push(token);
    }
    Ok((tokens, times))
}

/// Computes every answer again with the reference, and compares token for token.
///
/// # Errors
///
/// If a token differs, or a sequence does not fit into the reference: see [`check`].
pub(crate) fn verify(
    model: &mut Reference<'_>,
    requests: &[Request],
    outcome: &Outcome,
    is_end: impl Fn(u32) -> bool + Copy,
) -> Result<()> {
    let mut wrong = 0;
    for (i, answer) in outcome.answers.iter().enumerate() {
        let request = &requests[answer.request];
        let (expected, _) = generate(model, request, is_end)?;
        if answer.tokens != expected {
            let same = answer.tokens.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            say(&format!("sequence {}: the first {same} tokens are the same, then they differ", i + 1));
            wrong += 1;
        }
    }
    let (n, name) = (outcome.answers.len(), model.name());
    if wrong > 0 {
        bail!("{wrong} of {n} sequences differ from {name}");
    }
    let tokens: usize = outcome.answers.iter().map(|answer| answer.tokens.len()).sum();
    let preemptions: usize = outcome.answers.iter().map(|answer| answer.preemptions).sum();
    say(&format!(
        "verified: {n} of {n} sequences, {tokens} tokens, are identical to {name}, {preemptions} preemptions"
    ));
    Ok(())
}
