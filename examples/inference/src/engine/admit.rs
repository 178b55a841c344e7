//! Admission: starts waiting requests.

use anyhow::{Result, bail, ensure};
use paged_attention::{Admitted, BlockTable, Need, PrefixMatch, Room};

use super::Event;
use super::state::{Engine, Group, Running};
use super::tier::Loading;

impl Engine<'_> {
    /// Starts waiting requests while there is room for them. Returns whether any sequence runs.
    pub(super) fn admit(&mut self) -> Result<bool> {
        // No request is admitted until all running sequences have fitted into a step. Otherwise a sequence that was
        // just preempted would take the blocks that it freed.
        if !self.full || self.running.is_empty() {
            self.start_waiting()?;
        }
        let pool = self.cache.pool();
        ensure!(
            !self.running.is_empty() || self.waiting.is_empty(),
            "of {} waiting prompts none can start: tables outside the engine use {} of the pool's {} blocks",
            self.waiting.len(),
            pool.in_use(),
            pool.blocks()
        );
        Ok(!self.running.is_empty())
    }

    fn start_waiting(&mut self) -> Result<()> {
        let pool = self.cache.pool();
        let step_tokens = self.limits.step_tokens;
        // How many units a sequence with this table still takes, to compute the tokens that it has.
        let found = |table: &BlockTable, tokens: &[u32]| table.lookup_prefix_in_chunks(tokens, step_tokens);
        let needed = |table: &BlockTable, tokens: &[u32]| found(table, tokens).blocks;
        // One more block for each sample after the first, for the tokens in which it differs.
        let of_samples = |group: &Group| (group.len() - 1) * pool.units_per_block();
        // Units promised to the running sequences, which still need them to compute the tokens that they have.
        let mut promised = 0;
        for Running { id, group, .. } in &self.running {
            promised += needed(&*self.tables.check_out(*id)?, &self.sequences[group[0]].tokens);
        }
        loop {
            let room_in_batch = self.limits.max_batch - self.running();
            let need = |group: &Group| {
                if group.len() > room_in_batch {
                    return Need::NotNow;
                }
                // Samples can also diverge one after the other, so in a small pool it is enough that the prompt fits,
                // which `check` has verified.
                let sequence = &self.sequences[group[0]];
                let empty = self.cache.table_with(&sequence.table_options());
                let PrefixMatch { blocks, tokens: cached, .. } = found(&empty, &sequence.tokens);
                Need::Prefix { blocks: (blocks + of_samples(group)).min(pool.units()), cached }
            };
            let room = Room { available: pool.available().saturating_sub(promised), running: self.running.len() };
            let mut group = match self.waiting.admit(pool, room, need) {
                Some(Admitted::Start(group)) => group,
                Some(Admitted::Never(group)) => {
                    let request = self.sequences[group[0]].answer.request + 1;
                    bail!("prompt {request} does not fit into a pool of {} blocks", pool.blocks());
                }
                None => return Ok(()),
            };
            self.drop_cancelled(&mut group);
            let Some(&first) = group.first() else { continue };
            for &member in &group {
                if self.sequences[member].answer.preemptions == 0 {
                    self.events.push(Event::Started { sequence: member });
                }
            }
            let sequence = &mut self.sequences[first];
            let mut table = self.cache.table_with(&sequence.table_options());
            let matched = table.match_prefix(&sequence.tokens);
            sequence.count_matched(matched, &mut self.stats);
            promised += needed(&table, &sequence.tokens) + of_samples(&group);
            let loading = if self.loads.is_some() { Loading::Unasked } else { Loading::No };
            self.running.push(Running { id: self.tables.insert(table), group, loading });
        }
    }
}

#[cfg(test)]
mod tests {
    use paged_attention::{KvCache, KvShape};

    use crate::engine::state::Engine;
    use crate::engine::{Limits, Request, RequestOptions, STEP_TOKENS};

    fn engine<'a>(cache: &'a KvCache, requests: &[Request]) -> Engine<'a> {
        let mut engine = Engine::new(cache, Limits { max_batch: 8, step_tokens: STEP_TOKENS, step_time: None });
        for request in requests {
            engine.submit(request.clone(), RequestOptions::default());
        }
        engine
    }

    /// There are enough blocks to admit the preempted sequence again at once.
    #[test]
    fn none_is_admitted_before_all_have_fitted_into_a_step() {
        let shape = KvShape::new(1, 1, 4);
        let cache = KvCache::builder(shape).blocks(32).build().unwrap();
        let requests = vec![Request { prompt: vec![1, 2, 3], max_tokens: 4 }; 2];
        let mut engine = engine(&cache, &requests);
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
    fn a_pool_used_by_other_tables_is_an_error_and_not_an_endless_wait() {
        let shape = KvShape::new(1, 1, 4);
        let cache = KvCache::builder(shape).blocks(4).block_size(4).build().unwrap();
        let requests = [Request { prompt: vec![1; 8], max_tokens: 4 }];
        let mut engine = engine(&cache, &requests);
        let mut other = cache.table();
        other.append(9).unwrap();
        let error = engine.admit().unwrap_err().to_string();
        assert_eq!(
            error,
            "of 1 waiting prompts none can start: tables outside the engine use 3 of the pool's 4 blocks"
        );
        drop(other);
        assert!(engine.admit().unwrap());
    }
}
