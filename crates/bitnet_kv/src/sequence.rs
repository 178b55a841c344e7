//! The tokens of one cache: where they lie, and how many of them each layer has.
//!
//! Layers take their tokens one after the other, without anybody saying that a pass begins or ends. So the first layer that
//! goes beyond all others makes room for all of them, and each layer has a length of its own. What all layers have is
//! committed only when the next pass begins: until then the last layer may still have to look at what a window leaves behind.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use paged_attention::{BlockTable, ReserveError, TableOptions};

use crate::error::Result;
use crate::part::Part;
use crate::pool::Inner;
use crate::rows::Rows;
use crate::stats::Counters;
use crate::{KvError, Overflow};

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) pool: Arc<Inner>,
    pub(crate) batch: usize,
    /// How the first table is made: its window and salt.
    options: TableOptions,
    pub(crate) overflow: Overflow,
    pub(crate) max_seq_len: usize,
    /// Those in 8-bit storage first; they follow each other.
    pub(crate) parts: Vec<Part>,
    /// The tokens that each layer has. Also read by those who do not hold the sequence.
    lens: Arc<[AtomicUsize]>,
    /// The tokens whose ids were told, from the first one on.
    tokens: Vec<u32>,
}

impl Sequence {
    pub(crate) fn new(pool: &Arc<Inner>, batch: usize, options: TableOptions) -> Self {
        let lens = (0..pool.taken.shape.layers).map(|_| AtomicUsize::new(0)).collect();
        let (overflow, max_seq_len) = (pool.overflow, pool.max_seq_len);
        Self { pool: pool.clone(), batch, options, overflow, max_seq_len, parts: vec![], lens, tokens: vec![] }
    }

    pub(crate) fn lens(&self) -> Arc<[AtomicUsize]> {
        self.lens.clone()
    }

    pub(crate) fn layer(&self, layer: usize) -> Result<()> {
        let layers = self.lens.len();
        if layer < layers { Ok(()) } else { Err(KvError::Layer { layer, layers }) }
    }

    /// How many tokens a layer has.
    pub(crate) fn len(&self, layer: usize) -> usize {
        self.lens[layer].load(Ordering::Relaxed)
    }

    fn set_len(&self, layer: usize, len: usize) {
        self.lens[layer].store(len, Ordering::Relaxed);
    }

    pub(crate) fn longest(&self) -> usize {
        (0..self.lens.len()).map(|layer| self.len(layer)).max().unwrap_or(0)
    }

    pub(crate) fn shortest(&self) -> usize {
        (0..self.lens.len()).map(|layer| self.len(layer)).min().unwrap_or(0)
    }

    /// Adds tokens to a layer.
    pub(crate) fn append(&mut self, layer: usize, rows: &Rows) -> Result<()> {
        self.layer(layer)?;
        let start = self.len(layer);
        self.fits(start + rows.tokens)?;
        self.write(layer, start, rows)?;
        self.set_len(layer, start + rows.tokens);
        Ok(())
    }

    /// Whether the cache may be this long.
    pub(crate) fn fits(&self, len: usize) -> Result<()> {
        let max_seq_len = self.max_seq_len;
        match self.overflow {
            Overflow::Error if len > max_seq_len => Err(KvError::Overflow { len, max_seq_len }),
            _ => Ok(()),
        }
    }

    /// Writes rows at position `start` of a layer, which has no fewer tokens.
    pub(crate) fn write(&mut self, layer: usize, start: usize, rows: &Rows) -> Result<()> {
        let end = start + rows.tokens;
        if end > self.longest() {
            self.settle()?;
            self.reserve(end)?;
        }
        for at in 0..self.parts.len() {
            let bounds = self.bounds(at);
            let positions = start.max(bounds.start)..end.min(bounds.end);
            if positions.is_empty() {
                continue;
            }
            let (k, v) = rows.packed(positions.start - start, positions.len())?;
            let part = &mut self.parts[at];
            part.cache.write_at(layer, &mut part.tables, positions.start - part.start, &k, &v)?;
        }
        Ok(())
    }

    /// The positions of a part: up to where the next one begins, or as far as it has slots.
    pub(crate) fn bounds(&self, at: usize) -> Range<usize> {
        let part = &self.parts[at];
        part.first()..self.parts.get(at + 1).map_or_else(|| part.capacity(), Part::first)
    }

    /// Makes slots for positions up to `end`.
    fn reserve(&mut self, end: usize) -> Result<()> {
        let stores = &self.pool.recent;
        let filled = self.parts.last().map_or(0, |part| if part.old { part.committed() } else { part.capacity() });
        if let Some(part) = self.parts.last_mut().filter(|part| !part.old) {
            match part.reserve(end) {
                Err(ReserveError::OutOfBlocks(_)) if self.overflow == Overflow::Grow => {}
                other => return Ok(other?),
            }
        }
        // Only what begins at the beginning can be found by its tokens.
        let hidden = TableOptions::default().private();
        let options = if filled == 0 { &self.options } else { &hidden };
        self.parts.push(Part::new(stores, options, self.batch, filled, end - filled, false)?);
        Ok(())
    }

    /// Commits the tokens that all layers have, and moves what is old. Called when a pass is over: no layer attends to it
    /// any more.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let shortest = self.shortest();
        for at in 0..self.parts.len() {
            let end = shortest.min(self.bounds(at).end);
            let part = &mut self.parts[at];
            if part.old || end <= part.committed() {
                continue;
            }
            // Only the first part of a single sequence has a table that can be found by its tokens.
            let known =
                if part.start == 0 && self.batch == 1 { &self.tokens[..end.min(self.tokens.len())] } else { &[] };
            for table in &mut part.tables {
                let before = table.gap().1;
                commit(table, end - part.start, known);
                Counters::count(&self.pool.counters.left_behind, table.gap().1 - before);
            }
        }
        match self.pool.older_than {
            Some(older_than) => self.move_old(shortest.saturating_sub(older_than)),
            None => Ok(()),
        }
    }

    /// Keeps the first `len` tokens of a layer. Blocks are given back when no layer needs them.
    pub(crate) fn truncate_layer(&mut self, layer: usize, len: usize) -> Result<()> {
        self.layer(layer)?;
        if len < self.len(layer) {
            self.can_go_back(len)?;
            self.set_len(layer, len);
            self.tokens.truncate(len);
            self.shrink()?;
        }
        Ok(())
    }

    /// Keeps the first `len` tokens of all layers.
    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        self.can_go_back(len)?;
        for layer in 0..self.lens.len() {
            self.set_len(layer, self.len(layer).min(len));
        }
        self.tokens.truncate(len);
        self.shrink()
    }

    /// Whether a window still holds what would be seen again.
    fn can_go_back(&self, len: usize) -> Result<()> {
        for table in self.parts.first().into_iter().flat_map(|part| &part.tables) {
            if table.window().is_some() && len < table.len() {
                drop(table.fork_at(len)?);
            }
        }
        Ok(())
    }

    /// Gives back what no layer has.
    fn shrink(&mut self) -> Result<()> {
        let longest = self.longest();
        while self.parts.last().is_some_and(|part| part.first() >= longest) {
            self.parts.pop();
        }
        self.parts.last_mut().map_or(Ok(()), |part| part.truncate(longest))
    }

    /// Starts with what is known of these tokens; says how many need not be computed.
    pub(crate) fn reuse(&mut self, tokens: &[u32]) -> Result<usize> {
        let (len, batch) = (self.longest(), self.batch);
        if len > 0 || batch != 1 {
            return Err(KvError::NotEmpty { len, batch });
        }
        let mut best: Option<Part> = None;
        for cache in self.pool.recent.all() {
            let mut table = cache.table_with(&self.options);
            let found = table.reuse(tokens);
            if found > best.as_ref().map_or(0, Part::committed) {
                best = Some(Part { cache, tables: vec![table], start: 0, old: false });
            }
        }
        let found = best.as_ref().map_or(0, Part::committed);
        self.parts = best.into_iter().collect();
        (0..self.lens.len()).for_each(|layer| self.set_len(layer, found));
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

    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(Part::bytes).sum()
    }

    /// Blocks held, those of new tokens and those in 8-bit storage.
    pub(crate) fn blocks(&self) -> [usize; 2] {
        let of = |old| self.parts.iter().filter(|part| part.old == old).map(Part::blocks).sum();
        [of(false), of(true)]
    }
}

/// What all layers have can be found by others when the cache is gone.
impl Drop for Sequence {
    fn drop(&mut self) {
        // Blocks that are about to be given back need not be moved.
        let shortest = self.shortest();
        if let Some(part) = self.parts.first_mut().filter(|part| part.start == 0 && !part.old && self.batch == 1) {
            let end = shortest.min(part.capacity());
            let known = &self.tokens[..end.min(self.tokens.len())];
            part.tables.iter_mut().for_each(|table| commit(table, end, known));
        }
    }
}

/// Makes the tokens before `end` part of a table, those that are known by their ids.
fn commit(table: &mut BlockTable, end: usize, known: &[u32]) {
    if let Some(known) = known.get(table.len()..).filter(|known| !known.is_empty()) {
        let committed = table.commit_tokens(known);
        debug_assert!(committed.is_ok(), "they are reserved");
    }
    if end > table.len() {
        let committed = table.commit(end - table.len());
        debug_assert!(committed.is_ok(), "they are reserved");
    }
}
