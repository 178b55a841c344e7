//! One forward pass, and the decision which sequences take part in it with how many tokens.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::time::Instant;

use anyhow::Result;
use paged_attention::{Logits, PushError, PushOptions};

use super::state::{Engine, Sequence};
use super::tier::Loading;
use super::{Event, LanguageModel};

/// The result of a forward pass.
struct Pass {
    /// When it began, after what was read from the tier.
    started: Instant,
    /// New tokens.
    tokens: usize,
    /// How many of them belong to chunks of prompts.
    chunks: usize,
    /// Whether a sequence did not fit.
    full: bool,
    /// The logits of the sequences whose last token is computed, each with its index in `running`.
    logits: Vec<(usize, Vec<f32>)>,
}

impl Engine<'_> {
    /// Starts waiting requests, and computes one forward pass over all running sequences that fit. Returns what has
    /// happened, in order; nothing if there is nothing to do.
    ///
    /// # Errors
    ///
    /// If the model fails, or a request can never be answered. The requests stay as they are; [`cancel`](Self::cancel)
    /// ends them.
    pub fn step(&mut self, model: &impl LanguageModel, is_end: &impl Fn(u32) -> bool) -> Result<Vec<Event>> {
        if self.admit()? {
            self.compute(model, is_end)?;
        }
        Ok(std::mem::take(&mut self.events))
    }

    fn compute(&mut self, model: &impl LanguageModel, is_end: &impl Fn(u32) -> bool) -> Result<()> {
        let pass = loop {
            if let Some(pass) = self.pass(model)? {
                break pass;
            }
            match &mut self.loads {
                Some(loads) if self.running.iter().any(|running| running.loading == Loading::Waits) => loads.wait(),
                // No sequence fits. The longest will, at the latest when it is alone.
                _ => self.preempt()?,
            }
        };
        for (index, logits) in &pass.logits {
            self.extend(*index, logits)?;
        }
        let finished = self.retire(is_end)?;
        // A finished sequence frees blocks for those that were left out. If none has finished, one is preempted.
        if pass.full && finished == 0 {
            self.preempt()?;
        }
        self.full = pass.full;

        self.stats.steps += 1;
        self.pace.record(pass.chunks, pass.started.elapsed());
        let work = if pass.chunks > 0 { &mut self.stats.prefill } else { &mut self.stats.decode };
        work.tokens += pass.tokens;
        work.time += pass.started.elapsed();
        Ok(())
    }

    /// Computes what fits into the pool and commits it; `None` if no sequence fits.
    fn pass(&mut self, model: &impl LanguageModel) -> Result<Option<Pass>> {
        if let Some(loads) = &mut self.loads {
            loads.begin_step(
                self.running.iter().filter(|running| running.loading == Loading::Waits).map(|running| running.id),
            );
        }
        let rate = self.stats.prefill.rate();
        let (pool, running) = (self.cache.pool(), &mut self.running);
        let mut tables = self.tables.check_out_all(running.iter().map(|running| running.id))?;
        // Since a sequence was admitted, another may have computed its next tokens.
        for (running, table) in running.iter_mut().zip(&mut tables) {
            let (sequence, before) = (&mut self.sequences[running.group[0]], table.len());
            table.match_prefix(&sequence.tokens);
            if let Some(loads) = &mut self.loads {
                running.loading = loads.advance(running.id, running.loading, table, &sequence.tokens, rate);
            }
            sequence.count_matched(table.len().saturating_sub(before), &mut self.stats);
        }
        let (started, running) = (Instant::now(), &*running);
        let sequence = |index: usize| &self.sequences[running[index].group[0]];
        // The most computed tokens first, among equals the earliest admitted: see `generate`.
        let mut order: Vec<_> = tables.iter_mut().enumerate().collect();
        order.sort_by_key(|(_, table)| Reverse(table.len()));
        let decoding = order.iter().filter(|(index, table)| sequence(*index).tokens.len() - table.len() == 1).count();
        let room = self.limits.step_tokens.saturating_sub(decoding).max(1);
        let mut budget = self.pace.budget(room);

        let mut step = self.cache.step();
        let (mut live, mut read, mut prompt_tokens) = (0, 0, 0);
        let (mut chunks, mut full) = (0, false);
        // The sequences whose last token is computed, by their index in `running`: those whose logits are wanted.
        let mut complete = Vec::new();
        // For each prompt of the step: its salt, and its tokens up to and including the next block.
        let mut in_progress = HashSet::new();
        for (index, table) in order {
            let Sequence { tokens, answer, salt, .. } = sequence(index);
            let computed = table.len();
            let decodes = tokens.len() - computed == 1;
            live += computed;
            // If this step already computes the same block, the sequence waits, and matches it in the next step.
            let next_block = &tokens[..(computed + pool.block_size()).min(tokens.len())];
            let n = match decodes {
                true => 1,
                false if running[index].loading == Loading::Waits => 0,
                false if in_progress.contains(&(salt, next_block)) => 0,
                false => chunk(computed, tokens.len(), budget, pool.block_size()),
            };
            if n == 0 {
                continue;
            }
            let last = computed + n == tokens.len();
            let options = PushOptions::default().logits(if last { Logits::Last } else { Logits::None });
            match step.push_with(table, &tokens[computed..computed + n], &options) {
                Ok(()) => {}
                // It is left out of this step; the others are computed.
                Err(PushError::OutOfBlocks(_)) => {
                    full = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            if !decodes {
                in_progress.insert((salt, next_block));
                budget -= n;
                chunks += n;
            }
            live += n;
            read += computed + n;
            prompt_tokens += answer.prompt_tokens.saturating_sub(computed).min(n);
            if last {
                complete.push(index);
            }
        }
        if step.sequences() == 0 {
            return Ok(None);
        }
        let in_use = pool.in_use();
        if in_use > self.stats.peak_blocks {
            self.stats.peak_blocks = in_use;
            self.stats.fullest = Some(pool.snapshot());
        }
        // With several groups of layers, a slot here is one in each.
        let slots = (in_use * pool.block_size()) as f64 / pool.units_per_block() as f64;
        self.utilisation += live as f64 / slots;

        let logits = model.forward(&step)?.to_vec2::<f32>()?;
        let tokens = step.tokens();
        self.stats.read_tokens += read;
        self.stats.shared_tokens += step.shared_tokens(0, &model.attention())?;
        step.commit()?;
        self.stats.computed_prompt_tokens += prompt_tokens;
        let logits = complete.into_iter().zip(logits).collect();
        Ok(Some(Pass { started, tokens, chunks, full, logits }))
    }
}

/// How many tokens of a prompt a step computes: the prompt has `len` tokens, of which `computed` are computed, and the
/// step has room for `budget`. The chunk ends at a block boundary, so that the rest can still be matched in the cache,
/// unless the budget is too small for that.
fn chunk(computed: usize, len: usize, budget: usize, block_size: usize) -> usize {
    let rest = len - computed;
    match (computed + budget) / block_size * block_size {
        end if rest > budget && end > computed => end - computed,
        _ => rest.min(budget),
    }
}

#[cfg(test)]
mod tests {
    use super::chunk;

    #[test]
    fn chunks_end_at_a_block_boundary_where_they_can() {
        assert_eq!(chunk(0, 100, 512, 16), 100, "all of it");
        assert_eq!(chunk(0, 100, 50, 16), 48);
        assert_eq!(chunk(5, 100, 50, 16), 43, "up to 48");
        assert_eq!(chunk(0, 100, 7, 16), 7, "a budget of less than a block");
        assert_eq!(chunk(14, 100, 7, 16), 2, "up to 16");
        assert_eq!(chunk(95, 100, 5, 16), 5);
        assert_eq!(chunk(3, 100, 0, 16), 0);
    }
}
