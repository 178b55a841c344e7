//! What a pass has to compute: which tokens a sequence holds, and which of them it can keep.
//!
//! A sequence is told its tokens before they are computed, and holds those that all layers have. So nothing has to be noted
//! when a pass has succeeded, and one that failed has left nothing that would be taken for computed.

use crate::KvError;
use crate::error::Result;
use crate::part::Part;
use crate::sequence::{Sequence, to_change};
use crate::stats::Counters;

impl Sequence {
    /// Prepares a pass over a sequence of these tokens; says how many of the first need not be computed.
    pub(crate) fn begin_pass(&mut self, tokens: &[u32]) -> Result<usize> {
        if self.batch != 1 {
            return Err(KvError::Sequences(self.batch));
        }
        let computed = tokens.len().saturating_sub(1); // the last one's logits are needed
        let held = &self.tokens[..self.shortest().min(self.tokens.len())];
        let common = held.iter().zip(&tokens[..computed]).take_while(|(held, wanted)| held == wanted).count();
        // Others may have computed more of it.
        if common == computed || common >= self.known(tokens) {
            match self.truncate(common) {
                Ok(()) => {
                    self.tokens = tokens.to_vec();
                    return Ok(common);
                }
                // A ring has given back what the last of them sees: it begins anew.
                Err(KvError::BehindWindow(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // What it has computed is found by those that come, itself included.
        self.settle()?;
        self.clear();
        self.reuse(tokens)
    }

    /// How many of these tokens the pool knows.
    fn known(&self, tokens: &[u32]) -> usize {
        let pools = self.pool.recent.all();
        pools.iter().map(|cache| cache.table_with(&self.options).find(tokens).tokens).max().unwrap_or(0)
    }

    /// Starts with what the pool knows of these tokens; says how many need not be computed.
    pub(crate) fn reuse(&mut self, tokens: &[u32]) -> Result<usize> {
        let (len, batch) = (self.longest(), self.batch);
        if len > 0 || batch != 1 {
            return Err(KvError::NotEmpty { len, batch });
        }
        let parts = to_change(&mut self.parts)?;
        let mut best: Option<Part> = None;
        for cache in self.pool.recent.all() {
            let mut table = cache.table_with(&self.options);
            let found = table.reuse(tokens);
            if found > best.as_ref().map_or(0, Part::committed) {
                best = Some(Part { cache, tables: vec![table], start: 0, old: false });
            }
        }
        let found = best.as_ref().map_or(0, Part::committed);
        *parts = best.into_iter().collect();
        self.to_shrink = false;
        self.lens.fill(found);
        self.tokens = tokens.to_vec();
        Counters::count(&self.pool.counters.hits, found);
        Counters::count(&self.pool.counters.misses, tokens.len() - found);
        Ok(found)
    }

    /// Says which tokens come next. Ignored when those before are not known.
    pub(crate) fn note_tokens(&mut self, tokens: &[u32]) {
        if self.tokens.len() == self.longest() {
            self.tokens.extend_from_slice(tokens);
        }
    }
}
