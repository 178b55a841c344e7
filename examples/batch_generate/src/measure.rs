//! Measures decoding and prefill by batch and context.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use paged_attention::{BlockTable, KvCache, KvDtype, TableOptions};

use inference::engine::{LanguageModel, STEP_TOKENS, Work};
use inference::median::median;
use inference::model::Model;
use inference::sampling::{Random, Sampling};

/// Measured rounds.
const ROUNDS: usize = 7;
/// Tokens that each sequence decodes in a round.
pub(crate) const TOKENS: usize = 8;

/// Sequences with the same number of tokens each, in a cache of their own: once in blocks that no two of them share, and
/// once in blocks that they share as far as their tokens are the same.
#[derive(Debug)]
pub struct Filled<'m> {
    model: &'m Model,
    cache: KvCache,
    own: Vec<BlockTable>,
    shared: Vec<BlockTable>,
    context: usize,
    room: usize,
    /// The token that each sequence computes next.
    next: Vec<u32>,
    prefill: Work,
}

/// The blocks in which sequences have their context, and how those that they share are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocks {
    /// No two sequences share a block.
    Own,
    /// They share the blocks of the tokens that they begin with, and the cache reads each for all of them.
    Shared,
    /// They share these blocks, and each is read for every sequence.
    SharedReadApart,
}

impl<'m> Filled<'m> {
    /// Computes a prompt of `context` tokens, in chunks of the engine's size, and gives it to each of `batch`
    /// sequences. The cache has room for `room` more tokens of each.
    ///
    /// # Errors
    ///
    /// If the batch or the context is 0, `context + room` is more than the model's context, the memory cannot be
    /// allocated, or a step fails.
    pub fn new(model: &'m Model, dtype: KvDtype, batch: usize, context: usize, room: usize) -> Result<Self> {
        Self::behind(model, dtype, batch, context, 0, room)
    }

    /// The same with `tail` more tokens of its own for each sequence, as the prompts behind one system prompt of
    /// `context` tokens.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn behind(
        model: &'m Model,
        dtype: KvDtype,
        batch: usize,
        context: usize,
        tail: usize,
        room: usize,
    ) -> Result<Self> {
        check_one(batch, context, tail.saturating_add(room), LanguageModel::context(model))?;
        let total = context + tail + room;
        let block_size = 16;
        // One more for each: the last block of a fork, if it is not full, is a copy.
        let own_blocks = batch.saturating_mul(total.div_ceil(block_size) + 1);
        let shared_blocks = total.div_ceil(block_size) + batch.saturating_mul((tail + room).div_ceil(block_size) + 2);
        let blocks = own_blocks.saturating_add(shared_blocks);
        let cache = KvCache::builder_of(model.groups()).block_size(block_size).blocks(blocks).dtype(dtype).build()?;

        let compute = |table: &mut BlockTable, tokens: &[u32]| -> Result<u32> {
            let mut next = 0;
            for chunk in tokens.chunks(STEP_TOKENS) {
                let mut step = cache.step();
                step.push(table, chunk)?;
                next = likeliest(&model.forward(&step)?.to_vec2::<f32>()?[0])?;
                step.commit()?;
            }
            Ok(next)
        };
        // Private: otherwise sequences with equal tokens would share blocks, and less memory would be read.
        let mut first = cache.table_with(&TableOptions::default().private());
        let prompt = prompt(context + batch * tail, model.vocabulary());
        let (prompt, tails) = prompt.split_at(context);
        let started = Instant::now();
        let after_prompt = compute(&mut first, prompt)?;
        let prefill = Work { tokens: context, time: started.elapsed() };

        let mut shared: Vec<_> = (0..batch).map(|_| first.fork()).collect();
        let mut next = vec![after_prompt; batch];
        for ((table, next), tail) in shared.iter_mut().zip(&mut next).zip(tails.chunks(tail.max(1))) {
            *next = compute(table, tail)?;
        }
        // What is swapped in takes blocks of its own.
        let own = shared.iter().map(|table| Ok(table.fork().swap_out()?.swap_in()?)).collect::<Result<_>>()?;
        Ok(Self { model, cache, own, shared, context: context + tail, room, next, prefill })
    }

    /// Decodes `tokens` tokens of each sequence, one per step, each the most likely one; in forks, so that every call
    /// starts at the same context. (A window that has moved on cannot be taken back.)
    ///
    /// # Errors
    ///
    /// If there is no room for them, or a step fails.
    pub fn decode(&self, blocks: Blocks, tokens: usize) -> Result<Decoded> {
        ensure!(tokens <= self.room, "each sequence has room for {} more tokens, not for {tokens}", self.room);
        let tables = if blocks == Blocks::Own { &self.own } else { &self.shared };
        let attention = match blocks {
            Blocks::SharedReadApart => self.model.attention().shared_reads_from(usize::MAX),
            Blocks::Own | Blocks::Shared => self.model.attention(),
        };
        let mut forks: Vec<_> = tables.iter().map(BlockTable::fork).collect();
        let mut next = self.next.clone();
        let mut decoded = Decoded { tokens: vec![Vec::new(); self.batch()], time: Duration::ZERO };
        for _ in 0..tokens {
            let started = Instant::now();
            let mut step = self.cache.step();
            for (table, token) in forks.iter_mut().zip(&next) {
                step.push(table, &[*token])?;
            }
            let logits = self.model.forward_with(&step, &attention)?.to_vec2::<f32>()?;
            step.commit()?;
            for (token, logits) in next.iter_mut().zip(&logits) {
                *token = likeliest(logits)?;
            }
            decoded.time += started.elapsed();
            for (tokens, token) in decoded.tokens.iter_mut().zip(&next) {
                tokens.push(*token);
            }
        }
        Ok(decoded)
    }

    /// The number of sequences.
    pub fn batch(&self) -> usize {
        self.next.len()
    }

    /// The number of tokens of each sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The tokens of the prompt that all have, and the time it took to compute it.
    pub fn prefill(&self) -> Work {
        self.prefill
    }
}

/// The result of [`Filled::decode`].
#[derive(Debug, Clone)]
pub struct Decoded {
    /// Each sequence's new tokens.
    pub tokens: Vec<Vec<u32>>,
    /// The total time of the steps.
    pub time: Duration,
}

/// The rates of one batch at one context.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// The number of sequences.
    pub batch: usize,
    /// The number of tokens of each.
    pub context: usize,
    /// Decoded tokens per second of all sequences together, in the median round.
    pub decode: f64,
    /// The median, over the rounds, of this decode rate divided by that of the same batch at the first context.
    pub of_first: f64,
    /// Decoded tokens per second if the sequences share their context, for example a system prompt.
    pub shared: f64,
    /// Tokens per second of the prefill of one prompt with `context` tokens.
    pub prefill: f64,
}

/// The rates of every batch at every context.
#[derive(Debug)]
pub struct Measured(Vec<Rates>);

impl Measured {
    /// Measures every batch at every context. Each round measures all contexts of a batch, one after the other, so that
    /// other load on the machine affects all of them.
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
            let filled: Vec<_> = contexts
                .iter()
                .map(|&context| Filled::new(model, dtype, batch, context, TOKENS))
                .collect::<Result<_>>()?;
            let mut rounds = Vec::new();
            for round in 0..=ROUNDS {
                progress(&format!("batch {batch}: round {round} of {ROUNDS}"));
                let rate = |decoded: Decoded| (batch * TOKENS) as f64 / decoded.time.as_secs_f64();
                let rates = filled
                    .iter()
                    .map(|filled| {
                        Ok([rate(filled.decode(Blocks::Own, TOKENS)?), rate(filled.decode(Blocks::Shared, TOKENS)?)])
                    })
                    .collect::<Result<Vec<_>>>()?;
                // The first round is a warm-up.
                if round > 0 {
                    rounds.push(rates);
                }
            }
            all.extend(filled.iter().enumerate().map(|(i, filled)| Rates {
                batch,
                context: filled.context,
                decode: median(rounds.iter().map(|rates| rates[i][0]).collect()),
                of_first: median(rounds.iter().map(|rates| rates[i][0] / rates[0][0]).collect()),
                shared: median(rounds.iter().map(|rates| rates[i][1]).collect()),
                prefill: filled.prefill.rate().unwrap_or(f64::NAN),
            }));
        }
        Ok(Self(all))
    }

    /// The rates, in the order of the batches, then of the contexts.
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
            "{:>5} {:>8} {:>9} {:>9} {:>14} {:>15} {:>9}",
            "batch",
            "context",
            "decode",
            "ms/step",
            format!("of {first}'s"),
            "shared context",
            "prefill"
        )?;
        for Rates { batch, context, decode, of_first, shared, prefill } in &self.0 {
            let step = 1e3 * *batch as f64 / decode;
            writeln!(
                f,
                "{batch:>5} {context:>8} {decode:>9.1} {step:>9.2} {:>13.1}% {shared:>15.1} {prefill:>9.1}",
                100.0 * of_first
            )?;
        }
        Ok(())
    }
}

/// Refuses batches and contexts that cannot be measured with a model whose context is `limit` tokens.
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
        "a measured context of {context} tokens needs room for {room} more, the model's context is {limit} tokens"
    );
    Ok(())
}

/// The prompt for a measurement: arbitrary tokens, but not one token repeated.
pub fn prompt(context: usize, vocabulary: usize) -> Vec<u32> {
    let token = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % vocabulary.max(1) as u64;
    (0..context as u64).map(|i| token(i) as u32).collect()
}

fn likeliest(logits: &[f32]) -> Result<u32> {
    Sampling::greedy().draw(logits, &mut Random::new(0, 0))
}
