//! Whether the books agree with themselves.

use super::Ledger;
use crate::{BlockId, Inconsistent};

impl Ledger {
    /// Each block's holders, and whether it can be found.
    pub(crate) fn states(&self) -> (Vec<u32>, Vec<bool>) {
        let ids = (0..self.holders.len()).map(BlockId::new);
        (self.holders.clone(), ids.map(|id| self.tree.contains(id)).collect())
    }

    pub(crate) fn check(&self) -> Result<(), Inconsistent> {
        if !self.free.is_consistent() {
            return Err(Inconsistent("the summaries of the free blocks are wrong".into()));
        }
        if let Some(wrong) = self.tree.inconsistency() {
            return Err(Inconsistent(wrong));
        }
        // The turn of each remembered block to give way.
        let mut turns = vec![None; self.holders.len()];
        for (turn, id) in self.remembered.iter().take(self.holders.len() + 1).enumerate() {
            if turns[id.index()].replace(turn).is_some() {
                return Err(Inconsistent(format!("{id:?} is remembered twice")));
            }
        }
        if turns.iter().flatten().count() != self.remembered.len() {
            return Err(Inconsistent("the number of remembered blocks is wrong".into()));
        }
        for (index, &holders) in self.holders.iter().enumerate() {
            let id = BlockId::new(index);
            let (free, cached, turn) = (self.free.contains(id), self.tree.contains(id), turns[index]);
            if (free, turn.is_some()) != (holders == 0 && !cached, holders == 0 && cached) {
                return Err(Inconsistent(format!(
                    "{id:?} has {holders} holders; free: {free}, remembered: {}, cached: {cached}",
                    turn.is_some()
                )));
            }
            // Who holds what follows a block holds the block, too, and lets it go later.
            let outlives =
                |follower: &BlockId| turn.is_some() && turns[follower.index()].is_none_or(|t| Some(t) > turn);
            if let Some(follower) = self.tree.followers(id).into_iter().find(outlives) {
                return Err(Inconsistent(format!("{id:?} gives way before {follower:?}, which follows it")));
            }
        }
        Ok(())
    }

    /// As [`check`](Self::check), and that each block has as many holders as were counted.
    pub(crate) fn check_counted(&self, counted: &[u32]) -> Result<(), Inconsistent> {
        self.check()?;
        for (index, (&holders, &counted)) in self.holders.iter().zip(counted).enumerate() {
            if holders != counted {
                let id = BlockId::new(index);
                return Err(Inconsistent(format!("{id:?} counts {holders} holders, {counted} hold it")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::MOST_HOLDERS;
    use crate::{BlockPool, Blocks};

    #[test]
    fn a_count_does_not_wrap() {
        let pool = BlockPool::new(2, 4).unwrap();
        let blocks = pool.take(1).unwrap();
        let id = blocks[0];
        pool.ledger().holders[id.index()] = MOST_HOLDERS - 1;
        let many: Vec<Blocks> = (0..3).map(|_| blocks.share(1)).collect();
        let holders = pool.ledger().holders[id.index()];
        drop((blocks, many));
        assert_eq!((holders, pool.available()), (MOST_HOLDERS, 1));
    }
}
