//! What a pass has to compute: which tokens a sequence has, and which of them it can keep.
//!
//! A sequence is given its token ids before they are computed, and the tokens that all layers have count as computed.
//! So nothing has to be recorded after a pass succeeds, and after a pass fails, nothing uncomputed counts as computed.

use paged_attention::KvCache;

use crate::KvError;
use crate::error::Result;
use crate::segment::OwnedSegment;
use crate::sequence::{Sequence, segments_mut};
use crate::stats::Counters;

impl Sequence {
    /// Prepares a pass over a sequence of these tokens. Returns how many of the first tokens need not be computed.
    pub(crate) fn begin_pass(&mut self, tokens: &[u32]) -> Result<usize> {
        if self.batch != 1 {
            return Err(KvError::Sequences(self.batch));
        }
        let computed = tokens.len().saturating_sub(1); // the last one's logits are needed
        let own = &self.tokens[..self.shortest().min(self.tokens.len())];
        let common = own.iter().zip(&tokens[..computed]).take_while(|(own, wanted)| own == wanted).count();
        // Other sequences may have computed more of these tokens.
        if common == computed || common >= self.lookup_prefix(tokens) {
            match self.truncate(common) {
                Ok(()) => {
                    self.tokens = tokens.to_vec();
                    return Ok(common);
                }
                // A ring has freed blocks that the last of them sees: the sequence starts again.
                Err(KvError::OutOfWindow(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // Cache what the sequence has computed, so that this match and later ones find it.
        self.settle()?;
        self.clear();
        self.match_prefix(tokens)
    }

    /// How many of these tokens a prefix match would find, in the pool or below it.
    fn lookup_prefix(&self, tokens: &[u32]) -> usize {
        let pools = self.pool.recent.all();
        let of_pool = |cache: &KvCache| cache.table_with(&self.options).lookup_prefix(tokens).tokens;
        let below = self.pool.below.get().map(|below| below.lookup(tokens, |cache| cache.table_with(&self.options)));
        pools.iter().map(of_pool).chain(below).max().unwrap_or(0)
    }

    /// Starts the sequence with the cached blocks of the longest prefix of these tokens. Returns how many tokens need
    /// not be computed.
    pub(crate) fn match_prefix(&mut self, tokens: &[u32]) -> Result<usize> {
        let (len, batch) = (self.longest(), self.batch);
        if len > 0 || batch != 1 {
            return Err(KvError::NotEmpty { len, batch });
        }
        let segments = segments_mut(&mut self.segments)?;
        let mut best: Option<OwnedSegment> = None;
        for cache in self.pool.recent.all() {
            let mut table = cache.table_with(&self.options);
            let matched = table.match_prefix(tokens);
            if matched > best.as_ref().map_or(0, OwnedSegment::committed) {
                best = Some(OwnedSegment { cache, tables: vec![table], start: 0, old: false });
            }
        }
        if let Some(below) = self.pool.below.get() {
            let matched = best.as_ref().map_or(0, OwnedSegment::committed);
            let table = |cache: &KvCache| cache.table_with(&self.options);
            if below.lookup(tokens, table) > matched
                && let Some((cache, table)) = below.longer(matched, tokens, table)
            {
                best = Some(OwnedSegment { cache, tables: vec![table], start: 0, old: false });
            }
        }
        let matched = best.as_ref().map_or(0, OwnedSegment::committed);
        *segments = best.into_iter().collect();
        self.to_shrink = false;
        self.lens.fill(matched);
        self.tokens = tokens.to_vec();
        Counters::count(&self.pool.counters.hits, matched);
        Counters::count(&self.pool.counters.misses, tokens.len() - matched);
        Ok(matched)
    }

    /// Sets the ids of the next tokens. Ignored when the ids of the tokens before are not known.
    pub(crate) fn note_tokens(&mut self, tokens: &[u32]) {
        if self.tokens.len() == self.longest() {
            self.tokens.extend_from_slice(tokens);
        }
    }
}
