//! A sequence's blocks: the unit of ownership.

use std::fmt;
use std::ops::{Deref, Range};

use smallvec::SmallVec;

use crate::ledger::Owned;
use crate::{BlockId, BlockPool, OutOfBlocks, ReserveError, Salt};

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
    /// When the list got its first block: see [`BlockPool::reset`].
    epoch: u64,
}

impl Blocks {
    /// An empty list, which a later [`grow`](Self::grow) fills from `pool`.
    #[inline]
    pub fn none(pool: &BlockPool) -> Self {
        Self { pool: pool.clone(), ids: Ids::new(), epoch: 0 }
    }

    /// `n` blocks that continue the life of others, which got their first one in `epoch`.
    pub(crate) fn successors(pool: &BlockPool, epoch: u64, n: usize) -> Result<Self, OutOfBlocks> {
        let mut blocks = pool.take(n)?;
        blocks.epoch = epoch;
        Ok(blocks)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The pool that the blocks belong to.
    #[inline]
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Adds `n` blocks at the end, right behind the last one where that is free.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when fewer than `n` are available; then none was added.
    #[inline]
    pub fn grow(&mut self, n: usize) -> Result<(), OutOfBlocks> {
        if n == 0 {
            return Ok(());
        }
        self.make_room(n)?;
        let last = self.ids.last().copied();
        let Self { pool, ids, epoch } = self;
        let mut ledger = pool.ledger();
        if ids.is_empty() {
            *epoch = ledger.epoch();
        }
        let evicted = ledger.take(n, last, |run| add(ids, run))?;
        drop(ledger);
        self.poison_last(evicted);
        Ok(())
    }

    /// Room in the list for `n` more ids, so that nothing is allocated under the pool's lock. Refuses what the pool could
    /// never give before it asks the allocator for it.
    #[inline]
    fn make_room(&mut self, n: usize) -> Result<(), OutOfBlocks> {
        if n > self.pool.blocks() {
            return Err(OutOfBlocks { requested: n, available: self.pool.available() });
        }
        self.ids.reserve(n);
        Ok(())
    }

    /// Blocks that were remembered a moment ago still have their old content.
    #[inline]
    fn poison_last(&self, evicted: usize) {
        if evicted > 0 {
            tracing::trace!(evicted, "remembered blocks gave way");
            self.pool.poison(&self.ids[self.ids.len() - evicted..]);
        }
    }

    /// Makes block `at` safe to write and adds `n` blocks at the end, in one transaction.
    ///
    /// When others hold block `at` too, or could find it by its tokens, this list gets a copy of it and they keep the
    /// original (copy-on-write). Only when there is no room for the copy and nobody else holds the original, it is
    /// forgotten and written in place. `at` beyond the end needs no copy.
    ///
    /// # Errors
    ///
    /// [`ReserveError::OutOfBlocks`] when the pool cannot give both the copy and the growth;
    /// [`ReserveError::Storage`] when the copy fails. The list is then what it was before.
    #[inline]
    pub fn own_and_grow(&mut self, at: usize, n: usize) -> Result<(), ReserveError> {
        let Some(&original) = self.ids.get(at) else {
            return Ok(self.grow(n)?);
        };
        let before = self.ids.len();
        self.make_room(n.saturating_add(1))?;
        let last = self.ids.last().copied();
        let Self { pool, ids, .. } = self;
        let (owned, evicted) = pool.ledger().own(original, n, last, |run| add(ids, run))?;
        self.poison_last(evicted);
        if matches!(owned, Owned::InPlace) {
            return Ok(());
        }
        // The copy stands behind the others until it has its content. Meanwhile this list still holds the original, so
        // that nobody else can be given it.
        if let Err(error) = self.pool.storage().copy(original, self.ids[before]) {
            self.truncate(before);
            return Err(error.into());
        }
        self.ids[at] = self.ids[before];
        self.ids.remove(before);
        self.pool.ledger().count_copy();
        self.pool.release(&[original]);
        Ok(())
    }

    /// Keeps the first `len` blocks and gives the others back. Does nothing if there are no more than `len`.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        if len < self.ids.len() {
            self.pool.release(&self.ids[len..]);
            self.ids.truncate(len);
        }
    }

    /// Gives back the blocks at `range`, as far as there are any; those behind it move up.
    pub fn remove(&mut self, range: Range<usize>) {
        let end = range.end.min(self.ids.len());
        if range.start < end {
            self.pool.release(&self.ids[range.start..end]);
            self.ids.drain(range.start..end);
        }
    }

    /// Another list that holds the first `len` of these blocks too.
    pub fn share(&self, len: usize) -> Blocks {
        let ids = Ids::from_slice(&self.ids[..len.min(self.ids.len())]);
        if !ids.is_empty() {
            self.pool.ledger().share(&ids);
        }
        Blocks { pool: self.pool.clone(), ids, epoch: self.epoch }
    }

    /// Adds the stored blocks that continue these with `tokens`, and says how many of the tokens they hold.
    ///
    /// The blocks in the list must have been stored under the same salt, or the list be empty; otherwise nothing is
    /// found. The last block added may hold only the first few of its tokens in common with `tokens`: it must be made
    /// safe to write, with [`own_and_grow`](Self::own_and_grow), before the sequence goes on in it.
    pub fn reuse(&mut self, salt: &Salt, tokens: &[u32]) -> usize {
        if tokens.is_empty() {
            return 0;
        }
        self.ids.reserve(self.pool.blocks_for(tokens.len()).min(self.pool.blocks()));
        let last = self.ids.last().copied();
        let Self { pool, ids, epoch } = self;
        let mut ledger = pool.ledger();
        if ids.is_empty() {
            *epoch = ledger.epoch();
        }
        ledger.reuse(salt, last, tokens, |id| ids.push(id))
    }

    /// Makes the blocks from `at` on findable by their tokens, `head` followed by `tokens`: as many as are full. Says
    /// how many of the list's blocks were exchanged for ones with the same content that were stored before.
    ///
    /// Nothing is stored either of a list that got its first block before the last [`reset`](BlockPool::reset).
    ///
    /// What is stored is read by others from now on: every slot of these blocks must have been written. Nothing is
    /// stored behind a block that is not stored itself.
    pub fn store(&mut self, salt: &Salt, at: usize, head: &[u32], tokens: &[u32]) -> usize {
        if head.len() >= self.pool.block_size() || at >= self.ids.len() {
            return 0;
        }
        let Self { pool, ids, epoch } = self;
        let duplicates = pool.ledger().store(*epoch, salt, ids, at, head, tokens);
        if !duplicates.is_empty() {
            pool.release(&duplicates);
        }
        duplicates.len()
    }

    /// Appends the first `n` tokens of block `at` to `tokens`, and says whether that block is stored: only then are its
    /// tokens known.
    pub fn tokens(&self, at: usize, n: usize, tokens: &mut impl Extend<u32>) -> bool {
        let ledger = self.pool.ledger();
        let stored = self.ids.get(at).and_then(|&id| ledger.tokens(id));
        match stored {
            Some(stored) => tokens.extend(stored.iter().copied().take(n)),
            None => return false,
        }
        true
    }
}

/// Adds a run of neighbours.
#[inline]
fn add(ids: &mut Ids, run: Range<usize>) {
    if run.len() == 1 {
        ids.push(BlockId::new(run.start));
    } else {
        ids.extend(run.map(BlockId::new));
    }
}

impl Deref for Blocks {
    type Target = [BlockId];

    #[inline]
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
    #[inline]
    fn drop(&mut self) {
        self.truncate(0);
    }
}
