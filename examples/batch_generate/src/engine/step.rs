//! One forward pass: which sequences take part in it, and with how many tokens.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::time::Instant;

use anyhow::Result;
use paged_attention::PushError;

use super::LanguageModel;
use super::state::{Engine, Sequence};

/// What came of a forward pass.
struct Pass {
    /// New tokens.
    tokens: usize,
    /// Whether some of them were a prompt's.
    prefill: bool,
    /// Whether a sequence did not fit.
    full: bool,
    /// The logits of the sequences whose last token is computed, each with its place in `running`.
    logits: Vec<(usize, Vec<f32>)>,
}

impl Engine<'_> {
    /// One forward pass over all running sequences that fit.
    pub(super) fn step(&mut self, model: &impl LanguageModel, is_end: &impl Fn(u32) -> bool) -> Result<()> {
        let started = Instant::now();
        let pass = loop {
            match self.pass(model)? {
                Some(pass) => break pass,
                // None fits. The longest will, at the latest when it is alone.
                None => self.preempt()?,
            }
        };
        for (place, logits) in &pass.logits {
            self.extend(*place, logits)?;
        }
        let finished = self.retire(is_end)?;
        // A sequence that finishes makes room for those that were left out; if none does, one must yield.
        if pass.full && finished == 0 {
            self.preempt()?;
        }
        self.full = pass.full;

        self.outcome.steps += 1;
        let work = if pass.prefill { &mut self.outcome.prefill } else { &mut self.outcome.decode };
        work.tokens += pass.tokens;
        work.time += started.elapsed();
        Ok(())
    }

    /// Computes what fits into the pool and commits it; `None` if no sequence fits.
    fn pass(&mut self, model: &impl LanguageModel) -> Result<Option<Pass>> {
        let (pool, running) = (self.cache.pool(), &self.running);
        let mut tables = self.tables.take_all(running.iter().map(|running| running.id))?;
        // Another may have computed what comes next since this one was admitted.
        for (running, table) in running.iter().zip(&mut tables) {
            let sequence = &mut self.sequences[running.group[0]];
            let found = table.reuse(&sequence.tokens);
            sequence.count_found(found);
        }
        let sequence = |place: usize| &self.sequences[running[place].group[0]];
        // The most computed first, among equals the earliest: see `generate`.
        let mut order: Vec<_> = tables.iter_mut().enumerate().collect();
        order.sort_by_key(|(_, table)| Reverse(table.len()));
        let decoding = order.iter().filter(|(place, table)| sequence(*place).tokens.len() - table.len() == 1).count();
        let mut budget = self.settings.step_tokens.saturating_sub(decoding).max(1);

        let mut step = self.cache.step();
        let (mut live, mut prompt_tokens) = (0, 0);
        let (mut prefill, mut full) = (false, false);
        // For each sequence of the step: its place in `running`, and whether its last token is computed.
        let mut rows = Vec::new();
        // The prefixes whose next block is computed in this step.
        let mut under_way = HashSet::new();
        for (place, table) in order {
            let Sequence { tokens, answer, .. } = sequence(place);
            let computed = table.len();
            let decodes = tokens.len() - computed == 1;
            live += computed;
            // A sequence that would compute the same block as another waits, and finds it in the next step.
            let next_block = &tokens[..(computed + pool.block_size()).min(tokens.len())];
            let n = match decodes {
                true => 1,
                false if under_way.contains(next_block) => 0,
                false => piece(computed, tokens.len(), budget, pool.block_size()),
            };
            if n == 0 {
                continue;
            }
            match step.push(table, &tokens[computed..computed + n]) {
                Ok(()) => {}
                // It is left out of this step, and the others go on.
                Err(PushError::OutOfBlocks(_)) => {
                    full = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            if !decodes {
                under_way.insert(next_block);
                budget -= n;
                prefill = true;
            }
            live += n;
            prompt_tokens += answer.prompt_tokens.saturating_sub(computed).min(n);
            rows.push((place, computed + n == tokens.len()));
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let held = pool.held();
        if held > self.outcome.peak_blocks {
            self.outcome.peak_blocks = held;
            self.outcome.fullest = Some(pool.snapshot());
        }
        self.utilisation += live as f64 / (held * pool.block_size()) as f64;

        let logits = model.forward(&step)?.to_vec2::<f32>()?;
        let tokens = step.tokens();
        step.commit()?;
        self.outcome.computed_prompt_tokens += prompt_tokens;
        let complete = rows.into_iter().zip(logits).filter(|((_, complete), _)| *complete);
        let logits = complete.map(|((place, _), logits)| (place, logits)).collect();
        Ok(Some(Pass { tokens, prefill, full, logits }))
    }
}

/// How many tokens of a prompt of `len`, of which `computed` are, a step computes that has room for `budget`. A piece
/// ends with a block, so that the rest can still be found elsewhere, unless the budget is too small for that.
fn piece(computed: usize, len: usize, budget: usize, block_size: usize) -> usize {
    let rest = len - computed;
    match (computed + budget) / block_size * block_size {
        end if rest > budget && end > computed => end - computed,
        _ => rest.min(budget),
    }
}

#[cfg(test)]
mod tests {
    use super::piece;

    #[test]
    fn pieces_end_with_a_block_where_they_can() {
        assert_eq!(piece(0, 100, 512, 16), 100, "all of it");
        assert_eq!(piece(0, 100, 50, 16), 48);
        assert_eq!(piece(5, 100, 50, 16), 43, "up to 48");
        assert_eq!(piece(0, 100, 7, 16), 7, "a budget of less than a block");
        assert_eq!(piece(14, 100, 7, 16), 2, "up to 16");
        assert_eq!(piece(95, 100, 5, 16), 5);
        assert_eq!(piece(3, 100, 0, 16), 0);
    }
}
