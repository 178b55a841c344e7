//! A sequence's blocks: the unit of ownership.

use std::fmt;
use std::ops::Deref;

use smallvec::SmallVec;

use crate::{BlockId, BlockPool, OutOfBlocks, ReserveError};

/// Short sequences keep their list inside the table, without an allocation.
type Ids = SmallVec<[BlockId; 8]>;

/// An ordered list of blocks that somebody holds. Dropping it gives them back, all under one lock.
///
/// A list, not a single block, is the unit of ownership: a double free, a leak or a use after free cannot be written.
/// Several lists can hold the same block (see [`share`](Self::share)); it is free when the last one lets go.
#[must_use = "dropping the list gives its blocks back"]
pub struct Blocks {
    pool: BlockPool,
    ids: Ids,
}

impl Blocks {
    /// An empty list, which a later [`grow`](Self::grow) fills from `pool`.
    pub fn none(pool: &BlockPool) -> Self {
        Self { pool: pool.clone(), ids: Ids::new() }
    }

    /// The pool that the blocks belong to.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Adds `n` blocks at the end, right behind the last one where that is free.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when fewer than `n` are free; then none was added.
    pub fn grow(&mut self, n: usize) -> Result<(), OutOfBlocks> {
        if n == 0 {
            return Ok(());
        }
        self.make_room(n)?;
        let after = self.ids.last().copied();
        let Self { pool, ids } = self;
        pool.ledger().take(n, after, |id| ids.push(id))
    }

    /// Room in the list for `n` more ids, so that nothing is allocated under the pool's lock. Refuses what the pool could
    /// never give before it asks the allocator for it.
    fn make_room(&mut self, n: usize) -> Result<(), OutOfBlocks> {
        if n > self.pool.blocks() {
            return Err(OutOfBlocks { requested: n, available: self.pool.available() });
        }
        self.ids.reserve(n);
        Ok(())
    }

    /// Makes block `at` safe to write and adds `n` blocks at the end, in one transaction.
    ///
    /// When others hold block `at` too, this list gets a copy of it and they keep the original (copy-on-write).
    /// `at` beyond the end needs no copy.
    ///
    /// # Errors
    ///
    /// [`ReserveError::OutOfBlocks`] when the pool cannot give both the copy and the growth;
    /// [`ReserveError::Storage`] when the copy fails. The list is then what it was before.
    pub fn own_and_grow(&mut self, at: usize, n: usize) -> Result<(), ReserveError> {
        let Some(&original) = self.ids.get(at) else {
            return Ok(self.grow(n)?);
        };
        let last = self.ids.last().copied();
        let before = self.ids.len();
        self.make_room(n.saturating_add(1))?;
        let Self { pool, ids } = self;
        let mut ledger = pool.ledger();
        if !ledger.is_shared(original) {
            return Ok(ledger.take(n, last, |id| ids.push(id))?);
        }
        // The copy stands at the end until it has its content.
        ledger.take(n + 1, None, |id| ids.push(id))?;
        drop(ledger);
        let copy = ids[before];
        // Meanwhile this list still holds the original, so that nobody else can be given it.
        if let Err(error) = pool.storage().copy(original, copy) {
            self.truncate(before);
            return Err(error.into());
        }
        ids[at] = copy;
        ids.remove(before);
        pool.ledger().release(&[original]);
        Ok(())
    }

    /// Keeps the first `len` blocks and gives the others back. Does nothing if there are no more than `len`.
    pub fn truncate(&mut self, len: usize) {
        if len < self.ids.len() {
            self.pool.ledger().release(&self.ids[len..]);
            self.ids.truncate(len);
        }
    }

    /// Another list that holds the first `len` of these blocks too.
    pub fn share(&self, len: usize) -> Blocks {
        let ids = Ids::from_slice(&self.ids[..len.min(self.ids.len())]);
        if !ids.is_empty() {
            self.pool.ledger().share(&ids);
        }
        Blocks { pool: self.pool.clone(), ids }
    }
}

impl Deref for Blocks {
    type Target = [BlockId];

    fn deref(&self) -> &[BlockId] {
        &self.ids
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.truncate(0);
    }
}
