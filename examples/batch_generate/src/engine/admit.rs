//! Which of the waiting requests start.

use anyhow::{Result, bail, ensure};
use paged_attention::{Admitted, Need, Room};

use super::state::{Engine, Group, Running};

impl Engine<'_> {
    /// Lets waiting requests start as long as there is room. Says whether any sequence runs.
    pub(super) fn admit(&mut self) -> Result<bool> {
        // Until all running sequences have fitted into a step, none is admitted: one that has just yielded would take
        // the room that it made.
        if !self.full || self.running.is_empty() {
            self.start_waiting()?;
        }
        let pool = self.cache.pool();
        ensure!(
            !self.running.is_empty() || self.waiting.is_empty(),
            "none of the waiting prompts ({}) can start: others hold {} of the pool's {} blocks",
            self.waiting.len(),
            pool.held(),
            pool.blocks()
        );
        Ok(!self.running.is_empty())
    }

    fn start_waiting(&mut self) -> Result<()> {
        let pool = self.cache.pool();
        // The blocks that the running sequences will take to compute the tokens they have are promised to them.
        let mut promised = 0;
        for Running { id, group } in &self.running {
            promised += self.tables.take(*id)?.find(&self.sequences[group[0]].tokens).blocks;
        }
        let empty = self.cache.table();
        loop {
            let places = self.settings.max_batch - self.batch();
            let need = |group: &Group| {
                if group.len() > places {
                    return Need::NotNow;
                }
                let blocks = empty.find(&self.sequences[group[0]].tokens).blocks;
                // And one for each sample to part with. They can also part one after the other, so in a small pool it
                // is enough that the prompt fits, as `check` has made sure.
                Need::Blocks((blocks + group.len() - 1).min(pool.blocks()))
            };
            let room = Room { available: pool.available().saturating_sub(promised), running: self.running.len() };
            let group = match self.waiting.admit(pool, room, need) {
                Some(Admitted::Start(group)) => group,
                Some(Admitted::Never(group)) => {
                    let request = self.sequences[group[0]].answer.request + 1;
                    bail!("prompt {request} does not fit into a pool of {} blocks", pool.blocks());
                }
                None => return Ok(()),
            };
            let sequence = &mut self.sequences[group[0]];
            let mut table = self.cache.table();
            let found = table.reuse(&sequence.tokens);
            sequence.count_found(found);
            promised += table.find(&sequence.tokens).blocks + group.len() - 1;
            self.running.push(Running { id: self.tables.insert(table), group });
        }
    }
}

#[cfg(test)]
mod tests {
    use paged_attention::{KvCache, KvShape};

    use crate::engine::state::Engine;
    use crate::engine::{Request, STEP_TOKENS, Settings};
    use crate::sampling::Sampling;

    /// By the count of blocks alone, a sequence that has just yielded could be admitted again at once.
    #[test]
    fn none_is_admitted_before_all_have_fitted_into_a_step() {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 4 };
        let cache = KvCache::builder(shape).blocks(32).build().unwrap();
        let requests = vec![Request { prompt: vec![1, 2, 3], max_tokens: 4 }; 2];
        let sampling = Sampling::greedy();
        let settings = Settings { max_batch: 8, step_tokens: STEP_TOKENS, samples: 1, seed: 0, sampling };
        let mut engine = Engine::new(&cache, &requests, &settings);
        assert!(engine.admit().unwrap());
        assert_eq!((engine.running.len(), engine.waiting.len()), (2, 0));

        engine.preempt().unwrap();
        engine.full = true;
        assert!(engine.admit().unwrap());
        assert_eq!((engine.running.len(), engine.waiting.len()), (1, 1));
        engine.full = false;
        assert!(engine.admit().unwrap());
        assert_eq!((engine.running.len(), engine.waiting.len()), (2, 0));
    }

    #[test]
    fn a_pool_that_others_hold_is_an_error_and_no_endless_wait() {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 4 };
        let cache = KvCache::builder(shape).blocks(4).block_size(4).build().unwrap();
        let requests = [Request { prompt: vec![1; 8], max_tokens: 4 }];
        let sampling = Sampling::greedy();
        let settings = Settings { max_batch: 8, step_tokens: STEP_TOKENS, samples: 1, seed: 0, sampling };
        let mut engine = Engine::new(&cache, &requests, &settings);
        let mut other = cache.table();
        other.append(9).unwrap();
        let error = engine.admit().unwrap_err().to_string();
        assert_eq!(error, "none of the waiting prompts (1) can start: others hold 3 of the pool's 4 blocks");
        drop(other);
        assert!(engine.admit().unwrap());
    }
}
