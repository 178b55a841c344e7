//! What keeps blocks below the pool: on a disk, or in another process.

use std::fmt;

use crate::{PrefixKey, SaltFrom, StorageError};

/// A tier below the pool: it keeps the bytes of blocks, and finds them by their key, tokens and salts, as the pool does.
///
/// What is found must be what was stored for the same key, tokens and salts of the same model: whatever goes wrong is a
/// miss. All calls may block. None is made under a lock of the pool.
pub trait Tier: Send + Sync + fmt::Debug {
    /// The blocks of the sequences with this key, from the first one on.
    fn cursor<'a>(&'a self, key: &PrefixKey) -> Box<dyn TierCursor + 'a>;

    /// Has `left` called whenever a block of a group has left the tier. Returns false if the tier does not do that, or has
    /// been asked before.
    fn watch(&self, left: TierWatcher) -> bool {
        drop(left);
        false
    }
}

/// The name of a place in a tier. It says nothing about tokens and salts.
pub type TierPlace = [u8; 32];

/// Is called with the place and the group of a block that has left a tier.
pub type TierWatcher = Box<dyn Fn(&TierPlace, usize) + Send + Sync>;

/// A place among the blocks of a sequence: at first before the first one.
pub trait TierCursor {
    /// Goes on to the next block, which has these tokens, and in which these salts of the sequence begin.
    fn advance(&mut self, tokens: &[u32], salts: &[SaltFrom]);

    /// The name of this block's place, if the tier has names.
    fn place(&self) -> Option<TierPlace> {
        None
    }

    /// Whether the tier seems to have this block of a group. Only loading it shows whether it has.
    fn contains(&self, group: usize) -> bool;

    /// The bytes of this block of a group; `None` if the tier does not have them.
    fn load(&mut self, group: usize) -> Option<&[u8]>;

    /// Stores the bytes of this block of a group, unless the tier has them. Returns whether they are new.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when they cannot be stored. The tier can be used as before.
    fn store(&mut self, group: usize, bytes: &[u8]) -> Result<bool, StorageError>;
}
