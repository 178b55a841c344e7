//! A growing list of pools of one shape and type.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use paged_attention::{KvCache, KvCacheBuilder, OutOfBlocks};

use crate::error::Result;

/// Pools of one shape and type. If growth is allowed, a new one is added when none has room.
#[derive(Debug)]
pub(crate) struct Stores {
    builder: KvCacheBuilder,
    grows: AtomicBool,
    growths: AtomicU64,
    all: Mutex<Vec<KvCache>>,
}

impl Stores {
    /// A list of one pool, built by `builder`.
    pub(crate) fn new(builder: KvCacheBuilder, grows: bool) -> Result<Self> {
        let first = builder.clone().build()?;
        let (grows, growths) = (AtomicBool::new(grows), AtomicU64::new(0));
        Ok(Self { builder, grows, growths, all: Mutex::new(vec![first]) })
    }

    pub(crate) fn let_grow(&self) {
        self.grows.store(true, Ordering::Relaxed);
    }

    pub(crate) fn grows(&self) -> bool {
        self.grows.load(Ordering::Relaxed)
    }

    pub(crate) fn growths(&self) -> u64 {
        self.growths.load(Ordering::Relaxed)
    }

    /// Tokens per block.
    pub(crate) fn block_size(&self) -> usize {
        self.lock().first().map_or(1, |cache| cache.pool().block_size())
    }

    pub(crate) fn bytes_per_token(&self) -> usize {
        self.lock().first().map_or(0, |cache| cache.bytes_per_block() / cache.pool().block_size())
    }

    /// All pools at this moment, in the order in which they were made.
    pub(crate) fn all(&self) -> Vec<KvCache> {
        self.lock().clone()
    }

    /// A pool with `blocks` available blocks at this moment. If there is none and growth is allowed, a new pool is
    /// added: as large as all others together, or with `blocks` blocks if that is more. If growth is not allowed, this
    /// is an [`OutOfBlocks`] error.
    pub(crate) fn with_room(&self, blocks: usize) -> Result<KvCache> {
        let mut all = self.lock();
        let available = || all.iter().map(|cache| cache.pool().available());
        if let Some(at) = available().position(|available| available >= blocks) {
            return Ok(all[at].clone());
        }
        if !self.grows() {
            return Err(OutOfBlocks { requested: blocks, available: available().max().unwrap_or(0) }.into());
        }
        let total: usize = all.iter().map(|cache| cache.pool().blocks()).sum();
        let cache = self.builder.clone().blocks(total.max(blocks)).build()?;
        self.growths.fetch_add(1, Ordering::Relaxed);
        all.push(cache.clone());
        // A tracing subscriber is the host's code, which may take this lock.
        drop(all);
        tracing::debug!(blocks = cache.pool().blocks(), "a pool was added to the cache");
        Ok(cache)
    }

    /// Replaces all pools by a new one of this many blocks, and returns it. An old pool is dropped when none of its
    /// blocks is in use.
    pub(crate) fn replaced(&self, blocks: usize) -> Result<KvCache> {
        let cache = self.builder.clone().blocks(blocks).build()?;
        self.growths.fetch_add(1, Ordering::Relaxed);
        let before = std::mem::replace(&mut *self.lock(), vec![cache.clone()]);
        drop(before);
        tracing::debug!(blocks, "the pool was replaced by a larger one");
        Ok(cache)
    }

    /// Makes sure that one pool has at least this many blocks. No block may be in use.
    pub(crate) fn at_least(&self, blocks: usize) -> Result<()> {
        if self.all().iter().all(|cache| cache.pool().blocks() < blocks) {
            self.replaced(blocks)?;
        }
        Ok(())
    }

    /// The sum of `of` over all pools.
    pub(crate) fn sum(&self, of: impl Fn(&KvCache) -> usize) -> usize {
        self.lock().iter().map(of).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<KvCache>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
