//! The tokens of one cache: where they lie, and how many of them each layer has.
//!
//! Layers take their tokens one after the other, without anybody saying that a pass begins or ends. So the first layer that
//! goes beyond all others makes room for all of them, and each layer has a length of its own. What all layers have is
//! committed only when the next pass begins: until then the last layer may still have to look at what a window leaves behind.
//!
//! Who looks at a layer has a share of the parts, and then they stay as they are: nobody waits for whoever looks. What would
//! write says so, and what would give blocks back leaves it to be done behind.

use std::sync::Arc;

use paged_attention::{BlockTable, ReserveError, TableOptions};

use crate::compress::Mover;
use crate::error::Result;
use crate::part::Part;
use crate::pool::Inner;
use crate::read::View;
use crate::rows::Rows;
use crate::stats::Counters;
use crate::{KvError, Overflow};

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) pool: Arc<Inner>,
    pub(crate) batch: usize,
    /// How the first table is made: its window and salt.
    pub(crate) options: TableOptions,
    pub(crate) overflow: Overflow,
    /// Whether a larger pool takes the place of its own when a pass does not fit: of a ring, if nobody else uses the pool.
    pub(crate) enlarges: bool,
    max_seq_len: usize,
    /// Those in 8-bit storage first; they follow each other.
    pub(crate) parts: Arc<Vec<Part>>,
    /// Whether the parts may hold what no layer has any more.
    pub(crate) to_shrink: bool,
    /// The tokens that each layer has.
    pub(crate) lens: Vec<usize>,
    /// The tokens whose ids were told, from the first one on: those that the layers have, and perhaps some that come.
    pub(crate) tokens: Vec<u32>,
}

impl Sequence {
    pub(crate) fn new(pool: &Arc<Inner>, batch: usize, options: TableOptions) -> Self {
        let lens = vec![0; pool.taken.shape.layers];
        let (overflow, max_seq_len, pool) = (pool.overflow, pool.max_seq_len, pool.clone());
        Self {
            pool,
            batch,
            options,
            overflow,
            enlarges: false,
            max_seq_len,
            parts: Arc::default(),
            to_shrink: false,
            lens,
            tokens: vec![],
        }
    }

    pub(crate) fn layer(&self, layer: usize) -> Result<()> {
        let layers = self.lens.len();
        if layer < layers { Ok(()) } else { Err(KvError::Layer { layer, layers }) }
    }

    /// How many tokens a layer has.
    pub(crate) fn len(&self, layer: usize) -> usize {
        self.lens[layer]
    }

    pub(crate) fn longest(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }

    pub(crate) fn shortest(&self) -> usize {
        self.lens.iter().copied().min().unwrap_or(0)
    }

    /// What a layer holds now.
    pub(crate) fn view(&self, layer: usize) -> Result<View> {
        self.layer(layer)?;
        let len = self.len(layer);
        let window = self.overflow.window(self.max_seq_len);
        Ok(View { pool: self.pool.clone(), batch: self.batch, layer, len, window, parts: self.parts.clone() })
    }

    /// Adds tokens to a layer.
    pub(crate) fn append(&mut self, layer: usize, rows: &Rows) -> Result<()> {
        self.layer(layer)?;
        let start = self.len(layer);
        self.fits(start + rows.tokens)?;
        self.write(layer, start, rows)?;
        self.lens[layer] = start + rows.tokens;
        Ok(())
    }

    /// Whether the cache may be this long.
    fn fits(&self, len: usize) -> Result<()> {
        let max_seq_len = self.max_seq_len;
        match self.overflow {
            Overflow::Error if len > max_seq_len => Err(KvError::Overflow { len, max_seq_len }),
            _ => Ok(()),
        }
    }

    /// Writes rows at position `start` of a layer, which has no fewer tokens.
    pub(crate) fn write(&mut self, layer: usize, start: usize, rows: &Rows) -> Result<()> {
        let end = start + rows.tokens;
        // Who looks may go at any moment, but comes only by way of the sequence: so what nobody looks at stays so, and first of
        // all it is tidied.
        to_change(&mut self.parts)?;
        self.tidy()?;
        debug_assert!(!self.to_shrink);
        if end > self.longest() {
            self.settle()?;
            self.reserve(end)?;
        }
        let parts = to_change(&mut self.parts)?;
        for at in 0..parts.len() {
            let bounds = Part::bounds(parts, at);
            let positions = start.max(bounds.start)..end.min(bounds.end);
            if positions.is_empty() {
                continue;
            }
            let (k, v) = rows.packed(positions.start - start, positions.len())?;
            let part = &mut parts[at];
            part.cache.write_at(layer, &mut part.tables, positions.start - part.start, &k, &v)?;
        }
        Ok(())
    }

    /// Makes slots for positions up to `end`.
    fn reserve(&mut self, end: usize) -> Result<()> {
        let parts = to_change(&mut self.parts)?;
        let filled = parts.last().map_or(0, |part| if part.old { part.committed() } else { part.capacity() });
        if let Some(part) = parts.last_mut().filter(|part| !part.old) {
            match part.reserve(end) {
                Err(ReserveError::OutOfBlocks(_)) if self.overflow == Overflow::Grow => {}
                Err(ReserveError::OutOfBlocks(_)) if self.enlarges => {
                    let larger = self.pool.recent.replaced(part.blocks_with_room(end))?;
                    *part = part.moved(larger, &self.options, &self.lens, end)?;
                    return Ok(());
                }
                other => return Ok(other?),
            }
        }
        if self.enlarges && filled == 0 {
            let recent = &self.pool.recent;
            recent.at_least(end.div_ceil(recent.block_size()).saturating_mul(self.batch))?;
        }
        // Only what begins at the beginning can be found by its tokens.
        let hidden = TableOptions::default().private();
        let options = if filled == 0 { &self.options } else { &hidden };
        parts.push(Part::new(&self.pool.recent, options, self.batch, filled, end - filled, false)?);
        Ok(())
    }

    /// Commits the tokens that all layers have, and moves what is old. Called when a pass is over: no layer attends to it
    /// any more.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let shortest = self.shortest();
        let parts = to_change(&mut self.parts)?;
        for at in 0..parts.len() {
            let end = shortest.min(Part::bounds(parts, at).end);
            let part = &mut parts[at];
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
            Some(older_than) => {
                Mover { pool: &self.pool, batch: self.batch, parts }.move_old(shortest.saturating_sub(older_than))
            }
            None => Ok(()),
        }
    }

    /// Keeps the first `len` tokens of a layer. Blocks are given back when no layer needs them.
    pub(crate) fn truncate_layer(&mut self, layer: usize, len: usize) -> Result<()> {
        self.layer(layer)?;
        if len < self.len(layer) {
            self.can_go_back(len)?;
            self.lens[layer] = len;
            self.cut(len)?;
        }
        Ok(())
    }

    /// Keeps the first `len` tokens of all layers.
    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        if len >= self.longest() {
            return Ok(()); // tokens that were told and come next still do
        }
        self.can_go_back(len)?;
        self.lens.iter_mut().for_each(|of_layer| *of_layer = len.min(*of_layer));
        self.cut(len)
    }

    /// Forgets all tokens, and those that it was told would come.
    pub(crate) fn clear(&mut self) {
        // There is nothing that going back to the beginning would see.
        drop(self.truncate(0));
        self.tokens.clear();
    }

    /// Whether a window still holds what would be seen again.
    fn can_go_back(&self, len: usize) -> Result<()> {
        if len >= self.longest() {
            return Ok(());
        }
        for table in self.parts.first().into_iter().flat_map(|part| &part.tables) {
            if table.window().is_some() && len < table.len() {
                drop(table.fork_at(len)?);
            }
        }
        Ok(())
    }

    /// A layer has been cut to `len` tokens: those behind may come again as others.
    fn cut(&mut self, len: usize) -> Result<()> {
        self.tokens.truncate(len);
        self.to_shrink = true;
        self.tidy()
    }

    /// Gives back what no layer has, unless somebody looks at it: then it is to be called again.
    pub(crate) fn tidy(&mut self) -> Result<()> {
        let longest = self.longest();
        let Some(parts) = Arc::get_mut(&mut self.parts).filter(|_| self.to_shrink) else { return Ok(()) };
        while parts.last().is_some_and(|part| part.first() >= longest) {
            parts.pop();
        }
        self.to_shrink = false;
        parts.last_mut().map_or(Ok(()), |part| part.truncate(longest))
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
        let first = Arc::get_mut(&mut self.parts).and_then(|parts| parts.first_mut());
        if let Some(part) = first.filter(|part| part.start == 0 && !part.old && self.batch == 1) {
            let end = shortest.min(part.capacity());
            let known = &self.tokens[..end.min(self.tokens.len())];
            part.tables.iter_mut().for_each(|table| commit(table, end, known));
        }
    }
}

/// The parts, when nobody looks at them.
pub(crate) fn to_change(parts: &mut Arc<Vec<Part>>) -> Result<&mut Vec<Part>> {
    Arc::get_mut(parts).ok_or(KvError::Busy)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{Device, Tensor};
    use paged_attention::KvShape;

    use super::*;
    use crate::{CacheOptions, PagedKVPool};

    const LAYERS: usize = 2;
    const SHAPE: KvShape = KvShape { layers: LAYERS, kv_heads: 1, head_dim: 8 };

    /// A layer's new tokens, all their numbers the same.
    fn append(sequence: &mut Sequence, layer: usize, tokens: usize, number: f32) -> Result<()> {
        let rows = Tensor::full(number, (1, 1, tokens, 8), &Device::Cpu).unwrap();
        let rows = sequence.pool.taken.rows(&rows, &rows, false).unwrap();
        sequence.append(layer, &rows)
    }

    fn keys(view: &View) -> Vec<f32> {
        let (keys, _) = view.keys_and_values().unwrap();
        keys.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().step_by(8).collect()
    }

    fn sequence(pool: &PagedKVPool) -> Sequence {
        Sequence::new(&pool.0, 1, TableOptions::default())
    }

    /// One that sees four sinks and the last twelve of its sixty tokens.
    fn ring() -> Sequence {
        let builder = PagedKVPool::builder(SHAPE).blocks(12).block_size(4).max_seq_len(16);
        let pool = builder.overflow(Overflow::Circular { sinks: 4 }).build().unwrap();
        let mut own = Sequence::new(&pool.0, 1, pool.table_options(&CacheOptions::default()));
        for _ in 0..20 {
            (0..LAYERS).for_each(|layer| append(&mut own, layer, 3, 1.0).unwrap());
        }
        own
    }

    #[test]
    fn what_is_looked_at_stays_and_goes_when_nobody_looks() {
        let pool = PagedKVPool::builder(SHAPE).blocks(8).build().unwrap();
        let mut own = sequence(&pool);
        let prompt: Vec<u32> = (0..60).collect();
        assert_eq!(own.reuse(&prompt).unwrap(), 0);
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 60, 1.0).unwrap());
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 1, 1.0).unwrap());
        let view = own.view(0).unwrap();
        assert!(matches!(append(&mut own, 1, 1, 2.0), Err(KvError::Busy)));
        assert_eq!((own.len(1), own.blocks()), (61, [4, 0]));
        own.truncate(20).unwrap();
        assert_eq!((own.len(0), own.len(1), own.blocks()), (20, 20, [4, 0]));
        assert!(matches!(append(&mut own, 1, 1, 2.0), Err(KvError::Busy)));
        assert_eq!(keys(&view), vec![1.0; 61]);
        drop(view);
        // Nobody has said that it may go now, and yet what comes does not pass for what was there.
        let branch: Vec<u32> = (0..20).chain(100..140).collect();
        own.note_tokens(&branch[20..]);
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 40, 2.0).unwrap());
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 1, 2.0).unwrap());
        for (tokens, of_branch) in [(&prompt, 0), (&branch, 28)] {
            let mut other = sequence(&pool);
            assert_eq!(other.reuse(tokens).unwrap(), 48);
            assert_eq!(keys(&other.view(0).unwrap()), [vec![1.0; 48 - of_branch], vec![2.0; of_branch]].concat());
        }
    }

    #[test]
    fn a_ring_that_is_looked_at_goes_back_and_on() {
        let mut own = ring();
        let view = own.view(0).unwrap();
        own.truncate(58).unwrap();
        assert!(matches!(own.truncate(30), Err(KvError::BehindWindow(_))));
        own.truncate(3).unwrap();
        own.truncate(30).unwrap(); // it has no more
        assert_eq!(own.longest(), 3);
        own.truncate(0).unwrap();
        drop(view);
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 14, 2.0).unwrap());
        assert_eq!((keys(&own.view(1).unwrap()), own.blocks()), (vec![2.0; 14], [4, 0]));
    }

    #[test]
    fn what_a_ring_has_given_back_cannot_be_written() {
        let mut own = ring();
        // One layer alone begins anew, where the others have left everything behind but their sinks.
        own.truncate_layer(0, 0).unwrap();
        append(&mut own, 0, 4, 2.0).unwrap();
        let error = append(&mut own, 0, 40, 2.0).unwrap_err().to_string();
        assert!(error.contains("4 is not held"), "{error}");
        assert_eq!((own.len(0), own.len(1), keys(&own.view(0).unwrap())), (4, 60, vec![2.0; 4]));
    }

    #[test]
    fn a_sequence_that_is_looked_at_can_be_cleared() {
        let pool = PagedKVPool::builder(SHAPE).blocks(8).build().unwrap();
        let mut own = sequence(&pool);
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 40, 1.0).unwrap());
        let view = own.view(1).unwrap();
        (0..LAYERS).for_each(|layer| own.truncate_layer(layer, 0).unwrap());
        assert_eq!((own.longest(), pool.blocks_held(), keys(&view).len()), (0, 3, 40));
        assert!(matches!(own.reuse(&[1, 2, 3]), Err(KvError::Busy)));
        drop(view);
        own.tidy().unwrap();
        assert_eq!(pool.blocks_held(), 0);
        assert_eq!(own.reuse(&[1, 2, 3]).unwrap(), 0);
    }
}
