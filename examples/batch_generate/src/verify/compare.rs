//! Compares the speed of decoding with that of a contiguous cache.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use paged_attention::{KvCache, KvDtype};

use super::{Reference, generate};
use inference::engine::{self, Request, Settings};
use inference::median::median;
use inference::model::Model;
use inference::sampling::Sampling;
use inference::weights::Weights;

/// Tokens of a prompt.
const CONTEXT: usize = 128;
/// Tokens that are decoded after it.
const TOKENS: usize = 32;
const ROUNDS: usize = 5;
/// The longest sequence.
pub(crate) const LONGEST: usize = CONTEXT + TOKENS;

/// Checks that the sequences fit into the model's context.
///
/// # Errors
///
/// If the context is too short.
pub(crate) fn check(context: usize) -> Result<()> {
    ensure!(context >= LONGEST, "the comparison needs {LONGEST} tokens, the model's context is {context} tokens");
    Ok(())
}

/// Measures decoding. Each round measures, one after the other, the contiguous loop, with the weights as stored and as
/// ours, a batch of 1, and a batch of 8.
///
/// # Errors
///
/// If a step fails.
pub(crate) fn compare(path: &Path, model: &Model, dtype: KvDtype, weights: Weights) -> Result<()> {
    // Arbitrary tokens, and no end token, so that every run has the same length.
    let token = |i: usize| ((1000 + 7 * i) % model.vocabulary()) as u32;
    let request = |max_tokens| Request { prompt: (0..CONTEXT).map(token).collect(), max_tokens };
    let mut contiguous = Reference::load(path, model, weights)?;
    let mut stored = if contiguous.is_candle() { Some(Reference::load(path, model, Weights::Stored)?) } else { None };
    let loop_rate = |model: &mut Reference<'_>, tokens: usize| -> Result<f64> {
        let (_, times) = generate(model, &request(tokens), |_| false)?;
        Ok((tokens - 1) as f64 / times[1..].iter().sum::<Duration>().as_secs_f64())
    };
    let paged = |batch: usize| -> Result<f64> {
        let cache = KvCache::builder_of(model.groups()).blocks(batch * 16).dtype(dtype).build()?;
        let requests = vec![request(TOKENS); batch];
        let (sampling, step_tokens) = (Sampling::greedy(), engine::STEP_TOKENS);
        let settings = Settings { max_batch: 8, step_tokens, samples: 1, seed: 0, sampling };
        let outcome = engine::generate(model, &cache, &requests, &settings, |_| false, |_| ())?;
        Ok(outcome.stats.decode.rate().unwrap_or_default())
    };
    let mut rates: Vec<[f64; 4]> = Vec::new();
    for _ in 0..ROUNDS {
        // The weights as stored can be ten times slower, so they decode fewer tokens.
        let stored = stored.as_mut().map_or(Ok(f64::NAN), |model| loop_rate(model, TOKENS / 4))?;
        rates.push([stored, loop_rate(&mut contiguous, TOKENS)?, paged(1)?, paged(8)?]);
    }
    let rate = |i: usize| median(rates.iter().map(|round| round[i]).collect());
    let ratio = |a: usize, b: usize| median(rates.iter().map(|round| round[a] / round[b]).collect());
    let mut text = format!("decode at context {CONTEXT}, tokens/s, median of {ROUNDS} rounds in turn\n");
    let mut line = |what: &str, rate: f64, note: String| {
        text += &format!("{what:<41}{rate:>7.1}   {note}");
        text.truncate(text.trim_end().len());
        text.push('\n');
    };
    match &stored {
        Some(_) => {
            line("candle's own loop, weights as stored", rate(0), String::new());
            line("candle's own loop, weights as ours", rate(1), String::new());
            let note = format!("{:.2}x and {:.2}x the two above", ratio(2, 0), ratio(2, 1));
            line("paged, batch 1", rate(2), note);
        }
        None => {
            line("contiguous cache (candle has no such model)", rate(1), String::new());
            line("paged, batch 1", rate(2), format!("{:.2}x the one above", ratio(2, 1)));
        }
    }
    line("paged, batch 8", rate(3), format!("{:.2}x batch 1", ratio(3, 2)));
    // A closed pipe is not an error.
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(())
}
