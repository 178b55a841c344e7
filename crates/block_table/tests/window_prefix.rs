//! Prefixes of sequences with a window: the blocks of the sink tokens and of the window suffice to match them, whatever
//! became of the other blocks.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use block_table::{BlockId, BlockPool, BlockTable, KvEvent, PrefixKey, Salt, TableOptions, Window};

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
fn evictions_leave_a_window_in_use_matchable() {
    let (pool, window, prompt) = (BlockPool::new(128, BLOCK).unwrap(), Window::new(512), tokens(2048));
    let mut own = windowed(&pool, window);
    compute(&mut own, &prompt, 2048);
    let found = || windowed(&pool, window).match_prefix(&prompt);
    assert_eq!(found(), 2047);
    // One block, some, and then all that the sequence does not use itself.
    for allocated in [1, 17, pool.available()] {
        drop(pool.allocate(allocated).unwrap());
        assert_eq!(found(), 2047, "{allocated} blocks were allocated");
        pool.check().unwrap();
    }
    // The window of a shorter prefix was evicted.
    assert_eq!(windowed(&pool, window).match_prefix(&prompt[..1500]), 0);
    pool.check_ref_counts([own.blocks()]).unwrap();
}

#[test]
fn a_prefix_takes_the_blocks_of_its_window() {
    let (window, prompt) = (Window::new(512), tokens(8192));
    for blocks in [512, 400, 128, 64] {
        let pool = BlockPool::new(blocks, BLOCK).unwrap();
        let mut own = windowed(&pool, window);
        compute(&mut own, &prompt, 256);
        // The prefix stays cached after its table is dropped, and a sequence that continues it shares its window.
        drop(own);
        let mut other = windowed(&pool, window);
        assert_eq!(other.match_prefix(&prompt), 8191, "{blocks} blocks");
        assert_eq!(other.blocks().len(), 32, "511 tokens before the next one");
        assert_eq!((other.slot(8191 - 512), other.slot(8190).is_some()), (None, true));
        compute(&mut other, &prompt[8191..], 1);
        pool.check_ref_counts([other.blocks()]).unwrap();
        let key = PrefixKey::new().window(window);
        assert_eq!(
            (pool.lookup_prefix(&key, &prompt).tokens, pool.lookup_prefix(&PrefixKey::new(), &prompt).tokens),
            (8191, 0)
        );
    }
}

#[test]
fn an_evicted_prefix_is_matched_again_after_it_was_computed_again() {
    let (pool, window, prompt) = (BlockPool::new(12, BLOCK).unwrap(), Window::new(64), tokens(640));
    let mut own = windowed(&pool, window);
    compute(&mut own, &prompt, 32);
    drop(pool.allocate(pool.available()).unwrap());
    let found = |n: usize| windowed(&pool, window).match_prefix(&prompt[..n]);
    assert_eq!((found(640), found(100)), (639, 0));
    // Its blocks replace the tombstones.
    let mut short = windowed(&pool, window);
    compute(&mut short, &prompt[..100], 100);
    assert_eq!((found(100), found(640)), (96, 639));
    pool.check_ref_counts([own.blocks(), short.blocks()]).unwrap();
}

#[test]
fn sink_tokens_must_be_cached_too() {
    let (pool, window, prompt) =
        (BlockPool::new(40, BLOCK).unwrap(), Window::new(64).with_sink_tokens(20), tokens(320));
    let mut own = windowed(&pool, window);
    compute(&mut own, &prompt, 16);
    drop(pool.allocate(pool.available()).unwrap());
    let mut other = windowed(&pool, window);
    assert_eq!(other.match_prefix(&prompt), 319);
    assert_eq!((&other.blocks()[..2], other.freed_blocks()), (&own.blocks()[..2], 2..16));
    // The table has the same blocks as one of that length which computed them.
    assert!((0..320).all(|position| other.slot(position).is_some() != (32..256).contains(&position)));
    drop((own, other));
    // The blocks of the sink tokens were freed last, so they are evicted last. With a block of the window missing, the
    // prefix that ends there is not matched.
    let hoard = pool.allocate(pool.available() - 3).unwrap();
    assert_eq!(windowed(&pool, window).match_prefix(&prompt), 32);
    drop(hoard);
}

#[test]
fn a_sequence_with_tokens_matches_what_another_has_computed_with_the_same_window() {
    let (pool, window, prompt) = (BlockPool::new(40, BLOCK).unwrap(), Window::new(64), tokens(640));
    let mut late = windowed(&pool, window);
    compute(&mut late, &prompt[..160], 16);
    let mut own = windowed(&pool, window);
    compute(&mut own, &prompt, 16);
    drop(pool.allocate(pool.available()).unwrap());
    // The blocks between the two windows were evicted.
    assert_eq!(late.match_prefix(&prompt), 479);
    assert_eq!((late.len(), late.blocks().len()), (639, 4));
    assert_eq!(late.blocks(), &own.blocks()[own.blocks().len() - 4..]);
    compute(&mut late, &prompt[639..], 1);
    pool.check_ref_counts([own.blocks(), late.blocks()]).unwrap();
}

#[test]
fn as_many_blocks_as_are_available_can_be_allocated() {
    let (pool, window) = (BlockPool::new(100, BLOCK).unwrap(), Window::new(64));
    let mut own: Vec<_> = (0..3).map(|_| windowed(&pool, window)).collect();
    for (i, table) in own.iter_mut().enumerate() {
        let prompt: Vec<u32> = (0..400).map(|at| at + 1000 * i as u32).collect();
        compute(table, &prompt, 16);
    }
    own.truncate(2);
    // Blocks that a window has passed are evictable, although their children are in use.
    let available = pool.available();
    assert_eq!(available, 100 - 2 * 4);
    let all = pool.allocate(available).unwrap();
    assert_eq!((pool.available(), pool.evictable()), (0, 0));
    assert!(pool.allocate(1).is_err());
    drop(all);
}

#[test]
fn an_endless_sequence_with_a_window_leaves_a_bounded_number_of_tombstones() {
    let (pool, window) = (BlockPool::new(8, 4).unwrap(), Window::new(8));
    let mut cold = windowed(&pool, window);
    compute(&mut cold, &tokens(40), 4);
    drop(cold);
    let mut own = windowed(&pool, window);
    let long: Vec<u32> = (0..4000).map(|i| i + 100).collect();
    for (at, piece) in long.chunks(4).enumerate() {
        compute(&mut own, piece, 4);
        // This checks the number of tombstones too: at most 16 for each block.
        pool.check().unwrap();
        let recent = windowed(&pool, window).match_prefix(&long[..long.len().min(4 * at + 5)]);
        if at < 100 {
            assert_eq!(recent, 4 * at + 4, "with {at} blocks");
        }
    }
    drop(own);
    assert_eq!(pool.available(), 8);
    // The chain was dropped as a whole, not only its first nodes: the same tokens are cached again.
    let mut again = windowed(&pool, window);
    compute(&mut again, &long[..40], 4);
    assert_eq!(windowed(&pool, window).match_prefix(&long[..41]), 40);
}

#[test]
fn a_salt_cannot_imitate_the_key_of_a_window() {
    let pool = BlockPool::new(16, 2).unwrap();
    let mut own = windowed(&pool, Window::new(4));
    compute(&mut own, &[1, 2, 3, 4], 4);
    let mut bytes = b"window ".to_vec();
    [4u64, 0, 0].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    let mut thief = BlockTable::with_options(&pool, &TableOptions::default().salt(Salt::new(&bytes)));
    assert_eq!(thief.match_prefix(&[1, 2, 3]), 0);
    assert_eq!(windowed(&pool, Window::new(5)).match_prefix(&[1, 2, 3]), 0);
    assert_eq!(windowed(&pool, Window::new(4).with_sink_tokens(1)).match_prefix(&[1, 2, 3]), 0);
    assert_eq!(windowed(&pool, Window::new(4)).match_prefix(&[1, 2, 3]), 2);
    let salted = |bytes: &[u8]| TableOptions::default().window(Window::new(4)).salt(Salt::new(bytes));
    assert_eq!(BlockTable::with_options(&pool, &salted(b"")).match_prefix(&[1, 2, 3]), 0);
    assert_eq!(pool.lookup_prefix(&PrefixKey::new().window(Window::new(4)), &[1, 2, 3]).tokens, 2);
}

#[test]
fn the_key_must_match_the_block_before_too() {
    let pool = BlockPool::new(16, 2).unwrap();
    let (own, other) = (PrefixKey::new(), PrefixKey::new().salt(Salt::new(b"other")));
    let mut blocks = pool.allocate(2).unwrap();
    blocks.cache(&own, 0, &[], &[7, 7, 8, 8]).unwrap();
    let mut first = blocks.fork(1);
    assert_eq!(first.match_prefix(&other, 1, &[8, 8]), 0);
    assert_eq!(first.lookup_prefix(&other, 1, &[8, 8], 2, None).tokens, 0);
    // Nothing is cached there either: sequences with `own` would match what was computed under `other`.
    first.grow(1).unwrap();
    assert_eq!(first.cache(&other, 1, &[], &[9, 9]), Ok(0));
    assert_eq!(
        (pool.lookup_prefix(&own, &[7, 7, 9, 9, 0]).tokens, pool.lookup_prefix(&other, &[7, 7, 9, 9, 0]).tokens),
        (2, 0)
    );
    first.truncate(1);
    assert_eq!(first.match_prefix(&own, 1, &[8, 8]), 2);
    // A block number that does not fit the list matches nothing.
    assert_eq!(pool.allocate(1).unwrap().match_prefix(&own, 5, &[8, 8]), 0);
}

#[test]
fn events_have_the_key_and_skip_evicted_blocks() {
    let (pool, window) = (BlockPool::new(8, 2).unwrap(), Window::new(5));
    let options = TableOptions::default().window(window).salt(Salt::new(b"s"));
    let key = PrefixKey::new().window(window).salt(Salt::new(b"s"));
    let mut table = BlockTable::with_options(&pool, &options);
    compute(&mut table, &tokens(12), 2);
    drop(pool.allocate(pool.available()).unwrap());
    // A late subscriber receives the whole prefix of each cached block, evicted parents included.
    let stored: Vec<(BlockId, Option<BlockId>, Vec<u32>)> = pool
        .subscribe()
        .try_iter()
        .map(|event| match event {
            KvEvent::BlockStored { block, parent, tokens, key: of, .. } if of == key => {
                (block, parent.map(|parent| parent.block), tokens)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let [a, b] = [table.blocks()[0], table.blocks()[1]];
    assert_eq!(stored, [(a, None, tokens(10)), (b, Some(a), vec![10, 11])]);
}

#[test]
fn callers_code_runs_without_the_lock() {
    let pool = BlockPool::new(4, 2).unwrap();
    let table = [pool.allocate(1).unwrap()];
    let lists = table.iter().map(|blocks| {
        assert_eq!(pool.available(), 3);
        &**blocks
    });
    pool.check_ref_counts(lists).unwrap();
}

#[test]
fn a_reset_while_others_allocate_loses_nothing() {
    let pool = BlockPool::new(5000, 1).unwrap();
    for _ in 0..20 {
        let mut table = BlockTable::new(&pool);
        compute(&mut table, &tokens(4000), 4000);
        drop(table);
        assert_eq!(pool.evictable(), 4000);
        std::thread::scope(|scope| {
            let allocate = scope.spawn(|| {
                for _ in 0..50 {
                    // All blocks can be allocated at every moment.
                    drop(pool.allocate(5000).unwrap());
                }
            });
            pool.reset_prefix_cache();
            allocate.join().unwrap();
        });
        assert_eq!((pool.evictable(), pool.available()), (0, 5000));
        pool.check_ref_counts([]).unwrap();
    }
}

#[test]
fn as_many_blocks_are_allocated_as_requested_when_prefixes_are_dropped() {
    // More than 16 tombstones for each block: an eviction drops the whole chain, including its blocks that are still
    // cached.
    let pool = BlockPool::new(4, 1).unwrap();
    let mut long = windowed(&pool, Window::new(2));
    compute(&mut long, &tokens(68), 1);
    drop(long);
    let all = pool.allocate(4).unwrap();
    assert_eq!((all.len(), pool.available()), (4, 0));
    drop(all);
    pool.check_ref_counts([]).unwrap();
    for n in 120..140 {
        let (pool, slots) = common::Slots::pool(8, 1);
        let mut live = BlockTable::new(&pool);
        slots.append(&mut live, &[], &[1, 2, 3, 4]);
        let mut long = windowed(&pool, Window::new(2));
        compute(&mut long, &tokens(n), 1);
        drop(long);
        live.reserve(4).unwrap();
        assert_eq!(live.capacity(), 8, "after {n} tokens");
        let contents: Vec<u64> = (0..4).map(|position| slots.get(live.slot(position).unwrap())).collect();
        assert_eq!(contents, [1, 2, 3, 4].map(|n| common::content(&(1..=n).collect::<Vec<u32>>())));
        pool.check_ref_counts([live.blocks()]).unwrap();
        drop(live);
        assert_eq!(pool.available(), 8);
    }
}

#[test]
fn tombstones_are_bounded_however_they_arise() {
    let pool = BlockPool::new(2, 1).unwrap();
    let mut own = BlockTable::new(&pool);
    compute(&mut own, &[1, 2], 2);
    own.make_writable(0..1).unwrap(); // there is no room for a copy: the first block is uncached in place
    own.free_before(1);
    let mut other = BlockTable::new(&pool);
    compute(&mut other, &[1], 1); // replaces the tombstone of the first block
    drop(other);
    pool.check_ref_counts([own.blocks()]).unwrap();
}

#[test]
fn what_follows_a_block_that_was_not_made_writable_is_not_cached() {
    let pool = BlockPool::new(8, 4).unwrap();
    let mut first = BlockTable::new(&pool);
    compute(&mut first, &[1, 2, 3, 4], 4);
    let mut second = BlockTable::new(&pool);
    assert_eq!(second.match_prefix(&[1, 2, 9, 9, 5]), 2);
    // `reserve` was not called, so the block was not copied: it is still cached for the first sequence's tokens.
    second.commit_tokens(&[9, 9]).unwrap();
    compute(&mut second, &[5, 6, 7, 8], 4);
    assert_eq!(pool.lookup_prefix(&PrefixKey::new(), &[1, 2, 3, 4, 5, 6, 7, 8, 0]).tokens, 4);
}
