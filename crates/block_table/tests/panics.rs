//! A storage that panics leaves no block in two tables, leaks none, and the table that was at work can go on.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block_pool::BlockStorage;
use block_table::{BlockId, BlockPool, BlockTable, PoolGroup, PrefixKey, StorageError, Window};

const COPY: usize = 1;
const POISON: usize = 2;

/// Panics in the operation that `which` names.
#[derive(Clone, Default)]
struct Panics(Arc<AtomicUsize>);

impl Panics {
    /// Runs `work` while an operation of the storage panics. Returns whether it did.
    fn during(&self, which: usize, work: impl FnOnce()) -> bool {
        self.0.store(which, Ordering::Relaxed);
        let done = catch_unwind(AssertUnwindSafe(work));
        self.0.store(0, Ordering::Relaxed);
        done.is_err()
    }

    fn operate(&self, which: usize) -> Result<(), StorageError> {
        assert_ne!(self.0.load(Ordering::Relaxed), which, "the storage's panic");
        Ok(())
    }
}

impl BlockStorage for Panics {
    fn copy(&self, _: BlockId, _: BlockId) -> Result<(), StorageError> {
        self.operate(COPY)
    }

    fn read(&self, _: BlockId, _: &mut Vec<u8>) -> Result<(), StorageError> {
        Ok(())
    }

    fn write(&self, _: BlockId, _: &[u8]) -> Result<(), StorageError> {
        Ok(())
    }

    fn bytes_per_block(&self) -> usize {
        0
    }

    fn poisons(&self) -> bool {
        true
    }

    fn poison(&self, _: &[BlockId]) -> Result<(), StorageError> {
        self.operate(POISON)
    }
}

/// A pool of two groups: one that sees all tokens, and one with a window of 8 tokens. Blocks have 4 tokens.
fn pool() -> (BlockPool, Panics) {
    let storage = Panics::default();
    let groups = [PoolGroup::new(1), PoolGroup::new(1).span(Window::new(8))];
    let groups = groups.map(|group| (group, Box::new(storage.clone()) as Box<dyn BlockStorage>));
    (BlockPool::with_groups(60, 4, groups).unwrap(), storage)
}

fn check<'t>(pool: &BlockPool, tables: impl IntoIterator<Item = &'t BlockTable>) {
    let tables: Vec<&BlockTable> = tables.into_iter().collect();
    for group in 0..2 {
        pool.check_ref_counts_of_group(group, tables.iter().map(|table| table.blocks_of_group(group))).unwrap();
    }
}

#[test]
fn freeing_blocks_is_done_even_if_the_storage_panics() {
    let (pool, storage) = pool();
    let mut table = BlockTable::new(&pool);
    table.append(8).unwrap();
    assert!(storage.during(POISON, || table.truncate(0).unwrap()));
    assert_eq!((table.len(), table.blocks().len(), pool.available()), (0, 0, 60));
    check(&pool, [&table]);

    // A window that moves on, and the end of a sequence.
    table.append(8).unwrap();
    assert!(storage.during(POISON, || table.append(8).unwrap()));
    check(&pool, [&table]);
    assert!(storage.during(POISON, || drop(table)));
    assert_eq!(pool.available(), 60);
    check(&pool, []);
}

#[test]
fn a_copy_that_panics_leaves_all_groups_alike() {
    let (pool, storage) = pool();
    let mut table = BlockTable::new(&pool);
    table.append(12).unwrap();
    // The fork frees the last of these blocks in the group with the window, so only the other group has to copy it.
    let mut fork = table.fork();
    fork.append(12).unwrap();
    table.truncate(11).unwrap();
    let before = [0, 1].map(|group| table.blocks_of_group(group).to_vec());
    assert!(storage.during(COPY, || table.reserve(1).unwrap()));
    assert_eq!([0, 1].map(|group| table.blocks_of_group(group).to_vec()), before);
    check(&pool, [&table, &fork]);
    table.reserve(8).unwrap();
    assert!((11..19).all(|at| [0, 1].iter().all(|&group| table.slot_of_group(group, at).is_some())));
    check(&pool, [&table, &fork]);
}

#[test]
fn after_a_panic_no_block_is_cached_under_other_tokens() {
    let (pool, storage) = pool();
    let compute = |tokens: &[u32]| {
        let mut table = BlockTable::new(&pool);
        table.reserve(tokens.len()).unwrap();
        table.commit_tokens(tokens).unwrap();
        table
    };
    let first = compute(&[1, 2, 3, 4]);
    let mut table = compute(&[1, 2]);
    table.reserve(6).unwrap();
    // The block that becomes full is cached already, so its duplicate is freed.
    assert!(storage.during(POISON, || table.commit_tokens(&[3, 4, 5]).unwrap()));
    check(&pool, [&first, &table]);
    table.commit_tokens(&[6, 7, 8]).unwrap();
    table.append(1).unwrap();
    let found = |prompt: &[u32]| pool.lookup_prefix(&PrefixKey::new(), prompt).tokens;
    assert_eq!(found(&[1, 2, 3, 4, 1, 2, 6, 7, 9]), 4);
    assert_eq!(found(&[1, 2, 3, 4, 1, 2, 6, 7, 8, 9]), 4);
    drop((first, table));
    check(&pool, []);
}
