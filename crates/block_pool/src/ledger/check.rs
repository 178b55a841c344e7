//! Whether the ledger is consistent.

use super::Ledger;
use crate::{BlockId, Inconsistent};

impl Ledger {
    /// For each group, the ref_count of each block, and whether it is cached.
    pub(crate) fn states(&self) -> Vec<Vec<(u32, bool)>> {
        let state = |entry| (self.ref_counts[entry], self.tree.contains(entry));
        let of = |group: &super::Group| (group.first..group.first + group.free.blocks()).map(state).collect();
        self.groups.iter().map(of).collect()
    }

    pub(crate) fn check(&self) -> Result<(), Inconsistent> {
        if let Some(wrong) = self.tree.inconsistency() {
            return Err(Inconsistent(wrong));
        }
        // The rank of each evictable block in the order of eviction.
        let mut ranks = vec![None; self.ref_counts.len()];
        for (rank, entry) in self.evictable.iter().take(self.ref_counts.len() + 1).enumerate() {
            if ranks[entry].replace(rank).is_some() {
                return Err(Inconsistent(format!("{:?} is in the eviction list twice", self.block(entry))));
            }
        }
        if ranks.iter().flatten().count() != self.evictable.len() {
            return Err(Inconsistent("the length of the eviction list is wrong".into()));
        }
        let (mut units_in_use, mut units_evictable) = (0, 0);
        for (group, of) in self.groups.iter().enumerate() {
            if !of.free.is_consistent() {
                return Err(Inconsistent("the summaries of the free blocks are wrong".into()));
            }
            self.check_group(group, &ranks)?;
            let (in_use, evictable) = self.blocks_of_group(group);
            units_in_use += in_use * of.units;
            units_evictable += evictable * of.units;
        }
        let counted = (self.units_in_use, self.units_evictable);
        if counted != (units_in_use, units_evictable) || units_in_use + units_evictable > self.budget {
            return Err(Inconsistent(format!(
                "blocks take {units_in_use} units in use and {units_evictable} evictable, {counted:?} are counted, of {}",
                self.budget
            )));
        }
        if self.resident() > self.budget {
            return Err(Inconsistent(format!("{} units have memory, of {}", self.resident(), self.budget)));
        }
        Ok(())
    }

    fn check_group(&self, group: usize, ranks: &[Option<usize>]) -> Result<(), Inconsistent> {
        let of = &self.groups[group];
        let mut evictable = 0;
        for index in 0..of.free.blocks() {
            let (id, entry) = (BlockId::new(index), of.first + index);
            let ref_count = self.ref_counts[entry];
            let (free, cached, rank) = (of.free.contains(id), self.tree.contains(entry), ranks[entry]);
            if (free, rank.is_some()) != (ref_count == 0 && !cached, ref_count == 0 && cached) {
                return Err(Inconsistent(format!(
                    "{id:?} of group {group} has a ref_count of {ref_count}; free: {free}, evictable: {}, cached: {cached}",
                    rank.is_some()
                )));
            }
            evictable += usize::from(rank.is_some());
            if of.resident.as_ref().is_some_and(|resident| !free && !resident.contains(index)) {
                return Err(Inconsistent(format!("{id:?} of group {group} is not free and has no memory")));
            }
            // A sequence that uses a follower of a block uses the block, too, and frees it later.
            let outlives = |follower: &BlockId| {
                rank.is_some() && ranks[of.first + follower.index()].is_none_or(|r| Some(r) > rank)
            };
            if let Some(follower) = self.tree.followers(group, entry).into_iter().find(outlives) {
                return Err(Inconsistent(format!("{id:?} would be evicted before {follower:?}, which follows it")));
            }
        }
        let counted = self.blocks_of_group(group).1;
        if evictable != counted {
            return Err(Inconsistent(format!("group {group} has {evictable} evictable blocks, not {counted}")));
        }
        Ok(())
    }

    /// Does the same as [`check`](Self::check), and checks that the ref_counts of a group are the `counted` ones.
    pub(crate) fn check_counted(&self, group: usize, counted: &[u32]) -> Result<(), Inconsistent> {
        self.check()?;
        let first = self.groups[group].first;
        for (index, (&ref_count, &counted)) in self.ref_counts[first..].iter().zip(counted).enumerate() {
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
