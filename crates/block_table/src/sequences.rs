//! Sequences addressed by id, from many threads.
//!
//! The map's shards have locks that are not re-entrant: a thread that holds an entry and asks for another can wait for
//! itself. So no entry is ever handed out. A table is taken out of the map for as long as somebody works on it, its
//! place says *busy* meanwhile, and no table is dropped, nor any pool asked, while a shard is locked.

use std::ops::{Deref, DerefMut};

use block_pool::BlockPool;

use crate::BlockTable;
use crate::sync::{AtomicU64, Ordering, Shards};

/// The name of a sequence, unique within its [`Sequences`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Why a sequence cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// There is no sequence of this name.
    #[error("there is no sequence {0}")]
    Unknown(SequenceId),
    /// Somebody else works on it; the answer is immediate, nobody waits.
    #[error("sequence {0} is busy in a step")]
    Busy(SequenceId),
}

#[derive(Debug)]
enum Place {
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
/// let mut table = sequences.take(id)?; // out of the map while we work on it
/// table.append(6)?;
/// assert_eq!(sequences.take(id).unwrap_err(), SequenceError::Busy(id));
/// drop(table); // back in the map
///
/// assert_eq!(sequences.take(id)?.len(), 6);
/// sequences.remove(id)?; // gives its blocks back
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Sequences {
    pool: BlockPool,
    places: Shards<SequenceId, Place>,
    next: AtomicU64,
}

impl Sequences {
    /// No sequences yet, over `pool`.
    pub fn new(pool: &BlockPool) -> Self {
        Self { pool: pool.clone(), places: Shards::new(), next: AtomicU64::new(0) }
    }

    /// The pool that all tables share.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// How many sequences there are, busy ones included.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A new, empty sequence.
    pub fn create(&self) -> SequenceId {
        self.insert(BlockTable::new(&self.pool))
    }

    /// A new sequence that owns `table`: a fork, say.
    pub fn insert(&self, table: BlockTable) -> SequenceId {
        let id = SequenceId(self.next.fetch_add(1, Ordering::Relaxed));
        self.places.insert(id, Place::Idle(table));
        id
    }

    /// Takes the table of `id` out of the map. It goes back when the returned value is dropped, also by a panic.
    ///
    /// # Errors
    ///
    /// [`SequenceError`] when there is no such sequence, or it is taken already.
    pub fn take(&self, id: SequenceId) -> Result<Taken<'_>, SequenceError> {
        match self.places.replace(id, Place::Busy) {
            Some(Place::Idle(table)) => Ok(Taken { sequences: self, id, table }),
            Some(Place::Busy) => Err(SequenceError::Busy(id)),
            None => Err(SequenceError::Unknown(id)),
        }
    }

    /// Takes several tables, all or none.
    ///
    /// # Errors
    ///
    /// [`SequenceError`] about the first that cannot be had; a name that occurs twice is busy the second time.
    pub fn take_all(&self, ids: impl IntoIterator<Item = SequenceId>) -> Result<Vec<Taken<'_>>, SequenceError> {
        ids.into_iter().map(|id| self.take(id)).collect()
    }

    /// A new sequence with the tokens of `id`, in the same blocks.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take).
    pub fn fork(&self, id: SequenceId) -> Result<SequenceId, SequenceError> {
        let fork = self.take(id)?.fork();
        Ok(self.insert(fork))
    }

    /// Forgets `id` and gives its blocks back.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take): a busy sequence stays.
    pub fn remove(&self, id: SequenceId) -> Result<(), SequenceError> {
        match self.places.remove_if(id, |place| matches!(place, Place::Idle(_))) {
            // The shard is unlocked by now: giving blocks back takes the pool's lock.
            Some(Ok(removed)) => drop(removed),
            Some(Err(())) => return Err(SequenceError::Busy(id)),
            None => return Err(SequenceError::Unknown(id)),
        }
        Ok(())
    }
}

/// A table that is out of the map while somebody works on it.
#[derive(Debug)]
#[must_use = "dropping it puts the table back"]
pub struct Taken<'s> {
    sequences: &'s Sequences,
    id: SequenceId,
    table: BlockTable,
}

impl Taken<'_> {
    /// The sequence whose table this is.
    pub fn id(&self) -> SequenceId {
        self.id
    }
}

impl Deref for Taken<'_> {
    type Target = BlockTable;

    fn deref(&self) -> &BlockTable {
        &self.table
    }
}

impl DerefMut for Taken<'_> {
    fn deref_mut(&mut self) -> &mut BlockTable {
        &mut self.table
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let empty = BlockTable::new(self.sequences.pool());
        let table = std::mem::replace(&mut self.table, empty);
        // A busy sequence stays in the map, so there is a place to put it back to.
        drop(self.sequences.places.replace(self.id, Place::Idle(table)));
    }
}
