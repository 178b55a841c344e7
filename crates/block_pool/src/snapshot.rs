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
    /// The state of each block of the first group, by its index.
    pub blocks: Vec<BlockState>,
    /// The states of the blocks of the other groups.
    pub other_groups: Vec<Vec<BlockState>>,
    /// Tokens in a block.
    pub block_size: usize,
    /// What the pool has done since it was made.
    pub stats: Stats,
}

/// Blocks in a line of the picture.
const LINE: usize = 64;

impl Snapshot {
    /// The states of the blocks of each group.
    pub fn groups(&self) -> impl Iterator<Item = &[BlockState]> {
        std::iter::once(&self.blocks).chain(&self.other_groups).map(Vec::as_slice)
    }
}

impl BlockPool {
    /// The state of every block at this moment.
    pub fn snapshot(&self) -> Snapshot {
        let (states, stats) = {
            let ledger = self.ledger();
            (ledger.states(), ledger.stats())
        };
        let state = |(ref_count, cached)| match (ref_count, cached) {
            (0, true) => BlockState::Evictable,
            (0, false) => BlockState::Free,
            (n, _) => BlockState::InUse(n),
        };
        let mut groups = states.into_iter().map(|states| states.into_iter().map(state).collect());
        let blocks = groups.next().unwrap_or_default();
        Snapshot { blocks, other_groups: groups.collect(), block_size: self.block_size(), stats }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (group, blocks) in self.groups().enumerate() {
            if !self.other_groups.is_empty() {
                writeln!(f, "group {group}:")?;
            }
            picture(f, blocks)?;
        }
        Ok(())
    }
}

fn picture(f: &mut fmt::Formatter<'_>, blocks: &[BlockState]) -> fmt::Result {
    for line in blocks.chunks(LINE) {
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
    let count = |is: BlockState| blocks.iter().filter(|&&state| state == is).count();
    let (evictable, free, all) = (count(BlockState::Evictable), count(BlockState::Free), blocks.len());
    let in_use = all - evictable - free;
    writeln!(
        f,
        "{in_use} of {all} blocks in use (█ by one, a digit by several), {evictable} evictable (▒), {free} free (·)"
    )
}
