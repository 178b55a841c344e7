//! A sequence's blocks: the unit of ownership.

use std::fmt;
use std::ops::{Deref, Range};

use smallvec::SmallVec;

use crate::ledger::{Query, Writable};
use crate::{AlreadyCached, BlockId, BlockPool, OutOfBlocks, PrefixKey, PrefixMatch, ReserveError};

/// The ids of a short sequence are stored inline, without an allocation.
type Ids = SmallVec<[BlockId; 8]>;

/// An ordered list of blocks that are in use. Dropping it frees them all, under one lock.
///
/// A list, not a single block, is the unit of ownership: a double free or a use after free cannot be written in safe
/// code, and blocks leak only if a list is never dropped (`std::mem::forget`). Several lists can use the same block
/// (see [`fork`](Self::fork)); it is freed when the last of them is dropped.
#[must_use = "dropping the list frees its blocks"]
pub struct Blocks {
    pool: BlockPool,
    ids: Ids,
    /// The pool's epoch when the list got its first block: see [`BlockPool::reset_prefix_cache`].
    epoch: u64,
}

impl Blocks {
    /// Makes an empty list, to which [`grow`](Self::grow) can add blocks of `pool`.
    #[inline]
    pub fn empty(pool: &BlockPool) -> Self {
        Self { pool: pool.clone(), ids: Ids::new(), epoch: 0 }
    }

    /// Allocates `n` blocks that replace those of a list which got its first block in `epoch`.
    pub(crate) fn successors(pool: &BlockPool, epoch: u64, n: usize) -> Result<Self, OutOfBlocks> {
        let mut blocks = pool.allocate(n)?;
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

    /// Adds `n` blocks at the end, adjacent to the last one where possible.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when fewer than `n` are available; then none is added.
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
        let evicted = ledger.allocate(n, last, |run| add(ids, run))?;
        if evicted > 0 {
            let orphaned = ledger.drain_orphaned();
            drop(ledger);
            self.clean_up(evicted, orphaned);
        }
        Ok(())
    }

    /// Makes room in the list for `n` more ids, so that nothing is allocated on the heap under the pool's lock. More
    /// blocks than the pool has are refused before memory for their ids is requested.
    #[inline]
    fn make_room(&mut self, n: usize) -> Result<(), OutOfBlocks> {
        if n > self.pool.blocks() {
            return Err(OutOfBlocks { requested: n, available: self.pool.available() });
        }
        self.ids.reserve(n);
        Ok(())
    }

    /// Finishes an allocation that has evicted blocks: those still have their old content.
    #[cold]
    fn clean_up(&self, evicted: usize, orphaned: Vec<BlockId>) {
        // Dropped at the end, even if the storage panics: this frees the blocks.
        let orphaned = Blocks { pool: self.pool.clone(), ids: orphaned.into(), epoch: self.epoch };
        self.pool.poison(&self.ids[self.ids.len() - evicted..]);
        drop(orphaned);
        // Last, because this calls the host's code, which may panic.
        tracing::trace!(evicted, "cached blocks were evicted");
    }

    /// Makes block `at` writable and adds `n` blocks at the end, in one transaction.
    ///
    /// If block `at` is cached or other lists use it, too, this list gets a copy of it, and the original stays
    /// unchanged (copy-on-write). There is one exception: if only this list uses the original and there is no room for
    /// the copy, the original is uncached and written in place. If `at` is not in the list, nothing is copied.
    ///
    /// # Errors
    ///
    /// [`ReserveError::OutOfBlocks`] when the pool has no room for both the copy and the growth;
    /// [`ReserveError::Storage`] when the copy fails. In both cases the list is unchanged.
    #[inline]
    pub fn copy_on_write(&mut self, at: usize, n: usize) -> Result<(), ReserveError> {
        let Some(&original) = self.ids.get(at) else {
            return Ok(self.grow(n)?);
        };
        let before = self.ids.len();
        self.make_room(n.saturating_add(1))?;
        let last = self.ids.last().copied();
        let Self { pool, ids, .. } = self;
        let mut ledger = pool.ledger();
        let (writable, evicted) = ledger.make_writable(original, n, last, |run| add(ids, run))?;
        if evicted > 0 || ledger.has_orphaned() {
            let orphaned = ledger.drain_orphaned();
            drop(ledger);
            self.clean_up(evicted, orphaned);
        } else {
            drop(ledger);
        }
        if matches!(writable, Writable::InPlace) {
            return Ok(());
        }
        // Until it has its content, the copy stays at the end of the list. Meanwhile this list still uses the original,
        // so that it cannot be allocated by another.
        if let Err(error) = self.pool.storage().copy(original, self.ids[before]) {
            self.truncate(before);
            return Err(error.into());
        }
        self.ids[at] = self.ids[before];
        self.ids.remove(before);
        let mut ledger = self.pool.ledger();
        ledger.count_copy();
        if at + 1 < before {
            ledger.mark_passed(&[original]);
        }
        drop(ledger);
        self.pool.free(&[original]);
        Ok(())
    }

    /// Keeps the first `len` blocks and frees the others. Does nothing if there are no more than `len`.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        if len < self.ids.len() {
            self.pool.free(&self.ids[len..]);
            self.ids.truncate(len);
        }
    }

    /// Frees the blocks at `range`, as far as the list has them; those after it move up. Of these blocks, the cached
    /// ones may from now on be evicted before the blocks that follow them.
    pub fn remove(&mut self, range: Range<usize>) {
        let end = range.end.min(self.ids.len());
        if range.start < end {
            self.pool.ledger().mark_passed(&self.ids[range.start..end]);
            self.pool.free(&self.ids[range.start..end]);
            self.ids.drain(range.start..end);
        }
    }

    /// Makes another list that uses the first `len` of these blocks too.
    pub fn fork(&self, len: usize) -> Blocks {
        let ids = Ids::from_slice(&self.ids[..len.min(self.ids.len())]);
        if !ids.is_empty() {
            self.pool.ledger().add_refs(&ids);
        }
        Blocks { pool: self.pool.clone(), ids, epoch: self.epoch }
    }

    /// Adds the cached blocks that continue these with `tokens`, and returns how many of the tokens they cover. `at` is
    /// the number, in its sequence, of the first block to match: the length of the list, unless blocks were
    /// [removed](Self::remove).
    ///
    /// Nothing matches unless `at` is 0, or the block before is cached under the same key. With a window, only those
    /// blocks are added that a sequence of the new length uses: the blocks of the sink tokens, and those that its next
    /// token sees. The last block added may match only in its first few tokens: it must be made writable with
    /// [`copy_on_write`](Self::copy_on_write) before the sequence continues in it.
    pub fn match_prefix(&mut self, key: &PrefixKey, at: usize, tokens: &[u32]) -> usize {
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
        ledger.match_prefix(Query { key, at, last, tokens }, |id| ids.push(id))
    }

    /// Looks up what [`match_prefix`](Self::match_prefix) would match at this moment, and how many available blocks it
    /// would take to use that match and then to have slots for `slots` tokens from block number `at` on. No block is
    /// used, and the statistics do not change.
    pub fn lookup_prefix(&self, key: &PrefixKey, at: usize, tokens: &[u32], slots: usize) -> PrefixMatch {
        let last = self.ids.last().copied();
        self.pool.ledger().lookup_prefix(Query { key, at, last, tokens }, slots)
    }

    /// How many available blocks [`copy_on_write`](Self::copy_on_write) with the same arguments needs.
    pub fn copy_on_write_cost(&self, at: usize, n: usize) -> usize {
        match self.ids.get(at) {
            Some(&id) => self.pool.ledger().copy_on_write_cost(id, n),
            None => n,
        }
    }

    /// Caches the full blocks from `at` on under their tokens, which are `head` followed by `tokens`. Returns how many
    /// blocks of the list were exchanged for blocks with the same content that were cached before.
    ///
    /// Nothing is cached from a list that got its first block before the last
    /// [`reset_prefix_cache`](BlockPool::reset_prefix_cache).
    ///
    /// Other sequences read what is cached from now on: every slot of these blocks must have been written. Nothing is
    /// cached after a block that is not cached, or that is cached under another key.
    ///
    /// # Errors
    ///
    /// [`AlreadyCached`] if block `at` is cached: it has the content of another computation, not of these tokens, and
    /// nothing can be cached after it here.
    pub fn cache(&mut self, key: &PrefixKey, at: usize, head: &[u32], tokens: &[u32]) -> Result<usize, AlreadyCached> {
        if head.len() >= self.pool.block_size() || at >= self.ids.len() {
            return Ok(0);
        }
        let Self { pool, ids, epoch } = self;
        let duplicates = pool.ledger().cache(*epoch, key, ids, at, head, tokens)?;
        if !duplicates.is_empty() {
            pool.free(&duplicates);
        }
        Ok(duplicates.len())
    }

    /// Copies the first `tokens.len()` tokens of block `at` into `tokens`. Returns whether the block is cached: only
    /// then are its tokens known.
    pub fn cached_tokens(&self, at: usize, tokens: &mut [u32]) -> bool {
        let Some(&id) = self.ids.get(at) else { return false };
        let ledger = self.pool.ledger();
        let known = ledger.tokens(id).and_then(|known| known.get(..tokens.len()));
        if let Some(known) = known {
            tokens.copy_from_slice(known);
        }
        known.is_some()
    }
}

/// Adds a run of adjacent blocks.
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
