//! How fast the model decodes and computes prompts, by batch and context.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use paged_attention::{BlockTable, KvCache, KvDtype, TableOptions};

use crate::engine::{STEP_TOKENS, Work};
use crate::model::Model;
use crate::sampling::{Random, Sampling};

/// Rounds that count.
const ROUNDS: usize = 7;
/// Tokens that each sequence decodes in a round.
const TOKENS: usize = 8;

/// Sequences that all have the same number of tokens in a cache of their own, each in blocks of its own.
#[derive(Debug)]
pub struct Filled<'m> {
    model: &'m Model,
    cache: KvCache,
    tables: Vec<BlockTable>,
    context: usize,
    /// The token that each sequence computes next.
    next: Vec<u32>,
    prefill: Work,
}

impl<'m> Filled<'m> {
    /// Computes a prompt of `context` tokens, in the pieces in which the engine computes it, and gives each of `batch`
    /// sequences a copy of its blocks, with room for `room` more tokens.
    ///
    /// # Errors
    ///
    /// If the batch or the context is 0, the model's context is smaller, the memory cannot be had, or a step fails.
    pub fn new(model: &'m Model, dtype: KvDtype, batch: usize, context: usize, room: usize) -> Result<Self> {
        check_one(batch, context, room, model.context())?;
        let total = context + room;
        let block_size = 16;
        let blocks = batch.saturating_mul(total.div_ceil(block_size));
        let cache = KvCache::builder(model.shape()).block_size(block_size).blocks(blocks).dtype(dtype).build()?;

        // Private: equal tokens would share their blocks, and less memory would be read.
        let mut first = cache.table_with(&TableOptions::default().private());
        let prompt = prompt(context, model.vocabulary());
        let started = Instant::now();
        let mut next = 0;
        for piece in prompt.chunks(STEP_TOKENS) {
            let mut step = cache.step();
            step.push(&mut first, piece)?;
            let logits = model.forward(&step)?.to_vec2::<f32>()?;
            next = likeliest(&logits[0])?;
            step.commit()?;
        }
        let prefill = Work { tokens: context, time: started.elapsed() };

        // A copy to the host comes back any number of times, into other blocks each time.
        let copy = first.swap_out()?;
        let tables = (0..batch).map(|_| copy.swap_in()).collect::<Result<_, _>>()?;
        Ok(Self { model, cache, tables, context, next: vec![next; batch], prefill })
    }

    /// Computes `tokens` tokens for each sequence, one step after the other, then forgets them again; each step ends with
    /// the most likely next tokens.
    ///
    /// # Errors
    ///
    /// If there is no room for them, or a step fails.
    pub fn decode(&mut self, tokens: usize) -> Result<Decoded> {
        // What an error has left of the last time.
        self.forget()?;
        let mut next = self.next.clone();
        let mut decoded = Decoded { tokens: vec![Vec::new(); self.batch()], time: Duration::ZERO };
        for _ in 0..tokens {
            let started = Instant::now();
            let mut step = self.cache.step();
            for (table, token) in self.tables.iter_mut().zip(&next) {
                step.push(table, &[*token])?;
            }
            let logits = self.model.forward(&step)?.to_vec2::<f32>()?;
            step.commit()?;
            for (token, logits) in next.iter_mut().zip(&logits) {
                *token = likeliest(logits)?;
            }
            decoded.time += started.elapsed();
            for (tokens, token) in decoded.tokens.iter_mut().zip(&next) {
                tokens.push(*token);
            }
        }
        self.forget()?;
        Ok(decoded)
    }

    /// Back to the context.
    fn forget(&mut self) -> Result<()> {
        for table in &mut self.tables {
            table.truncate(self.context)?;
        }
        Ok(())
    }

    /// How many sequences there are.
    pub fn batch(&self) -> usize {
        self.tables.len()
    }

    /// How many tokens each has.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The tokens of the one prompt that was computed, and the time that it took.
    pub fn prefill(&self) -> Work {
        self.prefill
    }
}

/// What [`Filled::decode`] computed.
#[derive(Debug, Clone)]
pub struct Decoded {
    /// Each sequence's new tokens.
    pub tokens: Vec<Vec<u32>>,
    /// The time of the steps.
    pub time: Duration,
}

/// What was measured of one batch at one context.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub context: usize,
    /// New tokens per second of all sequences together: the median round.
    pub decode: f64,
    /// The median, over the rounds, of this rate divided by that of the same batch at the first context.
    pub of_first: f64,
    /// Tokens per second of one prompt of as many tokens.
    pub prefill: f64,
}

/// Decoding and prefill of every batch at every context.
#[derive(Debug)]
pub struct Measured(Vec<Rates>);

impl Measured {
    /// Measures: the contexts of a batch take turns, round after round, so that whatever else the machine does in the
    /// meantime meets all of them.
    ///
    /// # Errors
    ///
    /// As [`Filled::new`].
    pub fn take(
        model: &Model,
        dtype: KvDtype,
        batches: &[usize],
        contexts: &[usize],
        progress: impl Fn(&str),
    ) -> Result<Self> {
        let mut all = Vec::new();
        for &batch in batches {
            progress(&format!("batch {batch}: computing the prompts"));
            let mut filled: Vec<_> = contexts
                .iter()
                .map(|&context| Filled::new(model, dtype, batch, context, TOKENS))
                .collect::<Result<_>>()?;
            let mut rounds = Vec::new();
            for round in 0..=ROUNDS {
                progress(&format!("batch {batch}: round {round} of {ROUNDS}"));
                let rates = filled
                    .iter_mut()
                    .map(|filled| Ok((batch * TOKENS) as f64 / filled.decode(TOKENS)?.time.as_secs_f64()))
                    .collect::<Result<Vec<_>>>()?;
                // The first one warms up.
                if round > 0 {
                    rounds.push(rates);
                }
            }
            all.extend(filled.iter().enumerate().map(|(i, filled)| Rates {
                batch,
                context: filled.context,
                decode: median(rounds.iter().map(|rates| rates[i]).collect()),
                of_first: median(rounds.iter().map(|rates| rates[i] / rates[0]).collect()),
                prefill: filled.prefill.rate().unwrap_or(f64::NAN),
            }));
        }
        Ok(Self(all))
    }

    /// The rates, batch after batch.
    pub fn rates(&self) -> &[Rates] {
        &self.0
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.0.first().map_or(0, |rates| rates.context);
        writeln!(f, "tokens/s, median of {ROUNDS} rounds of {TOKENS} steps, contexts in turn")?;
        writeln!(
            f,
            "{:>5} {:>8} {:>9} {:>9} {:>14} {:>9}",
            "batch",
            "context",
            "decode",
            "ms/step",
            format!("of {first}'s"),
            "prefill"
        )?;
        for Rates { batch, context, decode, of_first, prefill } in &self.0 {
            let step = 1e3 * *batch as f64 / decode;
            writeln!(
                f,
                "{batch:>5} {context:>8} {decode:>9.1} {step:>9.2} {:>13.1}% {prefill:>9.1}",
                100.0 * of_first
            )?;
        }
        Ok(())
    }
}

/// Refuses batches and contexts that cannot be measured with a model that can have `limit` tokens in a sequence.
///
/// # Errors
///
/// If one is 0, or a context is too long.
pub fn check(batches: &[usize], contexts: &[usize], limit: usize) -> Result<()> {
    let pairs = batches.iter().flat_map(|&batch| contexts.iter().map(move |&context| (batch, context)));
    pairs.into_iter().try_for_each(|(batch, context)| check_one(batch, context, TOKENS, limit))
}

fn check_one(batch: usize, context: usize, room: usize, limit: usize) -> Result<()> {
    ensure!(batch > 0, "a batch of 0 sequences decodes nothing");
    ensure!(context > 0, "a context of 0 tokens has nothing to attend to");
    ensure!(
        context.saturating_add(room) <= limit,
        "a context of {context} tokens and {room} more are measured, the model's context is {limit} tokens"
    );
    Ok(())
}

/// The prompt that is measured with: any tokens will do, but not the same again and again.
pub fn prompt(context: usize, vocabulary: usize) -> Vec<u32> {
    let token = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % vocabulary.max(1) as u64;
    (0..context as u64).map(|i| token(i) as u32).collect()
}

fn likeliest(logits: &[f32]) -> Result<u32> {
    Sampling::greedy().draw(logits, &mut Random::new(0, 0))
}

fn median(mut xs: Vec<f64>) -> f64 {
    xs.sort_by(f64::total_cmp);
    xs.get(xs.len() / 2).copied().unwrap_or(f64::NAN)
}
