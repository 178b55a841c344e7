//! The operations of a cache other than appending tokens. Each is compared token for token with a computation without
//! blocks: the reference, or, for windows, dense attention over the whole sequence with a mask.

use std::cell::Cell;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use paged_attention::{BlockTable, KvCache, KvDtype, OutOfWindow, TableOptions, Window};

use super::contiguous::dense;
use super::{Reference, generate};
use inference::engine::{LanguageModel as _, Request};
use inference::model::Model;
use inference::sampling::{Random, Sampling};
use inference::shown::say;

/// Tokens that are generated and compared in each scenario.
const TOKENS: usize = 24;

/// The model's context that the scenarios need: the tokens of their longest sequence, and some more.
const CONTEXT: usize = 128;

/// The tokens of the longest sequence, if the model's context has room for it.
pub(crate) const LONGEST: usize = 75 + 256;

/// Checks that the sequences of the scenarios fit into the model's context.
///
/// # Errors
///
/// If the context is too short.
pub(crate) fn check(context: usize) -> Result<()> {
    ensure!(context >= CONTEXT, "verification needs {CONTEXT} tokens, the model's context is {context} tokens");
    Ok(())
}

/// Runs every scenario.
///
/// # Errors
///
/// If a token differs, or if 8-bit storage changes attention by 5% or more.
pub(crate) fn verify(reference: Reference<'_>, model: &Model, block_size: usize, dtype: KvDtype) -> Result<()> {
    let cache = KvCache::builder_of(model.groups()).blocks(1024usize.div_ceil(block_size)).block_size(block_size);
    let mut verifier = Verifier { paged: model, cache: cache.dtype(dtype).build()?, reference };
    let vocabulary = model.vocabulary() as u32;
    let prompt: Vec<u32> = (0..75).map(|i| (1000 + 37 * i) % vocabulary).collect();
    let other: Vec<u32> = (0..9).map(|i| (5000 + 11 * i) % vocabulary).collect();

    for len in [1, 13, 33, 74] {
        verifier.fork_at(&prompt, len, &other)?;
        verifier.truncate_to(&prompt, len, &other)?;
    }
    verifier.shared_prefix(&prompt, &other)?;
    verifier.swap(&prompt)?;
    verifier.resume(&prompt)?;
    // A table's own window, where the layers have none.
    let windows = [Window::new(20), Window::new(32).with_sink_tokens(4), Window::new(50).with_sink_tokens(17)];
    let own = model.config().windows.iter().all(Option::is_none);
    for window in windows.into_iter().filter(|_| own) {
        verifier.window(&prompt, window)?;
    }
    verifier.eight_bits(&prompt)?;
    say(&format!(
        "verified: forks and truncations at odd lengths, a shared prefix, swapping, resuming, and windows with sink \
         tokens, {TOKENS} tokens each"
    ));
    Ok(())
}

struct Verifier<'a> {
    paged: &'a Model,
    cache: KvCache,
    reference: Reference<'a>,
}

impl Verifier<'_> {
    /// Computes `tokens` and returns the most likely next one.
    fn next(&self, table: &mut BlockTable, tokens: &[u32]) -> Result<u32> {
        let mut step = self.cache.step();
        step.push(table, tokens)?;
        let logits = self.paged.forward(&step)?;
        step.commit()?;
        likeliest(&logits)
    }

    /// Computes those of `tokens` that the table does not have yet, then generates `TOKENS` tokens one by one, and
    /// returns them.
    fn continue_with(&self, table: &mut BlockTable, tokens: &[u32]) -> Result<Vec<u32>> {
        let mut new = vec![self.next(table, &tokens[table.len()..])?];
        while new.len() < TOKENS {
            new.push(self.next(table, &new[new.len() - 1..])?);
        }
        Ok(new)
    }

    fn computed(&self, tokens: &[u32]) -> Result<BlockTable> {
        let mut table = self.cache.table();
        self.next(&mut table, tokens)?;
        Ok(table)
    }

    /// Compares `got`, the tokens after `tokens`, with those of the reference.
    fn compare(&mut self, what: &str, tokens: &[u32], got: &[u32]) -> Result<()> {
        let request = Request { prompt: tokens.to_vec(), max_tokens: TOKENS };
        let (expected, _) = generate(&mut self.reference, &request, |_| false)?;
        ensure!(got == expected, "{what}: the tokens differ from {}\n{got:?}\n{expected:?}", self.reference.name());
        Ok(())
    }

    /// `None` if a window has passed the place: then going back is refused, and nothing is changed.
    fn gone_back<T>(&self, result: Result<T, OutOfWindow>) -> Result<Option<T>> {
        match result {
            Err(_) if self.paged.config().windows.iter().any(Option::is_some) => Ok(None),
            result => Ok(Some(result?)),
        }
    }

    fn fork_at(&mut self, prompt: &[u32], len: usize, other: &[u32]) -> Result<()> {
        let mut table = self.computed(prompt)?;
        let Some(mut fork) = self.gone_back(table.fork_at(len))? else { return Ok(()) };
        let branch = [&prompt[..len], other].concat();
        // Both continue, one after the other, from the blocks that they share.
        let got = self.continue_with(&mut fork, &branch)?;
        let next = [prompt, &[7]].concat();
        let original = self.continue_with(&mut table, &next)?;
        self.compare(&format!("a fork at {len}"), &branch, &got)?;
        self.compare(&format!("the original of a fork at {len}"), &next, &original)
    }

    fn truncate_to(&mut self, prompt: &[u32], len: usize, other: &[u32]) -> Result<()> {
        let mut table = self.computed(prompt)?;
        if self.gone_back(table.truncate(len))?.is_none() {
            return Ok(());
        }
        let branch = [&prompt[..len], other].concat();
        let got = self.continue_with(&mut table, &branch)?;
        self.compare(&format!("a truncation to {len}"), &branch, &got)
    }

    fn shared_prefix(&mut self, prompt: &[u32], other: &[u32]) -> Result<()> {
        self.cache.pool().reset_prefix_cache();
        drop(self.computed(prompt)?);
        let branch = [&prompt[..70], other].concat();
        let mut table = self.cache.table();
        let matched = table.match_prefix(&branch);
        // Full blocks are cached. The last one that matches may match only in part.
        let full = prompt.len() / self.cache.pool().block_size() * self.cache.pool().block_size();
        ensure!(matched == full.min(70), "{matched} tokens were matched, {} expected", full.min(70));
        let got = self.continue_with(&mut table, &branch)?;
        self.compare("a shared prefix", &branch, &got)
    }

    fn swap(&mut self, prompt: &[u32]) -> Result<()> {
        self.cache.pool().reset_prefix_cache();
        let mut table = self.computed(prompt)?;
        let swapped = table.swap_out()?;
        // Meanwhile all blocks are overwritten.
        self.cache.pool().reset_prefix_cache();
        let tokens = self.cache.pool().blocks() * self.cache.pool().block_size();
        let noise: Vec<u32> = (0..tokens as u32).map(|i| i % self.paged.vocabulary() as u32).collect();
        for chunk in noise.chunks(64) {
            let mut other = self.cache.table();
            self.next(&mut other, chunk)?;
        }
        let mut back = swapped.swap_in()?;
        let next = [prompt, &[7]].concat();
        let got = self.continue_with(&mut back, &next)?;
        self.compare("a sequence swapped out and in", &next, &got)
    }

    fn resume(&mut self, prompt: &[u32]) -> Result<()> {
        self.cache.pool().reset_prefix_cache();
        let mut table = self.computed(prompt)?;
        let mut tokens = prompt.to_vec();
        tokens.extend(self.continue_with(&mut table, &[prompt, &[7]].concat())?.first());
        // Preemption: the sequence frees its blocks, and then matches them again.
        drop(table);
        let mut table = self.cache.table();
        ensure!(table.match_prefix(&tokens) > 0, "a sequence that was just dropped matches no tokens");
        let got = self.continue_with(&mut table, &tokens)?;
        self.compare("a sequence that resumes", &tokens, &got)
    }

    fn window(&mut self, prompt: &[u32], window: Window) -> Result<()> {
        let mut table = self.cache.table_with(&TableOptions::default().window(window));
        let mut tokens = prompt.to_vec();
        let mut got = vec![self.next(&mut table, &tokens)?];
        for at in 0..TOKENS {
            let expected = self.dense(&tokens, window)?;
            ensure!(got[at] == expected, "{window:?}: token {at} is {}, with a mask it is {expected}", got[at]);
            tokens.push(got[at]);
            got.push(self.next(&mut table, &got[at..])?);
        }
        Ok(())
    }

    /// Measures the error of 8-bit storage: the same queries, keys and values of every layer go through a cache in f32
    /// and one in 8 bits. Also counts how many tokens of greedy answers are the same.
    fn eight_bits(&self, prompt: &[u32]) -> Result<()> {
        let length = LONGEST.min(self.paged.context()) - prompt.len();
        let cache = |dtype| KvCache::builder_of(self.paged.groups()).blocks(32).dtype(dtype).build();
        let [full, bytes] = [cache(KvDtype::F32)?, cache(KvDtype::Int8)?];
        let attention = self.paged.attention();
        // The largest difference, the sum of differences, the sum of absolute values, and the count.
        let sums = Cell::new([0f64; 4]);
        let (mut table, mut other) = (full.table(), bytes.table());
        let (mut step, mut other_step) = (full.step(), bytes.step());
        step.push(&mut table, prompt)?;
        other_step.push(&mut other, prompt)?;
        let attend = |layer: usize, q: &Tensor, k: &Tensor, v: &Tensor| {
            let exact = step.attend(layer, q, k, v, &attention)?;
            let rounded = other_step.attend(layer, q, k, v, &attention)?;
            let sizes = exact.abs()?.flatten_all()?.to_vec1::<f32>()?;
            let differences = (&exact - rounded)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
            let [mut most, mut differing, mut size, mut n] = sums.get();
            for (difference, x) in differences.into_iter().zip(sizes) {
                (most, differing) = (most.max(difference.into()), differing + f64::from(difference));
                (size, n) = (size + f64::from(x), n + 1.0);
            }
            sums.set([most, differing, size, n]);
            Ok(exact)
        };
        self.paged.logits(&step.token_ids()?, &step.positions()?, &step.logits_rows()?, attend)?;
        let [most, differing, size, n] = sums.get();
        ensure!(differing < 0.05 * size, "8-bit storage changes attention by {:.3} of its size", differing / size);

        let answer = |cache: &KvCache| -> Result<Vec<u32>> {
            let mut table = cache.table_with(&TableOptions::default().private());
            let (mut tokens, mut pending) = (Vec::new(), prompt.to_vec());
            while tokens.len() < length {
                let mut step = cache.step();
                step.push(&mut table, &pending)?;
                let next = likeliest(&self.paged.forward(&step)?)?;
                step.commit()?;
                tokens.push(next);
                pending = vec![next];
            }
            Ok(tokens)
        };
        drop((step, other_step));
        let (expected, got) = (answer(&full)?, answer(&bytes)?);
        let agree = expected.iter().zip(&got).take_while(|(a, b)| a == b).count();
        say(&format!(
            "8-bit storage: attention differs from f32 by {:.1e} at most and {:.1e} on average, where its numbers are \
             {:.1e} on average; the first {agree} of {length} greedy tokens are the same",
            most,
            differing / n,
            size / n
        ));
        Ok(())
    }

    /// The most likely token after `tokens`, which are all computed again with dense attention and a mask.
    fn dense(&self, tokens: &[u32], window: Window) -> Result<u32> {
        let n = tokens.len();
        let sees = |at: usize, position: usize| {
            at <= position && (at < window.sink_tokens() || at + window.tokens() > position)
        };
        let config = self.paged.config();
        let attend = |_: usize, q: &Tensor, k: &Tensor, v: &Tensor| dense(q, k, v, config, sees);
        let positions = Tensor::arange(0, n as u32, &Device::Cpu)?;
        let last = Tensor::new(&[n as u32 - 1], &Device::Cpu)?;
        likeliest(&self.paged.logits(&Tensor::new(tokens, &Device::Cpu)?, &positions, &last, attend)?)
    }
}

/// The most likely token of the only row.
fn likeliest(logits: &Tensor) -> Result<u32> {
    let logits = logits.squeeze(0)?.to_vec1::<f32>()?;
    Sampling::greedy().draw(&logits, &mut Random::new(0, 0))
}
