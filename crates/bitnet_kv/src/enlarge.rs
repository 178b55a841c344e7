//! Moving a ring to a larger pool, when a pass does not fit into the one it has.
//!
//! A cache that grows keeps its blocks and continues in a second pool. A ring cannot, since its window frees blocks of
//! a single table. So the content of its table is copied, which is little more than a window.

use paged_attention::{BlockTable, KvCache, TableOptions};

use crate::error::Result;
use crate::segment::OwnedSegment;

impl OwnedSegment {
    /// How many blocks a copy of this segment with slots up to position `end` needs.
    pub(crate) fn blocks_with_room(&self, end: usize) -> usize {
        let each = |table: &BlockTable| {
            let freed = (table.capacity() / table.pool().block_size()).saturating_sub(table.blocks().len());
            // One block more, since `as_long` reserves a block before the window frees one.
            table.pool().blocks_for(end).saturating_sub(freed).saturating_add(1)
        };
        self.tables.iter().map(each).fold(0, usize::saturating_add)
    }

    /// A copy of this segment in `cache`, with slots up to position `end`. `lens` is how many tokens each layer has.
    pub(crate) fn moved(&self, cache: KvCache, options: &TableOptions, lens: &[usize], end: usize) -> Result<Self> {
        let tables = self.tables.iter().map(|table| as_long(table, &cache, options)).collect::<Result<_>>()?;
        let mut moved = Self { cache, tables, start: self.start, old: self.old };
        moved.reserve(end)?;
        for (layer, &len) in lens.iter().enumerate() {
            for kept in self.kept() {
                let positions = kept.start.min(len)..kept.end.min(len);
                if positions.is_empty() {
                    continue;
                }
                let (k, v) = self.read(layer, positions.clone())?;
                moved.cache.write(layer, &mut moved.tables, positions.start, &k, &v)?;
            }
        }
        Ok(moved)
    }

    /// The positions before the freed range, and those after it.
    fn kept(&self) -> [std::ops::Range<usize>; 2] {
        let Some(table) = self.tables.first() else { return [0..0, 0..0] };
        let (freed, block_size) = (table.freed_blocks(), table.pool().block_size());
        [0..freed.start * block_size, freed.end * block_size..table.capacity()]
    }
}

/// A table with the length and the freed range of `like`, whose slots are not written.
fn as_long(like: &BlockTable, cache: &KvCache, options: &TableOptions) -> Result<BlockTable> {
    let mut table = cache.table_with(options);
    let block_size = table.pool().block_size();
    // Block by block, so that the table never has more than the blocks of a window and one more.
    while table.len() < like.len() {
        let tokens = block_size.min(like.len() - table.len());
        table.reserve(tokens)?;
        let committed = table.commit(tokens);
        debug_assert!(committed.is_ok(), "the tokens are reserved");
    }
    debug_assert_eq!(
        table.freed_blocks().len(),
        like.freed_blocks().len(),
        "a ring is not truncated into its freed range"
    );
    Ok(table)
}
