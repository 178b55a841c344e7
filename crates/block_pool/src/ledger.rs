//! Who holds what: the free blocks and the number of holders of each, under one lock.
//!
//! They live together so that "nobody holds it" and "it is free" are one instant: no thread ever sees a block that is
//! neither.

use crate::free::FreeBlocks;
use crate::{BlockId, Inconsistent, OutOfBlocks};

#[derive(Debug)]
pub(crate) struct Ledger {
    free: FreeBlocks,
    /// How many owners each block has; 0 means free.
    holders: Vec<u32>,
}

impl Ledger {
    pub(crate) fn new(blocks: usize) -> Self {
        Self { free: FreeBlocks::all(blocks), holders: vec![0; blocks] }
    }

    pub(crate) fn available(&self) -> usize {
        self.free.len()
    }

    /// Takes `n` blocks, side by side where possible and right behind `after`; all or none.
    pub(crate) fn take(
        &mut self,
        n: usize,
        after: Option<BlockId>,
        mut taken: impl FnMut(BlockId),
    ) -> Result<(), OutOfBlocks> {
        if n > self.free.len() {
            return Err(OutOfBlocks { requested: n, available: self.free.len() });
        }
        let holders = &mut self.holders;
        self.free.take(n, after, |id| {
            holders[id.index()] = 1;
            taken(id);
        });
        Ok(())
    }

    pub(crate) fn share(&mut self, ids: &[BlockId]) {
        for id in ids {
            self.holders[id.index()] += 1;
        }
    }

    pub(crate) fn release(&mut self, ids: &[BlockId]) {
        for &id in ids {
            let holders = &mut self.holders[id.index()];
            *holders -= 1;
            if *holders == 0 {
                self.free.insert(id);
            }
        }
    }

    pub(crate) fn is_shared(&self, id: BlockId) -> bool {
        self.holders[id.index()] > 1
    }

    pub(crate) fn check(&self) -> Result<(), Inconsistent> {
        if !self.free.is_consistent() {
            return Err(Inconsistent("the summaries of the free blocks are wrong".into()));
        }
        for (index, &holders) in self.holders.iter().enumerate() {
            let id = BlockId::new(index);
            if self.free.contains(id) != (holders == 0) {
                return Err(Inconsistent(format!("{id:?} has {holders} holders and is marked free")));
            }
        }
        Ok(())
    }

    pub(crate) fn check_held<'a>(&self, lists: impl Iterator<Item = &'a [BlockId]>) -> Result<(), Inconsistent> {
        self.check()?;
        let mut counted = vec![0u32; self.holders.len()];
        for id in lists.flatten() {
            match counted.get_mut(id.index()) {
                Some(count) => *count += 1,
                None => return Err(Inconsistent(format!("{id:?} is not of this pool"))),
            }
        }
        for (index, (&holders, &counted)) in self.holders.iter().zip(&counted).enumerate() {
            if holders != counted {
                let id = BlockId::new(index);
                return Err(Inconsistent(format!("{id:?} counts {holders} holders, {counted} hold it")));
            }
        }
        Ok(())
    }
}
