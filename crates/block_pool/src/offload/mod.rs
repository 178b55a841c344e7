//! Blocks go to a tier when they are evicted, or as soon as they are cached.
//!
//! - this file: what a host starts, and what it can ask of it;
//! - `queue`: what waits for the tier, within limits;
//! - `thread`: the thread that stores it.
//!
//! Under the pool's lock a block only gets its *lineage*, which names its content: the path of its tokens, shared with
//! the blocks before it. An evicted block is copied by the thread that has evicted it, before it is used for anything
//! else. A block that is written through is read in place, without keeping it from being evicted: what was read counts
//! only if the block is still cached afterwards.

mod queue;
mod thread;

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::prefix::Lineage;
use crate::{BlockId, BlockPool, GroupBlock, OffloadError, Tier};

pub(crate) use queue::Queue;

/// A block that was evicted and has its old content.
#[derive(Debug)]
pub(crate) struct Evictee {
    pub(crate) group: usize,
    pub(crate) id: BlockId,
    pub(crate) lineage: Arc<Lineage>,
}

/// A block that is cached and is to be stored.
#[derive(Debug)]
pub(crate) struct WrittenThrough {
    pub(crate) block: GroupBlock,
    pub(crate) lineage: Arc<Lineage>,
}

/// What goes to a tier, and how much may wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffloadOptions {
    max_staged_bytes: usize,
    write_through: bool,
}

impl Default for OffloadOptions {
    /// Evicted blocks, with a staging buffer of 256 MiB.
    fn default() -> Self {
        Self { max_staged_bytes: 256 << 20, write_through: false }
    }
}

impl OffloadOptions {
    /// The most bytes of evicted blocks that wait for the tier. Evicted blocks for which there is no room are dropped,
    /// and counted. With 0, no evicted block is stored.
    #[must_use]
    pub fn max_staged_bytes(self, bytes: usize) -> Self {
        Self { max_staged_bytes: bytes, ..self }
    }

    /// Whether blocks are stored as soon as they are cached, so that they outlive a process that is killed. They need no
    /// room in the staging buffer.
    #[must_use]
    pub fn write_through(self, write_through: bool) -> Self {
        Self { write_through, ..self }
    }
}

/// What has become of the blocks that were to go to a tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OffloadStats {
    /// Blocks that the tier did not have.
    pub stored: u64,
    /// Blocks that it had.
    pub already: u64,
    /// Evicted blocks that were dropped, because the staging buffer had no room.
    pub dropped: u64,
    /// Blocks that were not written through, because too many waited. They may still be stored when they are evicted.
    pub skipped: u64,
    /// Blocks that could not be read, or that the tier could not store.
    pub failed: u64,
    /// Bytes in the staging buffer at this moment.
    pub staged_bytes: usize,
    /// Blocks that wait for the tier at this moment.
    pub waiting: usize,
}

/// A thread that stores blocks of a pool in a tier. When this is dropped, it first stores what waits, and then ends.
#[derive(Debug)]
pub struct Offload {
    pool: BlockPool,
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

impl BlockPool {
    /// Starts a thread that stores blocks in a tier: those that are evicted, and with [`OffloadOptions::write_through`]
    /// also all that become cached. Call this before the first sequence: what is cached already, and what follows it in a
    /// prefix, is not stored.
    ///
    /// A block is not stored again once the tier has got it, also not after it has left the tier.
    ///
    /// The thread that evicts a block copies it to the staging buffer. No thread that uses the pool waits for the tier.
    ///
    /// # Errors
    ///
    /// [`OffloadError`] when blocks of this pool go to a tier already, or no thread can be started.
    pub fn offload_to(&self, tier: Arc<dyn Tier>, options: &OffloadOptions) -> Result<Offload, OffloadError> {
        let queue = Arc::new(Queue::new(options.max_staged_bytes, options.write_through));
        if !self.ledger().start_offload(&queue) {
            return Err(OffloadError::Twice);
        }
        // From here on, dropping it ends what was started.
        let mut offload = Offload { pool: self.clone(), queue: queue.clone(), thread: None };
        let pool = self.clone();
        let thread = std::thread::Builder::new().name("kv-offload".into());
        let thread = thread.spawn(move || thread::run(&pool, &*tier, &queue)).map_err(OffloadError::Thread)?;
        offload.thread = Some(thread);
        Ok(offload)
    }
}

impl Offload {
    /// Waits until nothing waits for the tier.
    pub fn flush(&self) {
        self.queue.wait_until_idle();
    }

    /// What has become of the blocks.
    pub fn stats(&self) -> OffloadStats {
        self.queue.stats()
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        self.queue.close();
        if let Some(thread) = self.thread.take() {
            // A panic of the tier has been reported by the thread.
            let _ = thread.join();
        }
        // Last: what waits is written through by its lineage.
        let left = self.pool.ledger().end_offload();
        drop(left);
    }
}
