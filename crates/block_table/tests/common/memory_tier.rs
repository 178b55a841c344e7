//! A tier in memory that fails on command, and whose blocks leave on command.

#![allow(clippy::unwrap_used, dead_code)]

use std::collections::HashMap;
use std::sync::Mutex;

use block_table::{PrefixKey, SaltFrom, StorageError, Tier, TierCursor};

use super::content;

/// What a block is found by: nothing is hashed.
pub(crate) type Place = (PrefixKey, Vec<SaltFrom>, Vec<u32>, usize);

/// A tier that fails on command.
#[derive(Debug, Default)]
pub(crate) struct Memory(pub(crate) Mutex<Inner>);

#[derive(Debug, Default)]
pub(crate) struct Inner {
    pub(crate) blocks: HashMap<Place, Vec<u8>>,
    /// Every how many loads one fails; 0 is never.
    pub(crate) failing_loads: usize,
    pub(crate) failing_stores: bool,
    loads: usize,
}

struct Cursor<'a> {
    tier: &'a Memory,
    at: Place,
    loaded: Vec<u8>,
}

impl Tier for Memory {
    fn cursor<'a>(&'a self, key: &PrefixKey) -> Box<dyn TierCursor + 'a> {
        Box::new(Cursor { tier: self, at: (key.clone(), Vec::new(), Vec::new(), 0), loaded: Vec::new() })
    }
}

impl Cursor<'_> {
    fn at(&self, group: usize) -> Place {
        let (key, salts, tokens, _) = self.at.clone();
        (key, salts, tokens, group)
    }
}

impl TierCursor for Cursor<'_> {
    fn advance(&mut self, tokens: &[u32], salts: &[SaltFrom]) {
        self.at.1.extend_from_slice(salts);
        self.at.2.extend_from_slice(tokens);
    }

    fn contains(&self, group: usize) -> bool {
        self.tier.0.lock().unwrap().blocks.contains_key(&self.at(group))
    }

    fn load(&mut self, group: usize) -> Option<&[u8]> {
        let at = self.at(group);
        let mut inner = self.tier.0.lock().unwrap();
        inner.loads += 1;
        if inner.failing_loads > 0 && inner.loads.is_multiple_of(inner.failing_loads) {
            return None;
        }
        self.loaded = inner.blocks.get(&at)?.clone();
        Some(&self.loaded)
    }

    fn store(&mut self, group: usize, bytes: &[u8]) -> Result<bool, StorageError> {
        let at = self.at(group);
        let mut inner = self.tier.0.lock().unwrap();
        if inner.failing_stores {
            return Err(StorageError::new("the tier is set to fail"));
        }
        Ok(inner.blocks.insert(at, bytes.to_vec()).is_none())
    }
}

impl Memory {
    /// Checks that each block has what was written for its tokens and the salt of its sequence.
    pub(crate) fn check(&self, block_size: usize) {
        for ((key, salts, tokens, _), bytes) in &self.0.lock().unwrap().blocks {
            assert_eq!(salts, &[]);
            let all = [&[key.salt.bytes().map_or(0, |salt| u32::from(salt[0]))], &tokens[..]].concat();
            assert_eq!(bytes.len(), block_size * 8);
            for (slot, position) in bytes.chunks_exact(8).zip(tokens.len() - block_size..) {
                assert_eq!(slot, content(&all[..position + 2]).to_le_bytes());
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().blocks.len()
    }
}
