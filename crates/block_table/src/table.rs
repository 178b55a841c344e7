//! One sequence's logical positions, and the blocks they lie in.

use block_pool::{BlockId, BlockPool, Blocks, Found, PrefixKey, ReserveError, Salt, Window};
use smallvec::SmallVec;

use crate::{BehindWindow, NotReserved};

/// The tokens of a block that is not full yet. Blocks of up to 16 tokens keep them inside the table.
pub(crate) type Tokens = SmallVec<[u32; 16]>;

/// Maps the logical positions of one sequence to slots of the pool.
///
/// A table has a *length*, the tokens that are part of the sequence, and a *capacity*, the positions it has slots for.
/// Tokens come in two moves: [`reserve`](Self::reserve) makes room, and [`commit_tokens`](Self::commit_tokens) makes
/// what was written part of the sequence. What was reserved and not committed can be given back with
/// [`roll_back`](Self::roll_back).
///
/// Full blocks whose tokens are known can be found by other sequences that start with the same tokens, see
/// [`reuse`](Self::reuse), also when this one is gone, until their memory is needed.
///
/// Dropping a table gives its blocks back.
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
/// assert_eq!(other.reuse(&[1, 2, 3, 4, 9, 9]), 4); // computed before
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping the table gives its blocks back"]
pub struct BlockTable {
    /// The sinks' blocks, then those of the window.
    pub(crate) blocks: Blocks,
    pub(crate) len: usize,
    /// How many blocks behind those of the sinks have been given back.
    pub(crate) gap: usize,
    /// What prefixes of this sequence are cached under. It has the window.
    pub(crate) key: PrefixKey,
    /// Whether prefixes are neither cached nor sought.
    pub(crate) private: bool,
    /// The tokens in the last, unfinished block, when all of them are known.
    pub(crate) tail: Option<Tokens>,
}

/// What a sequence differs in from others over the same pool.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct TableOptions {
    /// What must match, beside the tokens, for a prefix to be shared.
    pub salt: Salt,
    /// How far back the sequence looks; the whole way if there is no window.
    pub window: Option<Window>,
    /// Whether its prefixes are neither stored nor sought.
    pub private: bool,
}

impl TableOptions {
    /// Prefixes are shared with sequences of the same salt only.
    #[must_use]
    pub fn salt(self, salt: Salt) -> Self {
        Self { salt, ..self }
    }

    /// Its prefixes are neither stored nor sought: for inputs that tokens do not tell apart, embeddings say, and for what
    /// nobody shall learn of by how fast he is answered.
    #[must_use]
    pub fn private(self) -> Self {
        Self { private: true, ..self }
    }

    /// The sequence looks back only so far, and gives back what lies behind.
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

    /// An empty table over `pool` with a salt or a window.
    pub fn with_options(pool: &BlockPool, options: &TableOptions) -> Self {
        let TableOptions { ref salt, window, private } = *options;
        let mut key = PrefixKey::new().salt(salt.clone());
        key.window = window;
        Self { blocks: Blocks::none(pool), len: 0, gap: 0, key, private, tail: Some(Tokens::new()) }
    }

    /// The pool the blocks come from.
    #[inline]
    pub fn pool(&self) -> &BlockPool {
        self.blocks.pool()
    }

    /// How many tokens the sequence has, those that its window has left behind included.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has no tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first position for which there is no slot yet.
    #[inline]
    pub fn capacity(&self) -> usize {
        (self.blocks.len() + self.gap) * self.pool().block_size()
    }

    /// How far back the sequence looks.
    pub fn window(&self) -> Option<Window> {
        self.key.window
    }

    /// The blocks that the table holds, in the order of the positions they hold.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many of [`blocks`](Self::blocks), from the first on, come before the gap that the window has left, and how
    /// many blocks are missing there.
    pub fn gap(&self) -> (usize, usize) {
        let before = if self.gap > 0 { self.sink_blocks() } else { self.blocks.len() };
        (before, self.gap)
    }

    /// The slot of the token at `position`, `block * block_size + offset`; `None` where the table has no slot, beyond its
    /// capacity or behind its window.
    pub fn slot(&self, position: usize) -> Option<usize> {
        let block_size = self.pool().block_size();
        let block = self.blocks.get(self.place(position / block_size)?)?;
        Some(block.index() * block_size + position % block_size)
    }

    /// Starts with, or continues with, blocks that other sequences have computed for the same tokens: those of the
    /// longest prefix of `tokens` that can be found. `tokens` are the sequence's, from its first one on. Returns how many
    /// tokens the sequence has gained; they need not be computed.
    ///
    /// At least the last of `tokens` is always left to compute, since its logits are needed. A match may end inside a
    /// block: the block is then copied before the sequence goes on in it. Nothing is gained when the sequence stands
    /// inside a block.
    pub fn reuse(&mut self, tokens: &[u32]) -> usize {
        let Some((at, sought)) = self.sought(tokens) else { return 0 };
        let block_size = self.pool().block_size();
        let found = self.blocks.reuse(&self.key, at, sought);
        self.len += found;
        self.tail = Some(Tokens::from_slice(&tokens[self.len - self.len % block_size..self.len]));
        if let Some(window) = self.key.window {
            // Of what was found, the blocks that are passed already are not in the list.
            let passed = window.passed_blocks(self.len, block_size);
            let own = at.saturating_sub(self.sink_blocks()).min(passed);
            self.give_back_passed(own);
            self.gap = self.gap.max(passed);
        }
        found
    }

    /// What [`reuse`](Self::reuse) of these tokens would find at this moment, and how many blocks it would take to use that
    /// and then to [reserve](Self::reserve) slots for the rest of them: both succeed if as many are available. Nothing is
    /// taken or counted.
    ///
    /// Blocks that a table with a window gives back as it moves on are not subtracted.
    pub fn find(&self, tokens: &[u32]) -> Found {
        let block_size = self.pool().block_size();
        match self.sought(tokens) {
            Some((at, sought)) => self.blocks.find(&self.key, at, sought, tokens.len() - self.len),
            None => {
                let rest = tokens.len().saturating_sub(self.len);
                let growth = self.growth(rest);
                let mut found = Found::default();
                found.blocks = match self.place(self.len / block_size) {
                    Some(at) if rest > 0 => self.blocks.cost(at, growth),
                    _ => growth,
                };
                found
            }
        }
    }

    /// The number of the block after the sequence's last one, and those of `tokens` from there on that may be found, if the
    /// sequence can go on with the blocks of others.
    fn sought<'t>(&self, tokens: &'t [u32]) -> Option<(usize, &'t [u32])> {
        let block_size = self.pool().block_size();
        let known = tokens.len().saturating_sub(1);
        // The window has passed the block before.
        let broken = self.gap > 0 && self.blocks.len() == self.sink_blocks();
        let whole = self.len.is_multiple_of(block_size) && self.capacity() == self.len;
        (!self.private && whole && self.len < known && !broken)
            .then(|| (self.len / block_size, &tokens[self.len..known]))
    }

    /// Makes room to write `n` tokens behind the committed ones.
    ///
    /// If the block that the first of them falls into is shared, or can be found by others, the table gets its own copy of
    /// it (copy-on-write), in the same transaction as the growth.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] when the pool has too few blocks or the copy fails; the table is then unchanged.
    pub fn reserve(&mut self, n: usize) -> Result<(), ReserveError> {
        if n == 0 {
            return Ok(());
        }
        // What a decode step does nearly always: the token falls into the last block. No division.
        let capacity = self.capacity();
        let inside = self.len.saturating_add(n) <= capacity && capacity - self.len <= self.pool().block_size();
        if inside && self.gap == 0 {
            return self.blocks.own_and_grow(self.blocks.len() - 1, 0);
        }
        let growth = self.growth(n);
        match self.place(self.len / self.pool().block_size()) {
            Some(at) => self.blocks.own_and_grow(at, growth),
            None => Ok(self.blocks.grow(growth)?),
        }
    }

    /// How many blocks more it takes to have slots for `n` tokens after the committed ones.
    fn growth(&self, n: usize) -> usize {
        let needed = self.pool().blocks_for(self.len.saturating_add(n));
        needed.saturating_sub(self.blocks.len() + self.gap)
    }

    /// Makes the next reserved tokens part of the sequence, without saying which they are: then nobody can find them.
    /// What was reserved beyond them stays reserved.
    ///
    /// # Errors
    ///
    /// [`NotReserved`] when fewer than `n` are reserved; the table is then unchanged.
    pub fn commit(&mut self, n: usize) -> Result<(), NotReserved> {
        self.check_reserved(n)?;
        self.count_unknown(n);
        Ok(())
    }

    /// Makes the next reserved tokens part of the sequence. Blocks that are full now can be found by others, so all that
    /// is committed must have been written. What was reserved beyond them stays reserved.
    ///
    /// # Errors
    ///
    /// [`NotReserved`] when fewer are reserved; the table is then unchanged.
    pub fn commit_tokens(&mut self, tokens: &[u32]) -> Result<(), NotReserved> {
        self.check_reserved(tokens.len())?;
        let block_size = self.pool().block_size();
        if let (Some(tail), None) = (&mut self.tail, self.key.window)
            && tail.len() + tokens.len() < block_size
        {
            tail.extend_from_slice(tokens);
            self.len += tokens.len();
            return Ok(());
        }
        let first = self.len / block_size;
        self.len += tokens.len();
        if self.len / block_size == first {
            if let Some(tail) = &mut self.tail {
                tail.extend_from_slice(tokens);
            }
            self.slide();
            return Ok(());
        }
        // Behind a gap, the block before is not there to be followed.
        let follows = self.gap == 0 || first > self.sink_blocks() + self.gap;
        if let (Some(tail), Some(at), true, false) = (&self.tail, self.place(first), follows, self.private) {
            // A block of others was to be copied by `reserve` before its tokens could be these: what follows is not theirs.
            self.private |= self.blocks.store(&self.key, at, tail, tokens).is_none();
        }
        let unfinished = self.len % block_size;
        let tail = self.tail.get_or_insert_default();
        tail.clear();
        tail.reserve(block_size);
        tail.extend_from_slice(&tokens[tokens.len() - unfinished..]);
        self.slide();
        Ok(())
    }

    /// Gives the blocks back that were reserved and hold no committed token.
    pub fn roll_back(&mut self) {
        self.blocks.truncate(self.pool().blocks_for(self.len) - self.gap);
    }

    /// Reserves and commits `n` tokens at once: for callers who write after the fact, or never.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve).
    pub fn append(&mut self, n: usize) -> Result<(), ReserveError> {
        self.reserve(n)?;
        self.count_unknown(n);
        Ok(())
    }

    /// Keeps the first `len` tokens and gives back every block behind them. Does nothing if there are no more.
    ///
    /// With a window, the sequence then still holds all that its *next* token sees, the one at position `len`. What the last of
    /// the `len` tokens sees begins one position earlier, and may be gone: to attend with that token again, truncate to
    /// `len - 1` and compute it anew, or make the window one token larger than what a token sees.
    ///
    /// # Errors
    ///
    /// [`BehindWindow`] when the sequence has a window that has moved on too far, or its first tokens were
    /// [given back](Self::release_before) and `len` ends among them; the table is then unchanged.
    pub fn truncate(&mut self, len: usize) -> Result<(), BehindWindow> {
        if len < self.len {
            let gap = self.gap_at(len)?;
            self.tail = self.tail_at(len);
            self.len = len;
            if gap < self.gap {
                self.blocks.truncate(self.sink_blocks());
                self.gap = gap;
            }
        }
        self.roll_back();
        Ok(())
    }

    /// A second sequence with the same tokens, in the same blocks. Whoever writes to a shared block first gets a copy.
    pub fn fork(&self) -> BlockTable {
        self.fork_with(self.len, self.gap)
    }

    /// Like [`fork`](Self::fork), with the first `len` tokens only.
    ///
    /// # Errors
    ///
    /// As [`truncate`](Self::truncate).
    pub fn fork_at(&self, len: usize) -> Result<BlockTable, BehindWindow> {
        let len = len.min(self.len);
        Ok(self.fork_with(len, self.gap_at(len)?))
    }

    fn fork_with(&self, len: usize, gap: usize) -> BlockTable {
        BlockTable {
            blocks: self.blocks.share(self.pool().blocks_for(len) - gap),
            len,
            gap,
            key: self.key.clone(),
            private: self.private,
            tail: self.tail_at(len),
        }
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
            self.slide();
        }
    }

    /// Where the block of logical index `block` stands in the list, if it has not been given back.
    pub(crate) fn place(&self, block: usize) -> Option<usize> {
        if block < self.sink_blocks() || self.gap == 0 {
            return Some(block);
        }
        block.checked_sub(self.gap).filter(|&at| at >= self.sink_blocks())
    }

    fn sink_blocks(&self) -> usize {
        self.key.window.map_or(0, |window| window.sink_blocks(self.pool().block_size()))
    }

    /// Gives back the blocks that no later token sees.
    fn slide(&mut self) {
        let Some(window) = self.key.window else { return };
        self.give_back_passed(window.passed_blocks(self.len, self.pool().block_size()));
    }

    /// Gives back the first `passed` blocks after those of the sinks, as far as they have not been given back.
    fn give_back_passed(&mut self, passed: usize) {
        if passed > self.gap {
            let sinks = self.sink_blocks();
            self.blocks.remove(sinks..sinks + passed - self.gap);
            self.gap = passed;
        }
    }

    /// The gap of the table with its first `len` tokens only: the same, or none, if these lie before it. What counts is what
    /// the token at position `len` sees, which is the next one.
    fn gap_at(&self, len: usize) -> Result<usize, BehindWindow> {
        if self.gap == 0 {
            return Ok(0);
        }
        let block_size = self.pool().block_size();
        let sinks = self.sink_blocks();
        // Without a window, what was given back is kept elsewhere, and only what is still here matters.
        let (seen, held) = (self.key.window.map_or(len, |window| window.start(len)), (sinks + self.gap) * block_size);
        match len {
            _ if len <= sinks * block_size => Ok(0),
            _ if seen >= held => Ok(self.gap),
            _ => Err(BehindWindow { len, seen, held }),
        }
    }

    /// The tokens behind the last full block of the first `len`, if they are known.
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
        self.blocks.tokens(self.place(block)?, &mut tokens).then_some(tokens)
    }
}
