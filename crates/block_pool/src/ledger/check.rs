//! Whether the ledger is consistent.

use super::Ledger;
use crate::{BlockId, Inconsistent};

impl Ledger {
    /// The ref_count of each block, and whether it is cached.
    pub(crate) fn states(&self) -> (Vec<u32>, Vec<bool>) {
        let ids = (0..self.ref_counts.len()).map(BlockId::new);
        (self.ref_counts.clone(), ids.map(|id| self.tree.contains(id)).collect())
    }

    pub(crate) fn check(&self) -> Result<(), Inconsistent> {
        if !self.free.is_consistent() {
            return Err(Inconsistent("the summaries of the free blocks are wrong".into()));
        }
        if let Some(wrong) = self.tree.inconsistency() {
            return Err(Inconsistent(wrong));
        }
        // The rank of each evictable block in the order of eviction.
        let mut ranks = vec![None; self.ref_counts.len()];
        for (rank, id) in self.evictable.iter().take(self.ref_counts.len() + 1).enumerate() {
            if ranks[id.index()].replace(rank).is_some() {
                return Err(Inconsistent(format!("{id:?} is in the eviction list twice")));
            }
        }
        if ranks.iter().flatten().count() != self.evictable.len() {
            return Err(Inconsistent("the length of the eviction list is wrong".into()));
        }
        for (index, &ref_count) in self.ref_counts.iter().enumerate() {
            let id = BlockId::new(index);
            let (free, cached, rank) = (self.free.contains(id), self.tree.contains(id), ranks[index]);
            if (free, rank.is_some()) != (ref_count == 0 && !cached, ref_count == 0 && cached) {
                return Err(Inconsistent(format!(
                    "{id:?} has a ref_count of {ref_count}; free: {free}, evictable: {}, cached: {cached}",
                    rank.is_some()
                )));
            }
            // A sequence that uses a follower of a block uses the block, too, and frees it later.
            let outlives =
                |follower: &BlockId| rank.is_some() && ranks[follower.index()].is_none_or(|r| Some(r) > rank);
            if let Some(follower) = self.tree.followers(id).into_iter().find(outlives) {
                return Err(Inconsistent(format!("{id:?} would be evicted before {follower:?}, which follows it")));
            }
        }
        Ok(())
    }

    /// Does the same as [`check`](Self::check), and checks that the ref_counts are the `counted` ones.
    pub(crate) fn check_counted(&self, counted: &[u32]) -> Result<(), Inconsistent> {
        self.check()?;
        for (index, (&ref_count, &counted)) in self.ref_counts.iter().zip(counted).enumerate() {
            if ref_count != counted {
                let id = BlockId::new(index);
                return Err(Inconsistent(format!("{id:?} has a ref_count of {ref_count}, {counted} lists use it")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::MAX_REF_COUNT;
    use crate::{BlockPool, Blocks};

    #[test]
    fn a_count_does_not_wrap() {
        let pool = BlockPool::new(2, 4).unwrap();
        let blocks = pool.allocate(1).unwrap();
        let id = blocks[0];
        pool.ledger().ref_counts[id.index()] = MAX_REF_COUNT - 1;
        let many: Vec<Blocks> = (0..3).map(|_| blocks.fork(1)).collect();
        let ref_count = pool.ledger().ref_counts[id.index()];
        drop((blocks, many));
        assert_eq!((ref_count, pool.available()), (MAX_REF_COUNT, 1));
    }
}
