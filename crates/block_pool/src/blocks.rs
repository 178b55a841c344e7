//! A sequence's blocks: the unit of ownership.

use std::fmt;
use std::ops::{Deref, Range};

use smallvec::SmallVec;

use crate::ledger::{Owned, Sought};
use crate::{BlockId, BlockPool, Found, OutOfBlocks, PrefixKey, ReserveError};

/// Short sequences keep their list inside the table, without an allocation.
type Ids = SmallVec<[BlockId; 8]>;

/// An ordered list of blocks that somebody holds. Dropping it gives them back, all under one lock.
///
/// A list, not a single block, is the unit of ownership: a double free or a use after free cannot be written in safe code,
/// and blocks leak only if a list is never dropped (`std::mem::forget`). Several lists can hold the same block (see
/// [`share`](Self::share)); it is free when the last one lets go.
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
        if evicted > 0 {
            let orphaned = ledger.take_orphaned();
            drop(ledger);
            self.clean_up(evicted, orphaned);
        }
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

    /// What an allocation that has evicted blocks has left to do: they still have their old content.
    #[cold]
    fn clean_up(&self, evicted: usize, orphaned: Vec<BlockId>) {
        // Dropped at the end, by a panic of the storage too.
        let orphaned = Blocks { pool: self.pool.clone(), ids: orphaned.into(), epoch: self.epoch };
        self.pool.poison(&self.ids[self.ids.len() - evicted..]);
        drop(orphaned);
        // Last: this calls the host's code, which may panic.
        tracing::trace!(evicted, "remembered blocks gave way");
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
        let mut ledger = pool.ledger();
        let (owned, evicted) = ledger.own(original, n, last, |run| add(ids, run))?;
        if evicted > 0 || ledger.has_orphaned() {
            let orphaned = ledger.take_orphaned();
            drop(ledger);
            self.clean_up(evicted, orphaned);
        } else {
            drop(ledger);
        }
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
        let mut ledger = self.pool.ledger();
        ledger.count_copy();
        if at + 1 < before {
            ledger.pass(&[original]);
        }
        drop(ledger);
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

    /// Gives back the blocks at `range`, as far as there are any; those after it move up. What can be found of them by their
    /// tokens may from now on be evicted before what follows it.
    pub fn remove(&mut self, range: Range<usize>) {
        let end = range.end.min(self.ids.len());
        if range.start < end {
            self.pool.ledger().pass(&self.ids[range.start..end]);
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

    /// Adds the cached blocks that continue these with `tokens`, and says how many of the tokens they hold. `at` is the
    /// number, in its sequence, of the first block that is sought: as many as the list has, unless some were
    /// [removed](Self::remove).
    ///
    /// The block before must have been cached under the same key, or `at` be 0; otherwise nothing is found. With a window,
    /// only the blocks are added that a sequence of the new length holds: those of the sinks, and those that its next token
    /// sees. The last block added may hold only the first few of its tokens in common with `tokens`: it must be made safe to
    /// write, with [`own_and_grow`](Self::own_and_grow), before the sequence goes on in it.
    pub fn reuse(&mut self, key: &PrefixKey, at: usize, tokens: &[u32]) -> usize {
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
        ledger.reuse(Sought { key, at, last, tokens }, |id| ids.push(id))
    }

    /// What [`reuse`](Self::reuse) would find at this moment, and how many blocks it would take to use that and then to have
    /// slots for `slots` tokens from block number `at` on. Nothing is held or counted.
    pub fn find(&self, key: &PrefixKey, at: usize, tokens: &[u32], slots: usize) -> Found {
        let last = self.ids.last().copied();
        self.pool.ledger().find(Sought { key, at, last, tokens }, slots)
    }

    /// By how many the pool's available blocks would become fewer if block `at`, as far as there is one, were made safe to
    /// write and `n` blocks were added: what [`own_and_grow`](Self::own_and_grow) needs at least.
    pub fn cost(&self, at: usize, n: usize) -> usize {
        match self.ids.get(at) {
            Some(&id) => self.pool.ledger().cost(id, n),
            None => n,
        }
    }

    /// Makes the blocks from `at` on findable by their tokens, `head` followed by `tokens`: as many as are full. Says
    /// how many of the list's blocks were exchanged for ones with the same content that were stored before. `None` if block
    /// `at` could be found already: it holds what others have computed, not these tokens, and nothing can follow it here.
    ///
    /// Nothing is stored either of a list that got its first block before the last [`reset`](BlockPool::reset).
    ///
    /// What is stored is read by others from now on: every slot of these blocks must have been written. Nothing is
    /// stored after a block that is not stored itself, or that is stored under another key.
    pub fn store(&mut self, key: &PrefixKey, at: usize, head: &[u32], tokens: &[u32]) -> Option<usize> {
        if head.len() >= self.pool.block_size() || at >= self.ids.len() {
            return Some(0);
        }
        let Self { pool, ids, epoch } = self;
        let duplicates = pool.ledger().store(*epoch, key, ids, at, head, tokens)?;
        if !duplicates.is_empty() {
            pool.release(&duplicates);
        }
        Some(duplicates.len())
    }

    /// Copies the first tokens of block `at`, as many as `tokens` takes, and says whether that block can be found: only then
    /// are its tokens known.
    pub fn tokens(&self, at: usize, tokens: &mut [u32]) -> bool {
        let Some(&id) = self.ids.get(at) else { return false };
        let ledger = self.pool.ledger();
        let known = ledger.tokens(id).and_then(|known| known.get(..tokens.len()));
        if let Some(known) = known {
            tokens.copy_from_slice(known);
        }
        known.is_some()
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
