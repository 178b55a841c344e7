//! The block table of one sequence.

use std::ops::Range;

use block_pool::{
    BlockId, BlockPool, Blocks, OutOfWindow, PrefixKey, PrefixMatch, ReserveError, Salt, SaltFrom, Span, Window,
};
use smallvec::SmallVec;

use crate::{NotReserved, SaltTooLate};

/// The tokens of a block that is not full yet. Up to 16 of them are stored inline, without an allocation.
pub(crate) type Tokens = SmallVec<[u32; 16]>;

/// Maps the logical positions of one sequence to slots of the pool.
///
/// A table has a *length*, the number of committed tokens, and a *capacity*, the number of positions that have slots.
/// Tokens are added in two steps: [`reserve`](Self::reserve) allocates slots for them, and after the slots were written
/// [`commit_tokens`](Self::commit_tokens) makes them part of the sequence. [`roll_back`](Self::roll_back) frees what
/// was reserved and not committed.
///
/// Full blocks whose tokens are known are cached: [`match_prefix`](Self::match_prefix) finds them for other sequences
/// that start with the same tokens. They stay cached after this table is dropped, until their memory is needed.
///
/// Dropping a table frees its blocks.
///
/// ```
/// use block_pool::BlockPool;
/// use block_table::BlockTable;
///
/// let pool = BlockPool::new(8, 4)?;
/// let mut table = BlockTable::new(&pool);
/// table.reserve(6)?;
/// table.commit_tokens(&[1, 2, 3, 4, 5, 6])?;
/// assert_eq!((table.len(), table.capacity()), (6, 8));
/// assert_eq!(table.slot(5), Some(table.blocks()[1].index() * 4 + 1));
///
/// let fork = table.fork(); // shares both blocks
/// table.append(1)?; // the last one is copied before the first write
/// assert_eq!(table.blocks()[0], fork.blocks()[0]);
/// assert_ne!(table.blocks()[1], fork.blocks()[1]);
///
/// table.truncate(3)?;
/// assert_eq!(table.blocks().len(), 1);
///
/// let mut other = BlockTable::new(&pool);
/// assert_eq!(other.match_prefix(&[1, 2, 3, 4, 9, 9]), 4); // computed before
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping the table frees its blocks"]
pub struct BlockTable {
    pub(crate) blocks: Blocks,
    pub(crate) len: usize,
    /// The key under which prefixes of this sequence are cached. It contains the window.
    pub(crate) key: PrefixKey,
    /// Whether no prefix of this sequence is cached or matched.
    pub(crate) private: bool,
    /// The committed tokens after the last full block; `None` when some of them are not known.
    pub(crate) tail: Option<Tokens>,
}

/// Options of a [`BlockTable`].
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct TableOptions {
    /// What must match in addition to the tokens for a prefix to be shared.
    pub salt: Salt,
    /// The sliding window; without one every token sees all tokens before it.
    pub window: Option<Window>,
    /// Whether no prefix of the sequence is cached or matched.
    pub private: bool,
}

impl TableOptions {
    /// Shares prefixes only with sequences that have the same salt.
    #[must_use]
    pub fn salt(self, salt: Salt) -> Self {
        Self { salt, ..self }
    }

    /// Caches and matches no prefix of the sequence: for inputs that token ids do not tell apart, such as embeddings,
    /// and for content that must not leak to other clients through their response times.
    #[must_use]
    pub fn private(self) -> Self {
        Self { private: true, ..self }
    }

    /// Sets a sliding window. Blocks that the window has passed are freed.
    #[must_use]
    pub fn window(self, window: Window) -> Self {
        Self { window: Some(window), ..self }
    }
}

impl BlockTable {
    /// An empty table over `pool`.
    pub fn new(pool: &BlockPool) -> Self {
        Self::with_options(pool, &TableOptions::default())
    }

    /// An empty table over `pool` with these options.
    pub fn with_options(pool: &BlockPool, options: &TableOptions) -> Self {
        let TableOptions { ref salt, window, private } = *options;
        let mut key = PrefixKey::new().salt(salt.clone());
        key.window = window;
        Self { blocks: Blocks::empty(pool).with_window(window), len: 0, key, private, tail: Some(Tokens::new()) }
    }

    /// The pool that the blocks come from.
    #[inline]
    pub fn pool(&self) -> &BlockPool {
        self.blocks.pool()
    }

    /// How many tokens are committed, including those whose blocks were freed.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of positions up to the end of the last block: the first position that has no slot yet.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.blocks.end() * self.pool().block_size()
    }

    /// The sliding window of the sequence.
    pub fn window(&self) -> Option<Window> {
        self.key.window
    }

    /// The blocks of the table, in the order of their positions, without the freed ones: those of the first group, if
    /// the pool has several.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// The blocks of the table in a group of layers, in the order of their positions, without the freed ones; empty if
    /// the pool has no such group.
    pub fn blocks_of_group(&self, group: usize) -> &[BlockId] {
        self.blocks.group(group)
    }

    /// Which tokens a token of the sequence sees in a group of layers; all of them, if the pool has no such group.
    pub fn span_of_group(&self, group: usize) -> Span {
        if group < self.pool().groups().len() { self.blocks.span(group) } else { Span::all() }
    }

    /// The range of logical blocks that were freed, by the window or by [`free_before`](Self::free_before). The logical
    /// blocks before the range come first in [`blocks`](Self::blocks), those after it follow. If none was freed, the
    /// range is empty and at the end of the table. If the pool has several groups, this is the range of the first one.
    pub fn freed_blocks(&self) -> Range<usize> {
        self.blocks.freed(0)
    }

    /// The range of logical blocks that were freed in a group of layers.
    pub fn freed_blocks_of_group(&self, group: usize) -> Range<usize> {
        self.blocks.freed(group)
    }

    /// The slot of the token at `position`, `block * block_size + offset`; `None` if `position` is not below the
    /// capacity or its block was freed. If the pool has several groups, this is the slot in the first one.
    pub fn slot(&self, position: usize) -> Option<usize> {
        self.slot_of_group(0, position)
    }

    /// The slot of the token at `position` in a group of layers.
    pub fn slot_of_group(&self, group: usize, position: usize) -> Option<usize> {
        let block_size = self.pool().block_size();
        let block = self.blocks.block(group, position / block_size)?;
        Some(block.index() * block_size + position % block_size)
    }

    /// The salts of the sequence that hold from a position on, in the order of their positions.
    pub fn salts(&self) -> &[SaltFrom] {
        self.blocks.salts()
    }

    /// From `position` on the sequence depends on `salt`, for example the hash of an image, in addition to its tokens:
    /// the block that contains the position, and all blocks after it, are found only by sequences that have the same
    /// salts from the same positions on. Blocks before it are not affected. So the text before an image is shared by all
    /// sequences, and what follows the image by those with the same image. Salts are compared byte for byte.
    ///
    /// A sequence can have several such salts, also from the same position on, where their order counts. Add all salts
    /// of a prompt before it is [matched](Self::match_prefix) or [looked up](Self::lookup_prefix). In the block in which
    /// a salt begins, the tokens before the salt match only sequences that have the same salt there, too.
    /// [`Salt::none`] changes nothing.
    ///
    /// A salt stays until it is [removed](Self::remove_salts_from): a sequence that is truncated and computed again, and a
    /// fork, have the same salts. So they are never forgotten; the same salt from the same position on is added once.
    /// [`swap_out`](Self::swap_out) takes all salts along.
    ///
    /// (vLLM: the extra keys of a block, with the hashes of its images.)
    ///
    /// ```
    /// use block_pool::{BlockPool, Salt};
    /// use block_table::BlockTable;
    ///
    /// let pool = BlockPool::new(16, 4)?;
    /// let prompt = [1, 2, 3, 4, 7, 7, 7, 7, 5, 6]; // four tokens of text, four of an image, a question
    /// let mut table = BlockTable::new(&pool);
    /// table.salt_from(4, Salt::new(b"hash of a cat"))?;
    /// table.reserve(10)?;
    /// table.commit_tokens(&prompt)?;
    ///
    /// let found = |image: &[u8]| -> Result<usize, Box<dyn std::error::Error>> {
    ///     let mut other = BlockTable::new(&pool);
    ///     other.salt_from(4, Salt::new(image))?;
    ///     Ok(other.match_prefix(&prompt))
    /// };
    /// assert_eq!((found(b"hash of a cat")?, found(b"hash of a dog")?), (8, 4));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`SaltTooLate`] when the token at `position` is committed or matched already; then nothing changes. It may be
    /// reserved.
    pub fn salt_from(&mut self, position: usize, salt: Salt) -> Result<(), SaltTooLate> {
        if position < self.len {
            return Err(SaltTooLate { position, len: self.len });
        }
        self.blocks.salt_from(position, salt);
        Ok(())
    }

    /// Removes the salts that begin at `position` or later: for a sequence that goes on with another image, or with text
    /// in its place.
    ///
    /// # Errors
    ///
    /// [`SaltTooLate`] when the token at `position` is committed or matched already; then nothing changes.
    pub fn remove_salts_from(&mut self, position: usize) -> Result<(), SaltTooLate> {
        if position < self.len {
            return Err(SaltTooLate { position, len: self.len });
        }
        self.blocks.remove_salts_from(position);
        Ok(())
    }

    /// Adds the cached blocks of the longest prefix of `tokens` to the table and returns how many tokens the sequence
    /// has gained. These need not be computed. `tokens` are all tokens of the sequence, from its first one on.
    ///
    /// The last of `tokens` is never matched, since its logits are needed. A match may end inside a block; the next
    /// [`reserve`](Self::reserve) then copies that block. The sequence may have tokens already, but only in full
    /// blocks: if its last block is not full, or more is reserved, nothing is matched and 0 is returned.
    pub fn match_prefix(&mut self, tokens: &[u32]) -> usize {
        let Some((at, wanted)) = self.matchable(tokens) else { return 0 };
        let block_size = self.pool().block_size();
        let matched = self.blocks.match_prefix(&self.key, at, wanted);
        self.len += matched;
        self.tail = Some(Tokens::from_slice(&tokens[self.len - self.len % block_size..self.len]));
        matched
    }

    /// What [`match_prefix`](Self::match_prefix) of these tokens would match at this moment, and how many blocks it
    /// takes to use the match and then to [reserve](Self::reserve) slots for the rest of the tokens. Both calls succeed
    /// if that many blocks are available. The look-up uses no block and does not change the statistics.
    ///
    /// Blocks that a window frees as it moves on are not subtracted: see
    /// [`lookup_prefix_in_chunks`](Self::lookup_prefix_in_chunks).
    pub fn lookup_prefix(&self, tokens: &[u32]) -> PrefixMatch {
        self.lookup(tokens, None)
    }

    /// The same, for a sequence that is computed in chunks of at most `chunk` tokens: a window frees blocks in between,
    /// so a long prompt takes no more of them than its window and a chunk.
    pub fn lookup_prefix_in_chunks(&self, tokens: &[u32], chunk: usize) -> PrefixMatch {
        self.lookup(tokens, Some(chunk))
    }

    fn lookup(&self, tokens: &[u32], chunk: Option<usize>) -> PrefixMatch {
        let rest = tokens.len().saturating_sub(self.len);
        if let Some((at, wanted)) = self.matchable(tokens) {
            return self.blocks.lookup_prefix(&self.key, at, wanted, rest, chunk);
        }
        let mut found = PrefixMatch::default();
        if let Some(chunk) = chunk.filter(|_| rest > 0) {
            found.blocks = self.blocks.growth_in_chunks(&self.key, self.len..self.len.saturating_add(rest), chunk);
            return found;
        }
        let at = if rest > 0 { self.len / self.pool().block_size() } else { usize::MAX };
        found.blocks = self.blocks.copy_on_write_cost(at, self.growth(rest));
        found
    }

    /// The logical index of the block after the last one, and those of `tokens` from there on that may be matched;
    /// `None` if the sequence cannot continue with cached blocks.
    fn matchable<'t>(&self, tokens: &'t [u32]) -> Option<(usize, &'t [u32])> {
        let block_size = self.pool().block_size();
        let known = tokens.len().saturating_sub(1);
        let whole = self.len.is_multiple_of(block_size) && self.capacity() == self.len;
        (!self.private && whole && self.len < known).then(|| (self.len / block_size, &tokens[self.len..known]))
    }

    /// Allocates slots for `n` tokens after the committed ones, as far as there are none yet.
    ///
    /// If the block of the first of them is used by another table too, or is cached, it is replaced by a copy
    /// (copy-on-write), in the same transaction as the growth. If there is no room for the copy and no other table uses
    /// the block, it is uncached and written in place instead.
    ///
    /// # Errors
    ///
    /// [`ReserveError::OutOfBlocks`] when too few blocks are available, [`ReserveError::Storage`] when the copy fails.
    /// The table is then unchanged.
    pub fn reserve(&mut self, n: usize) -> Result<(), ReserveError> {
        if n == 0 {
            return Ok(());
        }
        // The common case of a decode step: the token falls into the last block. It needs no division.
        let capacity = self.capacity();
        if self.len.saturating_add(n) <= capacity && capacity - self.len <= self.pool().block_size() {
            return self.blocks.copy_on_write(self.blocks.end() - 1, 0);
        }
        self.blocks.copy_on_write(self.len / self.pool().block_size(), self.growth(n))
    }

    /// How many blocks are missing to have slots for `n` tokens after the committed ones.
    fn growth(&self, n: usize) -> usize {
        let needed = self.pool().blocks_for(self.len.saturating_add(n));
        needed.saturating_sub(self.blocks.end())
    }

    /// Makes the next `n` reserved slots part of the sequence without giving their token ids. Their blocks are not
    /// cached. Slots that were reserved after them stay reserved.
    ///
    /// # Errors
    ///
    /// [`NotReserved`] when fewer than `n` slots are reserved; the table is then unchanged.
    pub fn commit(&mut self, n: usize) -> Result<(), NotReserved> {
        self.check_reserved(n)?;
        self.count_unknown(n);
        Ok(())
    }

    /// Makes the next reserved slots part of the sequence, as these tokens. Blocks that become full are cached, and
    /// other sequences can match them at once, so every slot must have been written before it is committed. Slots that
    /// were reserved after them stay reserved.
    ///
    /// # Errors
    ///
    /// [`NotReserved`] when fewer slots than `tokens` are reserved; the table is then unchanged.
    pub fn commit_tokens(&mut self, tokens: &[u32]) -> Result<(), NotReserved> {
        self.check_reserved(tokens.len())?;
        let block_size = self.pool().block_size();
        // The common case of a decode step: no block becomes full. It needs no division.
        if let Some(tail) = &mut self.tail
            && tail.len() + tokens.len() < block_size
        {
            tail.extend_from_slice(tokens);
            self.len += tokens.len();
            self.blocks.free_invisible(self.len);
            return Ok(());
        }
        let first = self.len / block_size;
        self.len += tokens.len();
        if self.len / block_size == first {
            self.blocks.free_invisible(self.len);
            return Ok(());
        }
        // If freeing a duplicate panics, the next block must not be cached under old tokens.
        let tail = UnlessDone(&mut self.tail);
        if let (Some(tail), false) = (&*tail.0, self.private) {
            // An error: this block is still cached for other tokens, because `reserve` did not copy it. What follows it
            // must not be cached either.
            self.private |= self.blocks.cache(&self.key, first, tail, tokens).is_err();
        }
        std::mem::forget(tail);
        let unfinished = self.len % block_size;
        let tail = self.tail.get_or_insert_default();
        tail.clear();
        tail.reserve(block_size);
        tail.extend_from_slice(&tokens[tokens.len() - unfinished..]);
        self.blocks.free_invisible(self.len);
        Ok(())
    }

    /// Frees the reserved blocks that have no committed token.
    pub fn roll_back(&mut self) {
        self.blocks.truncate(self.pool().blocks_for(self.len));
    }

    /// Reserves and commits `n` tokens at once, without their token ids: for callers that write the slots later or
    /// never.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve).
    pub fn append(&mut self, n: usize) -> Result<(), ReserveError> {
        self.reserve(n)?;
        self.count_unknown(n);
        Ok(())
    }

    /// Keeps the first `len` tokens and frees every block after them, reserved ones included. If there are no more than
    /// `len` tokens, only the reserved blocks are freed.
    ///
    /// With a window, the table still has the blocks of everything that the *next* token sees, the one at position
    /// `len`. What the last of the `len` tokens sees begins one position earlier, and that position may have been
    /// freed. To attend with that token again, truncate to `len - 1` and compute it again, or make the window one token
    /// larger than the model's.
    ///
    /// # Errors
    ///
    /// [`OutOfWindow`] when the window has already freed a position that the next token would see, or when `len` lies
    /// among the tokens that [`free_before`](Self::free_before) has freed. The table is then unchanged.
    pub fn truncate(&mut self, len: usize) -> Result<(), OutOfWindow> {
        if len >= self.len {
            self.roll_back();
            return Ok(());
        }
        self.blocks.check_go_back(len)?;
        // First, so that the table agrees with its blocks even if freeing them panics.
        (self.tail, self.len) = (self.tail_at(len), len);
        self.blocks.go_back(len)
    }

    /// A second sequence with the same tokens, in the same blocks. A table that writes to a shared block gets a copy
    /// first (copy-on-write). Reserved blocks are not part of the fork; all salts are.
    pub fn fork(&self) -> BlockTable {
        self.fork_with(self.len, self.blocks.fork(self.pool().blocks_for(self.len)))
    }

    /// Like [`fork`](Self::fork), but with the first `len` tokens only.
    ///
    /// # Errors
    ///
    /// As [`truncate`](Self::truncate).
    pub fn fork_at(&self, len: usize) -> Result<BlockTable, OutOfWindow> {
        if len >= self.len {
            return Ok(self.fork());
        }
        Ok(self.fork_with(len, self.blocks.fork_at(len)?))
    }

    fn fork_with(&self, len: usize, blocks: Blocks) -> BlockTable {
        BlockTable { blocks, len, key: self.key.clone(), private: self.private, tail: self.tail_at(len) }
    }

    #[inline]
    fn check_reserved(&self, n: usize) -> Result<(), NotReserved> {
        let reserved = self.capacity() - self.len;
        if n > reserved { Err(NotReserved { committed: n, reserved }) } else { Ok(()) }
    }

    fn count_unknown(&mut self, n: usize) {
        if n > 0 {
            self.len += n;
            self.tail = self.len.is_multiple_of(self.pool().block_size()).then(Tokens::new);
            self.blocks.free_invisible(self.len);
        }
    }

    /// Those of the first `len` tokens that follow the last full block; `None` if they are not known.
    fn tail_at(&self, len: usize) -> Option<Tokens> {
        let block_size = self.pool().block_size();
        let (block, n) = (len / block_size, len % block_size);
        if n == 0 {
            return Some(Tokens::new());
        }
        if block == self.len / block_size {
            return self.tail.as_ref().map(|tail| Tokens::from_slice(&tail[..n]));
        }
        let mut tokens = Tokens::from_elem(0, n);
        self.blocks.cached_tokens(block, &mut tokens).then_some(tokens)
    }
}

/// Makes the tokens of the unfinished block unknown when it is dropped. Whoever finishes forgets it.
struct UnlessDone<'t>(&'t mut Option<Tokens>);

impl Drop for UnlessDone<'_> {
    fn drop(&mut self) {
        *self.0 = None;
    }
}
