//! Which blocks go to a tier below the pool.

use std::sync::Arc;

use super::Ledger;
use crate::offload::{Queue, WrittenThrough};
use crate::{BlockId, GroupBlock};

impl Ledger {
    /// Has blocks that are cached from now on go to a tier. Returns false if they do already.
    pub(crate) fn start_offload(&mut self, queue: &Arc<Queue>) -> bool {
        if self.offload.is_some() {
            return false;
        }
        self.offload = Some(queue.clone());
        self.tree.keep_lineages();
        true
    }

    /// Ends it. Returns what is left of it, for the caller to drop without the lock.
    pub(crate) fn end_offload(&mut self) -> impl Sized + use<> {
        (self.offload.take(), self.tree.take_lineages(), std::mem::take(&mut self.written_through))
    }

    pub(crate) fn offload(&self) -> Option<&Arc<Queue>> {
        self.offload.as_ref()
    }

    /// Notes that a block has become cached.
    #[cold]
    pub(super) fn write_through(&mut self, group: usize, block: BlockId) {
        if self.offload.as_ref().is_some_and(|queue| queue.writes_through())
            && let Some(lineage) = self.tree.lineage(self.entry(group, block))
        {
            let lineage = lineage.clone();
            self.written_through.push(WrittenThrough { block: GroupBlock { group, block }, lineage });
        }
    }

    /// The blocks that have become cached since the last call, if they are to be written through.
    #[inline]
    pub(crate) fn take_written_through(&mut self) -> Vec<WrittenThrough> {
        std::mem::take(&mut self.written_through)
    }

    /// How many blocks the lineage of a block has lost, if the block is cached under it. As long as that does not change,
    /// it is.
    pub(crate) fn removed_if_cached(&self, of: &WrittenThrough) -> Option<u32> {
        let lineage = self.tree.lineage(self.entry(of.block.group, of.block.block))?;
        Arc::ptr_eq(lineage, &of.lineage).then(|| lineage.removed())
    }
}
