//! A ring that a pass does not fit into: it goes on in a larger pool.
//!
//! A pool that grows keeps what it has and goes on in another one. A ring cannot: its window leaves blocks behind in one
//! table. So what it holds is copied, which is not much.

use candle_core::Tensor;
use paged_attention::{BlockTable, KvCache, TableOptions};

use crate::error::Result;
use crate::part::Part;

impl Part {
    /// The blocks that it takes to hold what it holds, and slots up to position `end`.
    pub(crate) fn blocks_with_room(&self, end: usize) -> usize {
        let each = |table: &BlockTable| {
            let held = (table.capacity() / table.pool().block_size()).saturating_sub(table.blocks().len());
            // One more while a block is left behind.
            table.pool().blocks_for(end).saturating_sub(held).saturating_add(1)
        };
        self.tables.iter().map(each).fold(0, usize::saturating_add)
    }

    /// The same in `cache`, with slots up to position `end`. `lens` are the tokens that each layer has.
    pub(crate) fn moved(&self, cache: KvCache, options: &TableOptions, lens: &[usize], end: usize) -> Result<Self> {
        let tables = self.tables.iter().map(|table| as_long(table, &cache, options)).collect::<Result<_>>()?;
        let mut moved = Self { cache, tables, start: self.start, old: self.old };
        moved.reserve(end)?;
        for (layer, &len) in lens.iter().enumerate() {
            for held in self.held() {
                let positions = held.start.min(len)..held.end.min(len);
                if positions.is_empty() {
                    continue;
                }
                let (mut keys, mut values) = (vec![], vec![]);
                for table in &self.tables {
                    let (k, v) = self.cache.read_at(layer, table, positions.clone())?;
                    keys.push(k);
                    values.push(v);
                }
                let (k, v) = (Tensor::cat(&keys, 0)?, Tensor::cat(&values, 0)?);
                moved.cache.write_at(layer, &mut moved.tables, positions.start, &k, &v)?;
            }
        }
        Ok(moved)
    }

    /// The positions before what a window has left behind, and those after it.
    fn held(&self) -> [std::ops::Range<usize>; 2] {
        let Some(table) = self.tables.first() else { return [0..0, 0..0] };
        let ((before, missing), block_size) = (table.gap(), table.pool().block_size());
        [0..before * block_size, (before + missing) * block_size..table.capacity()]
    }
}

/// A table that has left as much behind, and nothing in the rest.
fn as_long(like: &BlockTable, cache: &KvCache, options: &TableOptions) -> Result<BlockTable> {
    let mut table = cache.table_with(options);
    let block_size = table.pool().block_size();
    // By blocks, so that it never holds more than a window and one of them.
    while table.len() < like.len() {
        let tokens = block_size.min(like.len() - table.len());
        table.reserve(tokens)?;
        let committed = table.commit(tokens);
        debug_assert!(committed.is_ok(), "they are reserved");
    }
    debug_assert_eq!(table.gap().1, like.gap().1, "a ring goes back only as far as it has left nothing behind");
    Ok(table)
}
