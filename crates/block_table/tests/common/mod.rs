//! A storage that records what was written to each slot, overwrites freed and released blocks with poison, and fails on
//! command.

#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

pub(crate) mod memory_tier;
pub(crate) mod sequence;

use std::sync::{Arc, Barrier, Mutex};

use block_pool::BlockStorage;
use block_table::{BlockId, BlockPool, BlockTable, PoolGroup, StorageError};

/// The content of a slot that must not be read.
pub(crate) const POISON: u64 = u64::MAX;

#[derive(Clone)]
pub(crate) struct Slots(Arc<Mutex<Inner>>);

struct Inner {
    written: Vec<u64>,
    /// Which blocks have memory: those that were written after they were last released.
    has_memory: Vec<bool>,
    block_size: usize,
    poisons: bool,
    fails: bool,
    /// Who waits twice before the next read, and twice after it.
    pause: Option<Arc<Barrier>>,
}

impl Inner {
    fn overwrite(&mut self, id: BlockId) {
        let start = id.index() * self.block_size;
        self.written[start..start + self.block_size].fill(POISON);
    }
}

impl Slots {
    fn new(blocks: usize, block_size: usize) -> Self {
        let (written, has_memory) = (vec![0; blocks * block_size], vec![false; blocks]);
        Self(Arc::new(Mutex::new(Inner { written, has_memory, block_size, poisons: true, fails: false, pause: None })))
    }

    pub(crate) fn pool(blocks: usize, block_size: usize) -> (BlockPool, Slots) {
        let slots = Slots::new(blocks, block_size);
        (BlockPool::with_storage(blocks, block_size, slots.clone()).unwrap(), slots)
    }

    /// A pool of several groups, and the slots of each.
    pub(crate) fn pool_of_groups(units: usize, block_size: usize, groups: &[PoolGroup]) -> (BlockPool, Vec<Slots>) {
        let slots: Vec<_> = groups.iter().map(|group| Slots::new(units / group.units, block_size)).collect();
        let storages = slots.iter().map(|slots| Box::new(slots.clone()) as Box<dyn BlockStorage>);
        let groups = groups.iter().copied().zip(storages);
        (BlockPool::with_groups(units, block_size, groups).unwrap(), slots)
    }

    /// Sets whether the pool's copies, reads and writes of blocks fail from now on.
    pub(crate) fn fail(&self, fails: bool) {
        self.0.lock().unwrap().fails = fails;
    }

    /// The next read of a block waits twice at the barrier before it begins, and twice after it.
    pub(crate) fn pause_next_read(&self) -> Arc<Barrier> {
        let barrier = Arc::new(Barrier::new(2));
        self.0.lock().unwrap().pause = Some(barrier.clone());
        barrier
    }

    pub(crate) fn fails(&self) -> bool {
        self.0.lock().unwrap().fails
    }

    pub(crate) fn write(&self, slot: usize, what: u64) {
        let mut inner = self.0.lock().unwrap();
        let block = slot / inner.block_size;
        inner.has_memory[block] = true;
        inner.written[slot] = what;
    }

    /// How many blocks have memory.
    pub(crate) fn with_memory(&self) -> usize {
        self.0.lock().unwrap().has_memory.iter().filter(|has| **has).count()
    }

    pub(crate) fn get(&self, slot: usize) -> u64 {
        self.0.lock().unwrap().written[slot]
    }

    /// Writes what a model would write for `tokens` after `before`, and commits them.
    pub(crate) fn append(&self, table: &mut BlockTable, before: &[u32], tokens: &[u32]) {
        table.reserve(tokens.len()).unwrap();
        let all = [before, tokens].concat();
        for position in before.len()..all.len() {
            self.write(table.slot(position).unwrap(), content(&all[..=position]));
        }
        table.commit_tokens(tokens).unwrap();
    }
}

/// What a model writes for the last of these tokens: it depends on all of them.
pub(crate) fn content(tokens: &[u32]) -> u64 {
    tokens.iter().fold(17, |hash, &token| (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3)) >> 1
}

impl BlockStorage for Slots {
    fn copy(&self, from: BlockId, to: BlockId) -> Result<(), StorageError> {
        let mut inner = self.0.lock().unwrap();
        if inner.fails {
            return Err(StorageError::new("set to fail"));
        }
        let size = inner.block_size;
        let start = from.index() * size;
        inner.written.copy_within(start..start + size, to.index() * size);
        inner.has_memory[to.index()] = true;
        Ok(())
    }

    fn read(&self, id: BlockId, bytes: &mut Vec<u8>) -> Result<(), StorageError> {
        let pause = self.0.lock().unwrap().pause.take();
        let wait = || {
            if let Some(barrier) = &pause {
                barrier.wait();
                barrier.wait();
            }
        };
        wait();
        let inner = self.0.lock().unwrap();
        if inner.fails {
            return Err(StorageError::new("set to fail"));
        }
        let start = id.index() * inner.block_size;
        bytes.extend(inner.written[start..start + inner.block_size].iter().flat_map(|slot| slot.to_le_bytes()));
        drop(inner);
        wait();
        Ok(())
    }

    fn write(&self, id: BlockId, bytes: &[u8]) -> Result<(), StorageError> {
        let mut inner = self.0.lock().unwrap();
        if inner.fails {
            return Err(StorageError::new("set to fail"));
        }
        let start = id.index() * inner.block_size;
        for (i, slot) in bytes.chunks_exact(8).enumerate() {
            inner.written[start + i] = u64::from_le_bytes(slot.try_into().unwrap());
        }
        inner.has_memory[id.index()] = true;
        Ok(())
    }

    fn bytes_per_block(&self) -> usize {
        self.0.lock().unwrap().block_size * 8
    }

    /// Memory that comes back from the system may have any content.
    fn release(&self, ids: &[BlockId]) {
        let mut inner = self.0.lock().unwrap();
        for id in ids {
            inner.overwrite(*id);
            inner.has_memory[id.index()] = false;
        }
    }

    fn poisons(&self) -> bool {
        self.0.lock().unwrap().poisons
    }

    fn poison(&self, ids: &[BlockId]) -> Result<(), StorageError> {
        let mut inner = self.0.lock().unwrap();
        for id in ids {
            inner.overwrite(*id);
            inner.has_memory[id.index()] = true;
        }
        Ok(())
    }
}
