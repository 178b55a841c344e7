//! Sequences addressed by id, from many threads.
//!
//! The locks of the map's shards are not re-entrant: a thread that keeps a reference to one entry and asks for another
//! can deadlock with itself. So the map never hands out a reference to an entry. A table is moved out of the map while
//! a caller works on it, and its entry is *busy* meanwhile. While a shard is locked, no table is dropped and no pool is
//! called.

use std::ops::{Deref, DerefMut};

use block_pool::BlockPool;

use crate::BlockTable;
use crate::sync::{AtomicU64, Ordering, Shards};

/// The id of a sequence, unique within its [`Sequences`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Why a sequence cannot be checked out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// There is no sequence with this id.
    #[error("there is no sequence {0}")]
    Unknown(SequenceId),
    /// The sequence is checked out already. The error is returned at once; the call does not block.
    #[error("sequence {0} is busy in a step")]
    Busy(SequenceId),
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "few entries are busy, and a box would cost an allocation per sequence")]
enum Entry {
    Idle(BlockTable),
    Busy,
}

/// All sequences of one pool, by id. Share it by reference or in an `Arc`.
///
/// ```
/// use block_pool::BlockPool;
/// use block_table::{SequenceError, Sequences};
///
/// let sequences = Sequences::new(&BlockPool::new(8, 4)?);
/// let id = sequences.create();
///
/// let mut table = sequences.check_out(id)?; // not in the map until `table` is dropped
/// table.append(6)?;
/// assert_eq!(sequences.check_out(id).unwrap_err(), SequenceError::Busy(id));
/// drop(table); // back in the map
///
/// assert_eq!(sequences.check_out(id)?.len(), 6);
/// sequences.remove(id)?; // frees its blocks
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Sequences {
    pool: BlockPool,
    entries: Shards<SequenceId, Entry>,
    next: AtomicU64,
}

impl Sequences {
    /// An empty map, for tables over `pool`.
    pub fn new(pool: &BlockPool) -> Self {
        Self { pool: pool.clone(), entries: Shards::new(), next: AtomicU64::new(0) }
    }

    /// The pool that all tables share.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// How many sequences there are, busy ones included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a new, empty sequence.
    pub fn create(&self) -> SequenceId {
        self.insert(BlockTable::new(&self.pool))
    }

    /// Adds a new sequence with this table, for example a fork.
    pub fn insert(&self, table: BlockTable) -> SequenceId {
        let id = SequenceId(self.next.fetch_add(1, Ordering::Relaxed));
        self.entries.insert(id, Entry::Idle(table));
        id
    }

    /// Moves the table of `id` out of the map. It goes back when the returned value is dropped, also during a panic.
    ///
    /// # Errors
    ///
    /// [`SequenceError::Unknown`] when there is no such sequence, [`SequenceError::Busy`] when it is checked out
    /// already.
    pub fn check_out(&self, id: SequenceId) -> Result<CheckedOut<'_>, SequenceError> {
        match self.entries.replace(id, Entry::Busy) {
            Some(Entry::Idle(table)) => Ok(CheckedOut { sequences: self, id, table }),
            Some(Entry::Busy) => Err(SequenceError::Busy(id)),
            None => Err(SequenceError::Unknown(id)),
        }
    }

    /// Checks out several tables, or none of them.
    ///
    /// # Errors
    ///
    /// [`SequenceError`] for the first sequence that cannot be checked out. An id that occurs twice is
    /// [`Busy`](SequenceError::Busy) the second time.
    pub fn check_out_all(
        &self,
        ids: impl IntoIterator<Item = SequenceId>,
    ) -> Result<Vec<CheckedOut<'_>>, SequenceError> {
        ids.into_iter().map(|id| self.check_out(id)).collect()
    }

    /// Adds a new sequence with the tokens of `id`, in the same blocks: see [`BlockTable::fork`].
    ///
    /// # Errors
    ///
    /// As [`check_out`](Self::check_out).
    pub fn fork(&self, id: SequenceId) -> Result<SequenceId, SequenceError> {
        let fork = self.check_out(id)?.fork();
        Ok(self.insert(fork))
    }

    /// Removes `id` and frees its blocks.
    ///
    /// # Errors
    ///
    /// As [`check_out`](Self::check_out). A busy sequence stays in the map.
    pub fn remove(&self, id: SequenceId) -> Result<(), SequenceError> {
        match self.entries.remove_if(id, |entry| matches!(entry, Entry::Idle(_))) {
            // The shard is unlocked by now: freeing blocks locks the pool.
            Some(Ok(removed)) => drop(removed),
            Some(Err(())) => return Err(SequenceError::Busy(id)),
            None => return Err(SequenceError::Unknown(id)),
        }
        Ok(())
    }
}

/// A table that is checked out of its [`Sequences`] until this is dropped.
#[derive(Debug)]
#[must_use = "dropping it puts the table back"]
pub struct CheckedOut<'s> {
    sequences: &'s Sequences,
    id: SequenceId,
    table: BlockTable,
}

impl CheckedOut<'_> {
    /// The sequence whose table this is.
    pub fn id(&self) -> SequenceId {
        self.id
    }
}

impl Deref for CheckedOut<'_> {
    type Target = BlockTable;

    fn deref(&self) -> &BlockTable {
        &self.table
    }
}

impl DerefMut for CheckedOut<'_> {
    fn deref_mut(&mut self) -> &mut BlockTable {
        &mut self.table
    }
}

impl Drop for CheckedOut<'_> {
    fn drop(&mut self) {
        let empty = BlockTable::new(self.sequences.pool());
        let table = std::mem::replace(&mut self.table, empty);
        // A busy sequence keeps its entry in the map, so the table can go back into it.
        drop(self.sequences.entries.replace(self.id, Entry::Idle(table)));
    }
}
