//! One sequence's logical positions, and the blocks they lie in.

use block_pool::{BlockId, BlockPool, Blocks, ReserveError};

/// Maps the logical positions of one sequence to slots of the pool.
///
/// A table has a *length*, the tokens that are part of the sequence, and a *capacity*, the slots it holds. Tokens come
/// in two moves: [`reserve`](Self::reserve) makes room, and [`commit`](Self::commit) makes what was written part of the
/// sequence. What was reserved and not committed can be given back with [`roll_back`](Self::roll_back).
///
/// Dropping a table gives its blocks back.
///
/// ```
/// use block_pool::BlockPool;
/// use block_table::BlockTable;
///
/// let pool = BlockPool::new(8, 4)?;
/// let mut table = BlockTable::new(&pool);
/// table.append(6)?;
/// assert_eq!((table.len(), table.capacity()), (6, 8));
/// assert_eq!(table.slot(5), Some(table.blocks()[1].index() * 4 + 1));
///
/// let fork = table.fork(); // shares both blocks
/// table.append(1)?; // the last one is copied before the first write
/// assert_eq!(table.blocks()[0], fork.blocks()[0]);
/// assert_ne!(table.blocks()[1], fork.blocks()[1]);
///
/// table.truncate(3);
/// assert_eq!(table.blocks().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping the table gives its blocks back"]
pub struct BlockTable {
    blocks: Blocks,
    len: usize,
}

impl BlockTable {
    /// An empty table over `pool`.
    pub fn new(pool: &BlockPool) -> Self {
        Self { blocks: Blocks::none(pool), len: 0 }
    }

    /// The pool the blocks come from.
    pub fn pool(&self) -> &BlockPool {
        self.blocks.pool()
    }

    /// How many tokens the sequence has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has no tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many tokens fit into the blocks that the table holds.
    pub fn capacity(&self) -> usize {
        self.blocks.len() * self.pool().block_size()
    }

    /// The blocks, in the order of the positions they hold.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// The slot of the token at `position`, `block * block_size + offset`; `None` beyond the capacity.
    pub fn slot(&self, position: usize) -> Option<usize> {
        let block_size = self.pool().block_size();
        let block = self.blocks.get(position / block_size)?;
        Some(block.index() * block_size + position % block_size)
    }

    /// Makes room to write `n` tokens behind the committed ones.
    ///
    /// If the block that the first of them falls into is shared with a fork, the table gets its own copy of it
    /// (copy-on-write), in the same transaction as the growth.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] when the pool has too few blocks or the copy fails; the table is then unchanged.
    pub fn reserve(&mut self, n: usize) -> Result<(), ReserveError> {
        if n == 0 {
            return Ok(());
        }
        let needed = self.pool().blocks_for(self.len.saturating_add(n));
        let growth = needed.saturating_sub(self.blocks.len());
        self.blocks.own_and_grow(self.len / self.pool().block_size(), growth)
    }

    /// Makes the next `n` reserved tokens part of the sequence. What was reserved beyond them stays reserved.
    ///
    /// # Errors
    ///
    /// [`NotReserved`] when fewer than `n` are reserved; the table is then unchanged.
    pub fn commit(&mut self, n: usize) -> Result<(), NotReserved> {
        let reserved = self.capacity() - self.len;
        if n > reserved {
            return Err(NotReserved { committed: n, reserved });
        }
        self.len += n;
        Ok(())
    }

    /// Gives the blocks back that were reserved and hold no committed token.
    pub fn roll_back(&mut self) {
        self.blocks.truncate(self.pool().blocks_for(self.len));
    }

    /// Reserves and commits `n` tokens at once: for callers who write after the fact, or never.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve).
    pub fn append(&mut self, n: usize) -> Result<(), ReserveError> {
        self.reserve(n)?;
        self.len += n;
        Ok(())
    }

    /// Keeps the first `len` tokens and gives back every block behind them. Does nothing if there are no more.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.roll_back();
    }

    /// A second sequence with the same tokens, in the same blocks. Whoever writes to a shared block first gets a copy.
    pub fn fork(&self) -> BlockTable {
        self.fork_at(self.len)
    }

    /// Like [`fork`](Self::fork), with the first `len` tokens only.
    pub fn fork_at(&self, len: usize) -> BlockTable {
        let len = len.min(self.len);
        BlockTable { blocks: self.blocks.share(self.pool().blocks_for(len)), len }
    }
}

/// More tokens were to be committed than were reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("asked to commit {committed} tokens, {reserved} are reserved")]
pub struct NotReserved {
    /// The tokens to be committed.
    pub committed: usize,
    /// The tokens there was room for.
    pub reserved: usize,
}
