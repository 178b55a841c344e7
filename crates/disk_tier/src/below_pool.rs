//! The tier as the pool's tables use it.

use block_pool::{PrefixKey, SaltFrom, StorageError, Tier, TierCursor, TierPlace, TierWatcher};

use crate::{Buffer, DiskTier, Place, Prefix, Stored};

impl Tier for DiskTier {
    fn cursor<'a>(&'a self, key: &PrefixKey) -> Box<dyn TierCursor + 'a> {
        Box::new(Cursor { tier: self, prefix: self.prefix(key), place: None, buffer: Buffer::default() })
    }

    fn watch(&self, left: TierWatcher) -> bool {
        DiskTier::watch(self, left)
    }
}

struct Cursor<'a> {
    tier: &'a DiskTier,
    prefix: Prefix,
    /// None before the first block.
    place: Option<Place>,
    buffer: Buffer,
}

impl TierCursor for Cursor<'_> {
    fn advance(&mut self, tokens: &[u32], salts: &[SaltFrom]) {
        self.place = Some(self.prefix.next(tokens, salts));
    }

    fn place(&self) -> Option<TierPlace> {
        self.place.as_ref().map(|place| place.name)
    }

    fn contains(&self, group: usize) -> bool {
        self.place.as_ref().is_some_and(|place| self.tier.contains(place, group))
    }

    fn load(&mut self, group: usize) -> Option<&[u8]> {
        self.tier.load(self.place.as_ref()?, group, &mut self.buffer)
    }

    fn store(&mut self, group: usize, bytes: &[u8]) -> Result<bool, StorageError> {
        let Some(place) = &self.place else { return Err(StorageError::new("there is no block before the first")) };
        let stored = self.tier.store(place, group, bytes, &mut self.buffer).map_err(StorageError::new)?;
        Ok(stored == Stored::New)
    }
}
