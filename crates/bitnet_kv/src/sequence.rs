//! The tokens of one cache: where they are stored, and how many of them each layer has.
//!
//! Layers append their tokens one after the other, and no call marks the beginning or the end of a pass. So each layer
//! has its own length, and the first layer that grows past all others reserves slots for all of them. The tokens that
//! all layers have are committed only when the next pass begins: until then the last layer may still attend to blocks
//! that a window will free.
//!
//! A view of a layer shares the segments with the sequence, and they do not change while it exists. No call waits for a
//! view to be dropped: a write returns [`KvError::Busy`], and blocks that are no longer needed are freed later.

use std::sync::Arc;

use paged_attention::{BlockTable, ReserveError, TableOptions};

use crate::compress::Mover;
use crate::error::Result;
use crate::pool::Inner;
use crate::read::View;
use crate::rows::Rows;
use crate::segment::OwnedSegment;
use crate::stats::Counters;
use crate::{BlocksInUse, KvError, Overflow};

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) pool: Arc<Inner>,
    pub(crate) batch: usize,
    /// The options of the first table: its window and salt.
    pub(crate) options: TableOptions,
    pub(crate) overflow: Overflow,
    /// Whether the pool is replaced by a larger one when a pass does not fit: for a ring whose pool no other cache
    /// uses.
    pub(crate) enlarges: bool,
    max_seq_len: usize,
    /// Consecutive segments, those in 8-bit storage first.
    pub(crate) segments: Arc<Vec<OwnedSegment>>,
    /// Whether the segments may have blocks for tokens that no layer has any more.
    pub(crate) to_shrink: bool,
    /// How many tokens each layer has.
    pub(crate) lens: Vec<usize>,
    /// The known token ids, from the first one on: those of the tokens that the layers have, and possibly of the next
    /// ones.
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
            segments: Arc::default(),
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

    /// A view of a layer as it is now.
    pub(crate) fn view(&self, layer: usize) -> Result<View> {
        self.layer(layer)?;
        let len = self.len(layer);
        let window = self.overflow.window(self.max_seq_len);
        Ok(View { pool: self.pool.clone(), batch: self.batch, layer, len, window, segments: self.segments.clone() })
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

    /// Checks that the cache may have this length.
    fn fits(&self, len: usize) -> Result<()> {
        let max_seq_len = self.max_seq_len;
        match self.overflow {
            Overflow::Error if len > max_seq_len => Err(KvError::Overflow { len, max_seq_len }),
            _ => Ok(()),
        }
    }

    /// Writes rows at position `start` of a layer, which has at least `start` tokens.
    pub(crate) fn write(&mut self, layer: usize, start: usize, rows: &Rows) -> Result<()> {
        let end = start + rows.tokens;
        // A view may be dropped at any moment, but can only be made from the sequence, which this call has exclusively.
        // So once there is no view, none appears, and the tidying that a view has delayed can be done first.
        segments_mut(&mut self.segments)?;
        self.tidy()?;
        debug_assert!(!self.to_shrink);
        if end > self.longest() {
            self.settle()?;
            self.reserve(end)?;
        }
        let segments = segments_mut(&mut self.segments)?;
        for at in 0..segments.len() {
            let bounds = OwnedSegment::bounds(segments, at);
            let positions = start.max(bounds.start)..end.min(bounds.end);
            if positions.is_empty() {
                continue;
            }
            let (k, v) = rows.packed(positions.start - start, positions.len())?;
            let segment = &mut segments[at];
            segment.cache.write(layer, &mut segment.tables, positions.start - segment.start, &k, &v)?;
        }
        Ok(())
    }

    /// Makes slots for positions up to `end`.
    fn reserve(&mut self, end: usize) -> Result<()> {
        let segments = segments_mut(&mut self.segments)?;
        let filled =
            segments.last().map_or(0, |segment| if segment.old { segment.committed() } else { segment.capacity() });
        if let Some(segment) = segments.last_mut().filter(|segment| !segment.old) {
            match segment.reserve(end) {
                Err(ReserveError::OutOfBlocks(_)) if self.overflow == Overflow::Grow => {}
                Err(ReserveError::OutOfBlocks(_)) if self.enlarges => {
                    let larger = self.pool.recent.replaced(segment.blocks_with_room(end))?;
                    *segment = segment.moved(larger, &self.options, &self.lens, end)?;
                    return Ok(());
                }
                other => return Ok(other?),
            }
        }
        if self.enlarges && filled == 0 {
            let recent = &self.pool.recent;
            recent.at_least(end.div_ceil(recent.block_size()).saturating_mul(self.batch))?;
        }
        // Only a table that starts at position 0 can be cached under its tokens.
        let private = TableOptions::default().private();
        let options = if filled == 0 { &self.options } else { &private };
        segments.push(OwnedSegment::new(&self.pool.recent, options, self.batch, filled, end - filled, false)?);
        Ok(())
    }

    /// Commits the tokens that all layers have, and moves old tokens to 8-bit storage. Called when a pass is over and
    /// no layer attends to it any more.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let shortest = self.shortest();
        let segments = segments_mut(&mut self.segments)?;
        for at in 0..segments.len() {
            let end = shortest.min(OwnedSegment::bounds(segments, at).end);
            let segment = &mut segments[at];
            if segment.old || end <= segment.committed() {
                continue;
            }
            // Only the table of a single sequence's first segment can be cached under its tokens.
            let known =
                if segment.start == 0 && self.batch == 1 { &self.tokens[..end.min(self.tokens.len())] } else { &[] };
            for table in &mut segment.tables {
                let before = table.freed_blocks().len();
                commit(table, end - segment.start, known);
                Counters::count(&self.pool.counters.freed_by_window, table.freed_blocks().len() - before);
            }
        }
        match self.pool.older_than {
            Some(older_than) => {
                Mover { pool: &self.pool, batch: self.batch, segments }.move_old(shortest.saturating_sub(older_than))
            }
            None => Ok(()),
        }
    }

    /// Keeps the first `len` tokens of a layer. Blocks are freed when no layer needs them.
    pub(crate) fn truncate_layer(&mut self, layer: usize, len: usize) -> Result<()> {
        self.layer(layer)?;
        if len < self.len(layer) {
            self.can_truncate(len)?;
            self.lens[layer] = len;
            self.cut(len)?;
        }
        Ok(())
    }

    /// Keeps the first `len` tokens of all layers.
    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        if len >= self.longest() {
            return Ok(()); // known ids of the next tokens stay valid
        }
        self.can_truncate(len)?;
        self.lens.iter_mut().for_each(|of_layer| *of_layer = len.min(*of_layer));
        self.cut(len)
    }

    /// Removes all tokens, and the known ids of the next ones.
    pub(crate) fn clear(&mut self) {
        // It cannot fail: truncated to 0, a sequence needs none of the freed blocks.
        drop(self.truncate(0));
        self.tokens.clear();
    }

    /// Checks that the window has not freed a block that would be visible after a truncation to `len`.
    fn can_truncate(&self, len: usize) -> Result<()> {
        if len >= self.longest() {
            return Ok(());
        }
        for table in self.segments.first().into_iter().flat_map(|segment| &segment.tables) {
            if table.window().is_some() && len < table.len() {
                drop(table.fork_at(len)?);
            }
        }
        Ok(())
    }

    /// To be called after a layer was truncated to `len` tokens: the ids of the tokens after them are no longer known.
    fn cut(&mut self, len: usize) -> Result<()> {
        self.tokens.truncate(len);
        self.to_shrink = true;
        self.tidy()
    }

    /// Frees the blocks of tokens that no layer has. While a view exists this does nothing, and must be called again.
    pub(crate) fn tidy(&mut self) -> Result<()> {
        let longest = self.longest();
        let Some(segments) = Arc::get_mut(&mut self.segments).filter(|_| self.to_shrink) else { return Ok(()) };
        while segments.last().is_some_and(|segment| segment.first() >= longest) {
            segments.pop();
        }
        self.to_shrink = false;
        segments.last_mut().map_or(Ok(()), |segment| segment.truncate(longest))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.segments.iter().map(OwnedSegment::bytes).sum()
    }

    pub(crate) fn blocks(&self) -> BlocksInUse {
        let of = |old| self.segments.iter().filter(|segment| segment.old == old).map(OwnedSegment::blocks).sum();
        BlocksInUse { recent: of(false), compressed: of(true) }
    }
}

/// Commits the tokens that all layers have, so that other sequences can match them after this one is dropped.
impl Drop for Sequence {
    fn drop(&mut self) {
        // Unlike `settle`, this moves nothing to 8-bit storage: the blocks are freed next.
        let shortest = self.shortest();
        let first = Arc::get_mut(&mut self.segments).and_then(|segments| segments.first_mut());
        if let Some(segment) = first.filter(|segment| segment.start == 0 && !segment.old && self.batch == 1) {
            let end = shortest.min(segment.capacity());
            let known = &self.tokens[..end.min(self.tokens.len())];
            segment.tables.iter_mut().for_each(|table| commit(table, end, known));
        }
    }
}

/// The segments for writing; [`KvError::Busy`] while a view exists.
pub(crate) fn segments_mut(segments: &mut Arc<Vec<OwnedSegment>>) -> Result<&mut Vec<OwnedSegment>> {
    Arc::get_mut(segments).ok_or(KvError::Busy)
}

/// Commits the tokens before position `end` of a table, with the ids of those that are known.
fn commit(table: &mut BlockTable, end: usize, known: &[u32]) {
    if let Some(known) = known.get(table.len()..).filter(|known| !known.is_empty()) {
        let committed = table.commit_tokens(known);
        debug_assert!(committed.is_ok(), "the tokens are reserved");
    }
    if end > table.len() {
        let committed = table.commit(end - table.len());
        debug_assert!(committed.is_ok(), "the tokens are reserved");
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
    const SHAPE: KvShape = KvShape::new(LAYERS, 1, 8);

    fn counts(own: &Sequence) -> [usize; 2] {
        let blocks = own.blocks();
        [blocks.recent, blocks.compressed]
    }

    /// Appends tokens to a layer, all of whose values are `number`.
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

    /// A ring of sixty tokens, of which the last token sees four sink tokens and the last twelve.
    fn ring() -> Sequence {
        let builder = PagedKVPool::builder(SHAPE).blocks(12).block_size(4).max_seq_len(16);
        let pool = builder.overflow(Overflow::Circular { sink_tokens: 4 }).build().unwrap();
        let mut own = Sequence::new(&pool.0, 1, pool.table_options(&CacheOptions::default()));
        for _ in 0..20 {
            (0..LAYERS).for_each(|layer| append(&mut own, layer, 3, 1.0).unwrap());
        }
        own
    }

    #[test]
    fn blocks_of_a_view_stay_until_it_is_dropped() {
        let pool = PagedKVPool::builder(SHAPE).blocks(8).build().unwrap();
        let mut own = sequence(&pool);
        let prompt: Vec<u32> = (0..60).collect();
        assert_eq!(own.match_prefix(&prompt).unwrap(), 0);
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 60, 1.0).unwrap());
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 1, 1.0).unwrap());
        let view = own.view(0).unwrap();
        assert!(matches!(append(&mut own, 1, 1, 2.0), Err(KvError::Busy)));
        assert_eq!((own.len(1), counts(&own)), (61, [4, 0]));
        own.truncate(20).unwrap();
        assert_eq!((own.len(0), own.len(1), counts(&own)), (20, 20, [4, 0]));
        assert!(matches!(append(&mut own, 1, 1, 2.0), Err(KvError::Busy)));
        assert_eq!(keys(&view), vec![1.0; 61]);
        drop(view);
        // `tidy` was not called after the view was dropped. Even so, the new tokens do not count as the old ones.
        let branch: Vec<u32> = (0..20).chain(100..140).collect();
        own.note_tokens(&branch[20..]);
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 40, 2.0).unwrap());
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 1, 2.0).unwrap());
        for (tokens, of_branch) in [(&prompt, 0), (&branch, 28)] {
            let mut other = sequence(&pool);
            assert_eq!(other.match_prefix(tokens).unwrap(), 48);
            assert_eq!(keys(&other.view(0).unwrap()), [vec![1.0; 48 - of_branch], vec![2.0; of_branch]].concat());
        }
    }

    #[test]
    fn a_ring_with_a_view_can_be_truncated_and_continued() {
        let mut own = ring();
        let view = own.view(0).unwrap();
        own.truncate(58).unwrap();
        assert!(matches!(own.truncate(30), Err(KvError::OutOfWindow(_))));
        own.truncate(3).unwrap();
        own.truncate(30).unwrap(); // it has no more
        assert_eq!(own.longest(), 3);
        own.truncate(0).unwrap();
        drop(view);
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 14, 2.0).unwrap());
        assert_eq!((keys(&own.view(1).unwrap()), counts(&own)), (vec![2.0; 14], [4, 0]));
    }

    #[test]
    fn what_a_ring_has_freed_cannot_be_written() {
        let mut own = ring();
        // One layer alone starts again, at positions of which only the sink tokens' blocks are not freed.
        own.truncate_layer(0, 0).unwrap();
        append(&mut own, 0, 4, 2.0).unwrap();
        let error = append(&mut own, 0, 40, 2.0).unwrap_err().to_string();
        assert!(error.contains("4 has no slot"), "{error}");
        assert_eq!((own.len(0), own.len(1), keys(&own.view(0).unwrap())), (4, 60, vec![2.0; 4]));
    }

    #[test]
    fn a_sequence_with_a_view_can_be_cleared() {
        let pool = PagedKVPool::builder(SHAPE).blocks(8).build().unwrap();
        let mut own = sequence(&pool);
        (0..LAYERS).for_each(|layer| append(&mut own, layer, 40, 1.0).unwrap());
        let view = own.view(1).unwrap();
        (0..LAYERS).for_each(|layer| own.truncate_layer(layer, 0).unwrap());
        assert_eq!((own.longest(), pool.blocks_in_use(), keys(&view).len()), (0, 3, 40));
        assert!(matches!(own.match_prefix(&[1, 2, 3]), Err(KvError::Busy)));
        drop(view);
        own.tidy().unwrap();
        assert_eq!(pool.blocks_in_use(), 0);
        assert_eq!(own.match_prefix(&[1, 2, 3]).unwrap(), 0);
    }
}
