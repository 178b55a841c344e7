//! One sequence's logical positions, and the blocks they lie in.

use block_pool::{BlockId, BlockPool, BlockState, Blocks, ReserveError, Salt};
use smallvec::SmallVec;

use crate::{BehindWindow, NotReserved, Window};

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
    pub(crate) window: Option<Window>,
    /// How many blocks behind those of the sinks have been given back.
    pub(crate) gap: usize,
    /// What prefixes of this sequence are stored under; none if they are not.
    pub(crate) salt: Option<Salt>,
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

/// What a look-up has found: see [`BlockTable::look_up`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Found {
    /// How many tokens [`BlockTable::reuse`] would add now.
    pub tokens: usize,
    /// How many blocks of [`BlockPool::available`] `reuse`, followed by reserving the rest of the tokens, would take, the
    /// copy of a shared last block included.
    pub blocks: usize,
}

impl BlockTable {
    /// An empty table over `pool`.
    pub fn new(pool: &BlockPool) -> Self {
        Self::with_options(pool, &TableOptions::default())
    }

    /// An empty table over `pool` with a salt or a window.
    pub fn with_options(pool: &BlockPool, options: &TableOptions) -> Self {
        let TableOptions { ref salt, window, private } = *options;
        // The same tokens leave other keys and values behind when they have seen less.
        let salt = match window {
            Some(window) => windowed(salt, window),
            None => salt.clone(),
        };
        let salt = (!private).then_some(salt);
        Self { blocks: Blocks::none(pool), len: 0, window, gap: 0, salt, tail: Some(Tokens::new()) }
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
        self.window
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
        let block_size = self.pool().block_size();
        let known = tokens.len().saturating_sub(1);
        let broken = self.gap > 0 && self.blocks.len() == self.sink_blocks();
        let Some(salt) = &self.salt else { return 0 };
        if !self.len.is_multiple_of(block_size) || self.capacity() > self.len || self.len >= known || broken {
            return 0;
        }
        let found = self.blocks.reuse(salt, &tokens[self.len..known]);
        self.len += found;
        self.tail = Some(Tokens::from_slice(&tokens[self.len - self.len % block_size..self.len]));
        self.slide();
        found
    }

    /// What [`reuse`](Self::reuse) would find at this moment, and what the sequence would take of the pool with it.
    pub fn look_up(&self, tokens: &[u32]) -> Found {
        let pool = self.pool();
        let states = pool.snapshot().blocks;
        let state = |id: &BlockId| states.get(id.index()).copied().unwrap_or(BlockState::Free);
        let mut trial = self.fork();
        let gained = trial.reuse(tokens);
        let added = &trial.blocks()[self.blocks.len().min(trial.blocks.len())..];
        let remembered = added.iter().filter(|id| state(id) == BlockState::Remembered).count();
        let growth = pool.blocks_for(tokens.len()).saturating_sub(trial.blocks.len() + trial.gap);
        let taken = remembered + growth;
        let inside = !trial.len.is_multiple_of(pool.block_size()) && tokens.len() > trial.len;
        let last = trial.place(trial.len / pool.block_size()).filter(|_| inside);
        let copy = last.and_then(|at| {
            let stored = trial.blocks.tokens(at, 0, &mut Tokens::new());
            // Whether this table is, or would be, the only one that holds it.
            let alone = match (state(trial.blocks.get(at)?), at < self.blocks.len()) {
                (BlockState::Held(holders), own) => holders <= u32::from(own),
                _ => true,
            };
            let available = states.iter().filter(|state| !matches!(state, BlockState::Held(_))).count();
            Some(!alone || stored && taken < available)
        });
        Found { tokens: gained, blocks: taken + usize::from(copy.unwrap_or(false)) }
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
        let needed = self.pool().blocks_for(self.len.saturating_add(n));
        let growth = needed.saturating_sub(self.blocks.len() + self.gap);
        match self.place(self.len / self.pool().block_size()) {
            Some(at) => self.blocks.own_and_grow(at, growth),
            None => Ok(self.blocks.grow(growth)?),
        }
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
        if let (Some(tail), None) = (&mut self.tail, self.window)
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
        if let (Some(salt), Some(tail), Some(at), true) = (&self.salt, &self.tail, self.place(first), follows) {
            self.blocks.store(salt, at, tail, tokens);
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
    /// # Errors
    ///
    /// [`BehindWindow`] when the sequence has a window that has moved on too far; the table is then unchanged. Never
    /// without a window.
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
            window: self.window,
            gap,
            salt: self.salt.clone(),
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
        self.window.map_or(0, |window| self.pool().blocks_for(window.sinks()))
    }

    /// Gives back the blocks that no later token sees.
    fn slide(&mut self) {
        let Some(window) = self.window else { return };
        let sinks = self.sink_blocks();
        let behind = (window.start(self.len) / self.pool().block_size()).saturating_sub(sinks);
        if behind > self.gap {
            self.blocks.remove(sinks..sinks + behind - self.gap);
            self.gap = behind;
        }
    }

    /// The gap of the table with its first `len` tokens only: the same, or none, if these lie before it.
    fn gap_at(&self, len: usize) -> Result<usize, BehindWindow> {
        if self.gap == 0 {
            return Ok(0);
        }
        let block_size = self.pool().block_size();
        let sinks = self.sink_blocks();
        // Without a window, what was given back is kept elsewhere, and only what is still here matters.
        let (seen, held) = (self.window.map_or(len, |window| window.start(len)), (sinks + self.gap) * block_size);
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
        let mut tokens = Tokens::new();
        self.blocks.tokens(self.place(block)?, n, &mut tokens).then_some(tokens)
    }
}

/// A salt of its own for each window. The caller's bytes come last, so that no two pairs look the same.
fn windowed(salt: &Salt, window: Window) -> Salt {
    let numbers = [window.tokens() as u64, window.sinks() as u64, u64::from(salt.bytes().is_some())];
    let mut bytes = b"window ".to_vec();
    bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    bytes.extend(salt.bytes().unwrap_or_default());
    Salt::new(&bytes)
}
