//! Prefixes of sequences with a window: the blocks of the window suffice to find them, whatever has become of the others.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use block_table::{BlockId, BlockPool, BlockTable, PoolEvent, PrefixKey, Salt, TableOptions, Window};

const BLOCK: usize = 16;

fn windowed(pool: &BlockPool, window: Window) -> BlockTable {
    BlockTable::with_options(pool, &TableOptions::default().window(window))
}

fn compute(table: &mut BlockTable, tokens: &[u32], piece: usize) {
    for piece in tokens.chunks(piece) {
        table.reserve(piece.len()).unwrap();
        table.commit_tokens(piece).unwrap();
    }
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).collect()
}

#[test]
fn evictions_do_not_make_a_living_window_unfindable() {
    let (pool, window, prompt) = (BlockPool::new(128, BLOCK).unwrap(), Window::new(512), tokens(2048));
    let mut own = windowed(&pool, window);
    compute(&mut own, &prompt, 2048);
    let found = || windowed(&pool, window).reuse(&prompt);
    assert_eq!(found(), 2047);
    // One block, and then all that the sequence does not hold itself.
    for taken in [1, 17, pool.available()] {
        drop(pool.take(taken).unwrap());
        assert_eq!(found(), 2047, "{taken} blocks were taken");
        pool.check().unwrap();
    }
    // Of an end before, the window is gone.
    assert_eq!(windowed(&pool, window).reuse(&prompt[..1500]), 0);
    pool.check_held([own.blocks()]).unwrap();
}

#[test]
fn a_prefix_takes_the_blocks_of_its_window() {
    let (window, prompt) = (Window::new(512), tokens(8192));
    for blocks in [512, 400, 128, 64] {
        let pool = BlockPool::new(blocks, BLOCK).unwrap();
        let mut own = windowed(&pool, window);
        compute(&mut own, &prompt, 256);
        // Also when nobody holds it any more, and those who go on where it ends share its window.
        drop(own);
        let mut other = windowed(&pool, window);
        assert_eq!(other.reuse(&prompt), 8191, "{blocks} blocks");
        assert_eq!(other.blocks().len(), 32, "511 tokens before the next one");
        assert_eq!((other.slot(8191 - 512), other.slot(8190).is_some()), (None, true));
        compute(&mut other, &prompt[8191..], 1);
        pool.check_held([other.blocks()]).unwrap();
        let key = PrefixKey::new().window(window);
        assert_eq!((pool.find(&key, &prompt).tokens, pool.find(&PrefixKey::new(), &prompt).tokens), (8191, 0));
    }
}

#[test]
fn what_is_evicted_is_found_again_when_it_was_computed_again() {
    let (pool, window, prompt) = (BlockPool::new(12, BLOCK).unwrap(), Window::new(64), tokens(640));
    let mut own = windowed(&pool, window);
    compute(&mut own, &prompt, 32);
    drop(pool.take(pool.available()).unwrap());
    let found = |n: usize| windowed(&pool, window).reuse(&prompt[..n]);
    assert_eq!((found(640), found(100)), (639, 0));
    // In the place of its tombstones.
    let mut short = windowed(&pool, window);
    compute(&mut short, &prompt[..100], 100);
    assert_eq!((found(100), found(640)), (96, 639));
    pool.check_held([own.blocks(), short.blocks()]).unwrap();
}

#[test]
fn sinks_have_to_be_there_too() {
    let (pool, window, prompt) = (BlockPool::new(40, BLOCK).unwrap(), Window::new(64).with_sinks(20), tokens(320));
    let mut own = windowed(&pool, window);
    compute(&mut own, &prompt, 16);
    drop(pool.take(pool.available()).unwrap());
    let mut other = windowed(&pool, window);
    assert_eq!(other.reuse(&prompt), 319);
    assert_eq!((&other.blocks()[..2], other.gap()), (&own.blocks()[..2], (2, 14)));
    // What was found is what a table of that length holds.
    assert!((0..320).all(|position| other.slot(position).is_some() != (32..256).contains(&position)));
    drop((own, other));
    // The sinks were let go last, and so they are evicted last; without a window's block its end is not found.
    let hoard = pool.take(pool.available() - 3).unwrap();
    assert_eq!(windowed(&pool, window).reuse(&prompt), 32);
    drop(hoard);
}

#[test]
fn a_sequence_joins_on_its_way_what_another_has_computed_through_the_same_window() {
    let (pool, window, prompt) = (BlockPool::new(40, BLOCK).unwrap(), Window::new(64), tokens(640));
    let mut late = windowed(&pool, window);
    compute(&mut late, &prompt[..160], 16);
    let mut own = windowed(&pool, window);
    compute(&mut own, &prompt, 16);
    drop(pool.take(pool.available()).unwrap());
    // Between the two nothing is left.
    assert_eq!(late.reuse(&prompt), 479);
    assert_eq!((late.len(), late.blocks().len()), (639, 4));
    assert_eq!(late.blocks(), &own.blocks()[own.blocks().len() - 4..]);
    compute(&mut late, &prompt[639..], 1);
    pool.check_held([own.blocks(), late.blocks()]).unwrap();
}

#[test]
fn available_is_what_can_be_taken() {
    let (pool, window) = (BlockPool::new(100, BLOCK).unwrap(), Window::new(64));
    let mut own: Vec<_> = (0..3).map(|_| windowed(&pool, window)).collect();
    for (i, table) in own.iter_mut().enumerate() {
        let prompt: Vec<u32> = (0..400).map(|at| at + 1000 * i as u32).collect();
        compute(table, &prompt, 16);
    }
    own.truncate(2);
    // Those who hold what follows do not keep what they have passed.
    let available = pool.available();
    assert_eq!(available, 100 - 2 * 4);
    let all = pool.take(available).unwrap();
    assert_eq!((pool.available(), pool.remembered()), (0, 0));
    assert!(pool.take(1).is_err());
    drop(all);
}

#[test]
fn an_endless_window_leaves_a_bounded_trace() {
    let (pool, window) = (BlockPool::new(8, 4).unwrap(), Window::new(8));
    let mut cold = windowed(&pool, window);
    compute(&mut cold, &tokens(40), 4);
    drop(cold);
    let mut own = windowed(&pool, window);
    let long: Vec<u32> = (0..4000).map(|i| i + 100).collect();
    for (at, piece) in long.chunks(4).enumerate() {
        compute(&mut own, piece, 4);
        // It counts the tombstones, of which there are at most 16 for each block.
        pool.check().unwrap();
        let recent = windowed(&pool, window).reuse(&long[..long.len().min(4 * at + 5)]);
        if at < 100 {
            assert_eq!(recent, 4 * at + 4, "with {at} blocks");
        }
    }
    drop(own);
    assert_eq!(pool.available(), 8);
    // Forgotten whole, and not from the front only: the same tokens are cached anew.
    let mut again = windowed(&pool, window);
    compute(&mut again, &long[..40], 4);
    assert_eq!(windowed(&pool, window).reuse(&long[..41]), 40);
}

#[test]
fn keys_are_not_bytes_that_can_be_made_up() {
    let pool = BlockPool::new(16, 2).unwrap();
    let mut own = windowed(&pool, Window::new(4));
    compute(&mut own, &[1, 2, 3, 4], 4);
    let mut bytes = b"window ".to_vec();
    [4u64, 0, 0].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    let mut thief = BlockTable::with_options(&pool, &TableOptions::default().salt(Salt::new(&bytes)));
    assert_eq!(thief.reuse(&[1, 2, 3]), 0);
    assert_eq!(windowed(&pool, Window::new(5)).reuse(&[1, 2, 3]), 0);
    assert_eq!(windowed(&pool, Window::new(4).with_sinks(1)).reuse(&[1, 2, 3]), 0);
    assert_eq!(windowed(&pool, Window::new(4)).reuse(&[1, 2, 3]), 2);
    let salted = |bytes: &[u8]| TableOptions::default().window(Window::new(4)).salt(Salt::new(bytes));
    assert_eq!(BlockTable::with_options(&pool, &salted(b"")).reuse(&[1, 2, 3]), 0);
    assert_eq!(pool.find(&PrefixKey::new().window(Window::new(4)), &[1, 2, 3]).tokens, 2);
}

#[test]
fn the_key_counts_after_a_block_too() {
    let pool = BlockPool::new(16, 2).unwrap();
    let (own, other) = (PrefixKey::new(), PrefixKey::new().salt(Salt::new(b"other")));
    let mut blocks = pool.take(2).unwrap();
    blocks.store(&own, 0, &[], &[7, 7, 8, 8]);
    let mut first = blocks.share(1);
    assert_eq!(first.reuse(&other, 1, &[8, 8]), 0);
    assert_eq!(first.find(&other, 1, &[8, 8], 2).tokens, 0);
    // Nor is anything cached there: those of the key would find what was computed under another.
    first.grow(1).unwrap();
    assert_eq!(first.store(&other, 1, &[], &[9, 9]), Some(0));
    assert_eq!((pool.find(&own, &[7, 7, 9, 9, 0]).tokens, pool.find(&other, &[7, 7, 9, 9, 0]).tokens), (2, 0));
    first.truncate(1);
    assert_eq!(first.reuse(&own, 1, &[8, 8]), 2);
    // A number that does not fit the list finds nothing.
    assert_eq!(pool.take(1).unwrap().reuse(&own, 5, &[8, 8]), 0);
}

#[test]
fn events_show_the_key_and_leave_out_what_is_gone() {
    let (pool, window) = (BlockPool::new(8, 2).unwrap(), Window::new(5));
    let options = TableOptions::default().window(window).salt(Salt::new(b"s"));
    let key = PrefixKey::new().window(window).salt(Salt::new(b"s"));
    let mut table = BlockTable::with_options(&pool, &options);
    compute(&mut table, &tokens(12), 2);
    drop(pool.take(pool.available()).unwrap());
    // Who begins to listen late is told what leads to the blocks that are there.
    let stored: Vec<(BlockId, Option<BlockId>, Vec<u32>)> = pool
        .listen()
        .try_iter()
        .map(|event| match event {
            PoolEvent::Stored { block, parent, tokens, key: of } if of == key => (block, parent, tokens),
            other => panic!("{other:?}"),
        })
        .collect();
    let [a, b] = [table.blocks()[0], table.blocks()[1]];
    assert_eq!(stored, [(a, None, tokens(10)), (b, Some(a), vec![10, 11])]);
}

#[test]
fn callers_code_runs_without_the_lock() {
    let pool = BlockPool::new(4, 2).unwrap();
    let table = [pool.take(1).unwrap()];
    let lists = table.iter().map(|blocks| {
        assert_eq!(pool.available(), 3);
        &**blocks
    });
    pool.check_held(lists).unwrap();
}

#[test]
fn a_reset_while_others_allocate_loses_nothing() {
    let pool = BlockPool::new(5000, 1).unwrap();
    for _ in 0..20 {
        let mut table = BlockTable::new(&pool);
        compute(&mut table, &tokens(4000), 4000);
        drop(table);
        assert_eq!(pool.remembered(), 4000);
        std::thread::scope(|scope| {
            let allocate = scope.spawn(|| {
                for _ in 0..50 {
                    // At every moment all of them can be had.
                    drop(pool.take(5000).unwrap());
                }
            });
            pool.reset();
            allocate.join().unwrap();
        });
        assert_eq!((pool.remembered(), pool.available()), (0, 5000));
        pool.check_held([]).unwrap();
    }
}

#[test]
fn as_many_blocks_are_taken_as_were_asked_for_when_prefixes_are_forgotten() {
    // More than 16 tombstones for each block: an eviction forgets the whole chain, and what of it was still remembered.
    let pool = BlockPool::new(4, 1).unwrap();
    let mut long = windowed(&pool, Window::new(2));
    compute(&mut long, &tokens(68), 1);
    drop(long);
    let all = pool.take(4).unwrap();
    assert_eq!((all.len(), pool.available()), (4, 0));
    drop(all);
    pool.check_held([]).unwrap();
    for n in 120..140 {
        let (pool, slots) = common::Slots::pool(8, 1);
        let mut live = BlockTable::new(&pool);
        slots.append(&mut live, &[], &[1, 2, 3, 4]);
        let mut long = windowed(&pool, Window::new(2));
        compute(&mut long, &tokens(n), 1);
        drop(long);
        live.reserve(4).unwrap();
        assert_eq!(live.capacity(), 8, "after {n} tokens");
        let held: Vec<u64> = (0..4).map(|position| slots.get(live.slot(position).unwrap())).collect();
        assert_eq!(held, [1, 2, 3, 4].map(|n| common::content(&(1..=n).collect::<Vec<u32>>())));
        pool.check_held([live.blocks()]).unwrap();
        drop(live);
        assert_eq!(pool.available(), 8);
    }
}

#[test]
fn tombstones_are_bounded_whatever_makes_them() {
    let pool = BlockPool::new(2, 1).unwrap();
    let mut own = BlockTable::new(&pool);
    compute(&mut own, &[1, 2], 2);
    own.own(0..1).unwrap(); // there is no room for a copy: the first block is forgotten where it is
    own.release_before(1);
    let mut other = BlockTable::new(&pool);
    compute(&mut other, &[1], 1); // in the place of the first one
    drop(other);
    pool.check_held([own.blocks()]).unwrap();
}

#[test]
fn what_follows_a_block_that_was_not_made_one_s_own_is_not_found() {
    let pool = BlockPool::new(8, 4).unwrap();
    let mut first = BlockTable::new(&pool);
    compute(&mut first, &[1, 2, 3, 4], 4);
    let mut second = BlockTable::new(&pool);
    assert_eq!(second.reuse(&[1, 2, 9, 9, 5]), 2);
    // Not reserved, and so not copied: the block still is what the first sequence has computed.
    second.commit_tokens(&[9, 9]).unwrap();
    compute(&mut second, &[5, 6, 7, 8], 4);
    assert_eq!(pool.find(&PrefixKey::new(), &[1, 2, 3, 4, 5, 6, 7, 8, 0]).tokens, 4);
}
