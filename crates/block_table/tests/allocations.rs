//! The bookkeeping of a decode step allocates no memory: reserving, committing, caching and matching blocks, and
//! creating, forking and dropping tables.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use block_table::{BlockPool, BlockTable};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it is; counting touches no memory of it.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above, and the memory is from there.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1]))), 1);
}

#[test]
fn decode_steps_do_not_allocate() {
    for block_size in [16, 32] {
        let pool = BlockPool::new(4096, block_size).unwrap();
        // Eight sequences of different lengths, whose lists have room for the blocks to come.
        let mut tables: Vec<BlockTable> = (0..8u32)
            .map(|i| {
                let mut table = BlockTable::new(&pool);
                let prompt: Vec<u32> = (0..1000 + i).map(|at| at * 8 + i).collect();
                table.reserve(2 * prompt.len()).unwrap();
                table.commit_tokens(&prompt).unwrap();
                table.roll_back();
                table
            })
            .collect();
        let steps = 4 * block_size as u32;
        let counted = allocations(|| {
            for step in 0..steps {
                for (i, table) in tables.iter_mut().enumerate() {
                    table.reserve(1).unwrap();
                    table.commit_tokens(&[step * 8 + i as u32]).unwrap();
                }
            }
        });
        assert_eq!(counted, 0, "in {steps} steps of blocks of {block_size}");
        assert!(tables.iter().all(|table| table.len() >= 1000 + steps as usize));
    }
}

#[test]
fn a_short_sequence_is_created_and_dropped_without_allocating() {
    let pool = BlockPool::new(64, 16).unwrap();
    let prompt: Vec<u32> = (0..100).collect();
    let mut first = BlockTable::new(&pool);
    first.reserve(100).unwrap();
    first.commit_tokens(&prompt).unwrap();
    let counted = allocations(|| {
        let mut table = BlockTable::new(&pool);
        assert_eq!(table.match_prefix(&prompt), 96);
        table.reserve(4).unwrap();
        table.commit_tokens(&prompt[96..]).unwrap();
        let fork = table.fork();
        drop((table, fork));
    });
    assert_eq!(counted, 0);
}
