//! A picture of the pool: the state of each block.

use std::fmt;

use crate::{BlockPool, Stats};

/// The state of a block at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// Not in use and not cached: its content is lost.
    Free,
    /// Cached and not in use: it is found by its tokens until its memory is needed.
    Evictable,
    /// In use; its ref_count.
    InUse(u32),
}

/// All blocks of a pool at one moment. `Display` prints a picture.
///
/// ```
/// use block_pool::BlockPool;
///
/// let pool = BlockPool::new(8, 16)?;
/// let a = pool.allocate(3)?;
/// let b = a.fork(2);
/// assert_eq!(
///     pool.snapshot().to_string(),
///     "\
/// 22█·····
/// 3 of 8 blocks in use (█ by one, a digit by several), 0 evictable (▒), 5 free (·)
/// "
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// The state of each block, by its index.
    pub blocks: Vec<BlockState>,
    /// Tokens in a block.
    pub block_size: usize,
    /// What the pool has done since it was made.
    pub stats: Stats,
}

/// Blocks in a line of the picture.
const LINE: usize = 64;

impl Snapshot {
    /// How many blocks are in a state for which `is` is true.
    fn count(&self, is: impl Fn(&BlockState) -> bool) -> usize {
        self.blocks.iter().filter(|&state| is(state)).count()
    }
}

impl BlockPool {
    /// The state of every block at this moment.
    pub fn snapshot(&self) -> Snapshot {
        let ((ref_counts, cached), stats) = {
            let ledger = self.ledger();
            (ledger.states(), ledger.stats())
        };
        let state = |(ref_count, cached)| match (ref_count, cached) {
            (0, true) => BlockState::Evictable,
            (0, false) => BlockState::Free,
            (n, _) => BlockState::InUse(n),
        };
        let blocks = ref_counts.into_iter().zip(cached).map(state).collect();
        Snapshot { blocks, block_size: self.block_size(), stats }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.blocks.chunks(LINE) {
            for state in line {
                match *state {
                    BlockState::Free => f.write_str("·")?,
                    BlockState::Evictable => f.write_str("▒")?,
                    BlockState::InUse(1) => f.write_str("█")?,
                    BlockState::InUse(n @ 2..=9) => write!(f, "{n}")?,
                    BlockState::InUse(_) => f.write_str("+")?,
                }
            }
            writeln!(f)?;
        }
        let evictable = self.count(|state| *state == BlockState::Evictable);
        let free = self.count(|state| *state == BlockState::Free);
        let blocks = self.blocks.len();
        writeln!(
            f,
            "{} of {blocks} blocks in use (█ by one, a digit by several), {evictable} evictable (▒), {free} free (·)",
            blocks - evictable - free
        )
    }
}
