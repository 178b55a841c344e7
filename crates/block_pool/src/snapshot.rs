//! A picture of the pool.

use std::fmt;

use crate::{BlockPool, Stats};

/// What a block is at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// Nobody holds it, and its content is gone.
    Free,
    /// Nobody holds it, and it can be found by its tokens until its memory is needed.
    Remembered,
    /// So many sequences hold it.
    Held(u32),
}

/// All blocks of a pool at one moment. Prints as a picture.
///
/// ```
/// use block_pool::BlockPool;
///
/// let pool = BlockPool::new(8, 16)?;
/// let a = pool.take(3)?;
/// let b = a.share(2);
/// assert_eq!(
///     pool.snapshot().to_string(),
///     "\
/// 22█·····
/// 3 of 8 blocks held (█ by one, a digit by several), 0 remembered (▒), 5 free (·)
/// "
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The state of each block, by its index.
    pub blocks: Vec<BlockState>,
    /// Tokens in a block.
    pub block_size: usize,
    /// What the pool has done so far.
    pub stats: Stats,
}

/// Blocks in a line of the picture.
const LINE: usize = 64;

impl Snapshot {
    /// How many blocks are in a state that `is` accepts.
    fn count(&self, is: impl Fn(&BlockState) -> bool) -> usize {
        self.blocks.iter().filter(|&state| is(state)).count()
    }
}

impl BlockPool {
    /// The state of every block at this moment.
    pub fn snapshot(&self) -> Snapshot {
        let ((holders, cached), stats) = {
            let ledger = self.ledger();
            (ledger.states(), ledger.stats())
        };
        let state = |(holders, cached)| match (holders, cached) {
            (0, true) => BlockState::Remembered,
            (0, false) => BlockState::Free,
            (n, _) => BlockState::Held(n),
        };
        let blocks = holders.into_iter().zip(cached).map(state).collect();
        Snapshot { blocks, block_size: self.block_size(), stats }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.blocks.chunks(LINE) {
            for state in line {
                match *state {
                    BlockState::Free => f.write_str("·")?,
                    BlockState::Remembered => f.write_str("▒")?,
                    BlockState::Held(1) => f.write_str("█")?,
                    BlockState::Held(n @ 2..=9) => write!(f, "{n}")?,
                    BlockState::Held(_) => f.write_str("+")?,
                }
            }
            writeln!(f)?;
        }
        let remembered = self.count(|state| *state == BlockState::Remembered);
        let free = self.count(|state| *state == BlockState::Free);
        let blocks = self.blocks.len();
        writeln!(
            f,
            "{} of {blocks} blocks held (█ by one, a digit by several), {remembered} remembered (▒), {free} free (·)",
            blocks - remembered - free
        )
    }
}
