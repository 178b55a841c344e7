//! Prefix caching, scenario by scenario: what is matched, what is evicted, and what other sequences can see.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use block_table::{
    BlockId, BlockPool, BlockTable, GroupBlock, KvEvent, PrefixKey, ReserveError, Salt, TableOptions, Window,
};
use common::{POISON, Slots, content};

/// A sequence that has computed all of these tokens.
fn computed(pool: &BlockPool, slots: &Slots, tokens: &[u32]) -> BlockTable {
    let mut table = BlockTable::new(pool);
    slots.append(&mut table, &[], tokens);
    table
}

fn tokens(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

fn assert_holds(table: &BlockTable, slots: &Slots, tokens: &[u32]) {
    assert_eq!(table.len(), tokens.len());
    for position in 0..tokens.len() {
        assert_eq!(slots.get(table.slot(position).unwrap()), content(&tokens[..=position]), "position {position}");
    }
}

#[test]
fn the_tail_of_a_sequence_is_evicted_before_its_head() {
    let (pool, slots) = Slots::pool(6, 2);
    let prompt = tokens(0..8);
    drop(computed(&pool, &slots, &prompt)); // four blocks are cached, two are free
    assert_eq!((pool.evictable(), pool.available()), (4, 6));

    for (allocated, matched) in [(2, 7), (3, 6), (4, 4), (5, 2), (6, 0)] {
        let hoard = pool.allocate(allocated).unwrap();
        let mut probe = BlockTable::new(&pool);
        assert_eq!(probe.match_prefix(&prompt), matched, "with {allocated} blocks allocated");
        drop((probe, hoard));
    }
}

#[test]
fn the_least_recently_used_prefix_is_evicted_first_and_a_hit_counts_as_use() {
    let (pool, slots) = Slots::pool(4, 2);
    let prompts = [[1, 1, 9], [2, 2, 9], [3, 3, 9], [4, 4, 9]];
    for prompt in &prompts {
        drop(computed(&pool, &slots, &prompt[..2]));
    }
    let found = |prompt: &[u32]| BlockTable::new(&pool).match_prefix(prompt);
    assert_eq!(found(&prompts[0]), 2); // used again: now the second is the least recently used
    let hoard = pool.allocate(2).unwrap();
    assert_eq!(prompts.each_ref().map(|prompt| found(prompt)), [2, 0, 0, 2]);
    drop(hoard);
}

#[test]
fn a_shared_prefix_outlives_the_tails_of_its_sequences() {
    let (pool, slots) = Slots::pool(5, 2);
    let long = computed(&pool, &slots, &[7, 7, 1, 1]);
    let mut other = BlockTable::new(&pool);
    assert_eq!(other.match_prefix(&[7, 7, 2, 2]), 2);
    slots.append(&mut other, &[7, 7], &[2, 2]);
    assert_eq!(pool.in_use(), 3);
    drop((long, other));
    let hoard = pool.allocate(4).unwrap();
    assert_eq!(BlockTable::new(&pool).match_prefix(&[7, 7, 1, 1]), 2, "the shared block is evicted last");
    drop(hoard);
}

#[test]
fn a_matched_evictable_block_is_not_allocated_again() {
    let (pool, slots) = Slots::pool(6, 2);
    for prompt in [[1, 1], [2, 2], [3, 3]] {
        drop(computed(&pool, &slots, &prompt));
    }
    let mut hit = BlockTable::new(&pool);
    assert_eq!(hit.match_prefix(&[2, 2, 5]), 2); // from the middle of the order of eviction
    let all = pool.allocate(5).unwrap();
    assert!(!all.contains(&hit.blocks()[0]));
    assert!(pool.allocate(1).is_err());
    assert_eq!(slots.get(hit.slot(1).unwrap()), content(&[2, 2]));
}

#[test]
fn an_evicted_block_is_poisoned_and_not_matched() {
    let (pool, slots) = Slots::pool(2, 2);
    drop(computed(&pool, &slots, &[1, 1, 2, 2]));
    let new = pool.allocate(2).unwrap();
    for id in new.iter() {
        assert_eq!([slots.get(id.index() * 2), slots.get(id.index() * 2 + 1)], [POISON; 2]);
    }
    assert_eq!(BlockTable::new(&pool).match_prefix(&[1, 1, 2, 2]), 0);
    drop(new);
    assert_eq!((pool.evictable(), pool.stats().evictions), (0, 2));
    assert_eq!(BlockTable::new(&pool).match_prefix(&[1, 1, 2, 2]), 0);
}

#[test]
fn two_computations_of_one_prefix_end_as_one_copy() {
    let (pool, slots) = Slots::pool(8, 2);
    let prompt = [1, 2, 3, 4, 5];
    // Both start before either has committed anything.
    let (mut a, mut b) = (BlockTable::new(&pool), BlockTable::new(&pool));
    assert_eq!((a.match_prefix(&prompt), b.match_prefix(&prompt)), (0, 0));
    slots.append(&mut a, &[], &prompt);
    assert_eq!(pool.in_use(), 3);
    slots.append(&mut b, &[], &prompt);
    assert_eq!(a.blocks()[..2], b.blocks()[..2]);
    assert_ne!(a.blocks()[2], b.blocks()[2], "the block that is not full is not shared");
    assert_eq!(pool.in_use(), 4);
    slots.append(&mut b, &prompt, &[6]);
    slots.append(&mut a, &prompt, &[7]);
    assert_holds(&a, &slots, &[1, 2, 3, 4, 5, 7]);
    assert_holds(&b, &slots, &[1, 2, 3, 4, 5, 6]);
    pool.check_ref_counts([a.blocks(), b.blocks()]).unwrap();
}

#[test]
fn salt_isolates() {
    let (pool, slots) = Slots::pool(8, 2);
    let table = |salt: &Salt| BlockTable::with_options(&pool, &TableOptions::default().salt(salt.clone()));
    let salts = [Salt::none(), Salt::new(b""), Salt::new(b"adapter")];
    for salt in &salts {
        let mut own = table(salt);
        assert_eq!(own.match_prefix(&[1, 2, 3]), 0, "{salt:?}");
        slots.append(&mut own, &[], &[1, 2]);
    }
    assert_eq!(pool.evictable(), 3);
    for salt in &salts {
        assert_eq!(table(salt).match_prefix(&[1, 2, 3]), 2);
    }
    // A window is part of the prefix key: with it, the same tokens have other keys and values.
    let windowed = TableOptions::default().window(Window::new(4));
    assert_eq!(BlockTable::with_options(&pool, &windowed).match_prefix(&[1, 2, 3]), 0);
    pool.check_ref_counts([]).unwrap();
}

#[test]
fn a_private_sequence_is_neither_cached_nor_matched() {
    let (pool, slots) = Slots::pool(8, 2);
    let private = TableOptions::default().private();
    let mut table = BlockTable::with_options(&pool, &private);
    slots.append(&mut table, &[], &[1, 2]);
    assert_eq!(BlockTable::new(&pool).match_prefix(&[1, 2, 3]), 0);
    drop(computed(&pool, &slots, &[1, 2]));
    assert_eq!(BlockTable::with_options(&pool, &private).match_prefix(&[1, 2, 3]), 0);
    assert_eq!(BlockTable::new(&pool).match_prefix(&[1, 2, 3]), 2);
}

#[test]
fn a_failed_reservation_changes_nothing() {
    let (pool, slots) = Slots::pool(4, 2);
    drop(computed(&pool, &slots, &[1, 1, 2, 2]));
    let mut table = BlockTable::new(&pool);
    assert_eq!(table.match_prefix(&[1, 1, 2, 2, 3]), 4);
    let fork = table.fork();
    let (before, blocks) = (pool.snapshot(), table.blocks().to_vec());
    match table.reserve(5) {
        Err(ReserveError::OutOfBlocks(full)) => assert_eq!((full.requested, full.available), (3, 2)),
        other => panic!("{other:?}"),
    }
    assert_eq!((pool.snapshot(), table.blocks()), (before, &blocks[..]));
    drop(fork);
}

#[test]
fn the_last_prompt_token_is_always_computed() {
    let (pool, slots) = Slots::pool(8, 4);
    let prompt = tokens(0..8);
    drop(computed(&pool, &slots, &prompt));
    for n in 1..=8 {
        let mut table = BlockTable::new(&pool);
        assert_eq!(table.match_prefix(&prompt[..n]), n - 1);
        slots.append(&mut table, &prompt[..n - 1], &prompt[n - 1..n]);
        assert_holds(&table, &slots, &prompt[..n]);
    }
    assert_eq!(BlockTable::new(&pool).match_prefix(&[]), 0);
}

#[test]
fn a_match_may_end_inside_a_block() {
    let (pool, slots) = Slots::pool(8, 4);
    drop(computed(&pool, &slots, &tokens(0..8)));
    let mut table = BlockTable::new(&pool);
    let prompt = [0, 1, 2, 3, 4, 5, 99, 98, 97];
    assert_eq!(table.match_prefix(&prompt), 6);
    slots.append(&mut table, &prompt[..6], &prompt[6..]); // in a copy
    assert_holds(&table, &slots, &prompt);
    let mut original = BlockTable::new(&pool);
    assert_eq!(original.match_prefix(&tokens(0..9)), 8, "the original is still there");
    assert_holds(&original, &slots, &tokens(0..8));
    assert_eq!(pool.stats().copies, 1);

    // Of several continuations, the one with the most tokens in common is matched.
    let mut near = BlockTable::new(&pool);
    assert_eq!(near.match_prefix(&[0, 1, 2, 3, 4, 5, 99, 98, 97]), 8);
    assert_eq!(BlockTable::new(&pool).match_prefix(&[0, 1, 2, 3, 4, 5, 99, 1, 1]), 7);
    assert_eq!(BlockTable::new(&pool).match_prefix(&[0, 1, 2, 3, 4, 50, 99, 1, 1]), 5);
}

#[test]
fn after_a_truncation_a_table_continues_in_a_copy() {
    let (pool, slots) = Slots::pool(4, 4);
    let mut table = computed(&pool, &slots, &tokens(0..8));
    table.truncate(6).unwrap();
    slots.append(&mut table, &tokens(0..6), &[60, 61]);
    assert_holds(&table, &slots, &[0, 1, 2, 3, 4, 5, 60, 61]);
    assert_eq!(BlockTable::new(&pool).match_prefix(&tokens(0..9)), 8, "the truncated block is still cached");
    assert_eq!(BlockTable::new(&pool).match_prefix(&[0, 1, 2, 3, 4, 5, 60, 61, 62]), 8, "the copy is cached too");
}

#[test]
fn without_room_for_a_copy_the_block_is_uncached_and_written_in_place() {
    let (pool, slots) = Slots::pool(2, 4);
    let mut table = computed(&pool, &slots, &tokens(0..8));
    table.truncate(6).unwrap();
    slots.append(&mut table, &tokens(0..6), &[60]);
    assert_holds(&table, &slots, &[0, 1, 2, 3, 4, 5, 60]);
    drop(table);
    assert_eq!(BlockTable::new(&pool).match_prefix(&tokens(0..9)), 4);
    assert_eq!(pool.stats().copies, 0);
}

#[test]
fn a_sequence_with_tokens_can_match_more() {
    let (pool, slots) = Slots::pool(8, 2);
    let prompt = tokens(0..9);
    let mut late = BlockTable::new(&pool);
    slots.append(&mut late, &[], &prompt[..2]);
    let first = computed(&pool, &slots, &prompt);
    assert_eq!(late.match_prefix(&prompt), 6);
    assert_eq!(late.blocks(), &first.blocks()[..4]);
    // Not when its last block is not full.
    slots.append(&mut late, &prompt[..8], &prompt[8..]);
    assert_eq!(late.match_prefix(&tokens(0..20)), 0);
}

#[test]
fn tokens_committed_without_ids_are_not_matched() {
    let (pool, slots) = Slots::pool(8, 2);
    let mut table = BlockTable::new(&pool);
    table.append(3).unwrap();
    slots.append(&mut table, &[0, 0, 0], &[1, 2, 3]);
    assert_eq!(pool.evictable() + BlockTable::new(&pool).match_prefix(&[0, 0, 0, 1, 2, 3]), 0);
    table.truncate(0).unwrap();
    slots.append(&mut table, &[], &[5, 6]);
    assert_eq!(BlockTable::new(&pool).match_prefix(&[5, 6, 7]), 2);
}

#[test]
fn what_was_computed_before_a_reset_is_not_matched_after_it() {
    let (pool, slots) = Slots::pool(16, 2);
    let mut whole = computed(&pool, &slots, &[1, 2]);
    let mut unfinished = computed(&pool, &slots, &[8]);
    let mut swapped = computed(&pool, &slots, &[5, 6]);
    let swapped = swapped.swap_out().unwrap();
    drop(computed(&pool, &slots, &[3, 4]));
    assert_eq!(pool.evictable(), 2);
    pool.reset_prefix_cache();
    assert_eq!((pool.evictable(), pool.in_use()), (0, 2));
    slots.append(&mut whole, &[1, 2], &[3, 4]);
    slots.append(&mut unfinished, &[8], &[9]);
    let back = swapped.swap_in().unwrap();
    for prompt in [[1, 2, 3], [8, 9, 0], [5, 6, 0], [3, 4, 0]] {
        assert_eq!(BlockTable::new(&pool).match_prefix(&prompt), 0, "{prompt:?}");
    }
    assert_holds(&whole, &slots, &[1, 2, 3, 4]);
    assert_holds(&back, &slots, &[5, 6]);
}

#[test]
fn blocks_that_the_window_has_passed_are_free_for_the_next_reservation() {
    let (pool, slots) = Slots::pool(4, 2);
    let options = TableOptions::default().window(Window::new(4).with_sink_tokens(1));
    let mut table = BlockTable::with_options(&pool, &options);
    let mut stream = vec![];
    // The pool has one block for the sink token and three for the window, and the sequence can grow without end.
    for token in 0..100 {
        slots.append(&mut table, &stream, &[token]);
        stream.push(token);
        assert!(table.blocks().len() <= 4);
        for position in (0..1).chain(stream.len().saturating_sub(3)..stream.len()) {
            assert_eq!(slots.get(table.slot(position).unwrap()), content(&stream[..=position]));
        }
    }
    assert_eq!((table.len(), table.slot(50)), (100, None));
    assert_eq!(table.truncate(50).unwrap_err().kept, 96);
    assert_eq!(table.len(), 100);
    table.truncate(1).unwrap();
    assert_eq!((table.len(), table.blocks().len()), (1, 1));
}

#[test]
fn events_report_stored_and_removed_blocks_in_order() {
    let (pool, slots) = Slots::pool(3, 2);
    drop(computed(&pool, &slots, &[1, 2]));
    let mut events = pool.subscribe();
    let salted = TableOptions::default().salt(Salt::new(b"s"));
    let mut table = BlockTable::new(&pool);
    table.match_prefix(&[1, 2, 3, 4, 5]);
    let first = table.blocks()[0];
    slots.append(&mut table, &[1, 2], &[3, 4, 5]);
    let second = table.blocks()[1];
    drop(table);
    let mut other = BlockTable::with_options(&pool, &salted);
    slots.append(&mut other, &[], &[1, 2]);
    let third = other.blocks()[0];
    drop(other);
    drop(pool.allocate(2).unwrap()); // evicts the second block, then the first
    pool.reset_prefix_cache();

    let stored = |block: BlockId, parent: Option<BlockId>, tokens: [u32; 2], salt: &Salt| KvEvent::BlockStored {
        group: 0,
        block,
        parent: parent.map(|block| GroupBlock { group: 0, block }),
        tokens: tokens.to_vec(),
        key: PrefixKey::new().salt(salt.clone()),
        salts: vec![],
    };
    let expected = [
        stored(first, None, [1, 2], &Salt::none()),
        stored(second, Some(first), [3, 4], &Salt::none()),
        stored(third, None, [1, 2], &Salt::new(b"s")),
        KvEvent::BlockRemoved { group: 0, block: second },
        KvEvent::BlockRemoved { group: 0, block: first },
        KvEvent::AllBlocksCleared,
    ];
    let received: Vec<KvEvent> = events.try_iter().collect();
    assert_eq!(received, expected);
    #[cfg(feature = "serde")]
    for event in received {
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(serde_json::from_str::<KvEvent>(&json).unwrap(), event, "{json}");
    }
    drop(pool);
    assert!(events.recv().is_err(), "the stream ends with the pool");
}

#[test]
fn a_receiver_that_does_not_keep_up_begins_again() {
    let (pool, slots) = Slots::pool(4, 2);
    let mut events = pool.subscribe_within(2);
    let mut all = pool.subscribe();
    drop(computed(&pool, &slots, &[1, 2, 3, 4]));
    // Two events wait, and that is not too many.
    assert_eq!(events.recv().as_ref(), Ok(&all.recv().unwrap()));
    assert_eq!(events.try_recv().as_ref(), Ok(&all.recv().unwrap()));
    assert_eq!((events.try_recv().ok(), all.try_recv().ok()), (None, None));

    drop(pool.allocate(4).unwrap()); // evicts both
    drop(computed(&pool, &slots, &[5, 6])); // one too many
    let now = pool.subscribe().try_iter().collect::<Vec<_>>();
    let received: Vec<KvEvent> = events.try_iter().collect();
    assert_eq!(received[0], KvEvent::AllBlocksCleared);
    assert_eq!((received.len(), &received[1..]), (2, &now[..]));
    // A receiver without a limit has it all.
    assert_eq!(all.try_iter().count(), 3);

    // From there on it goes on as before.
    drop(computed(&pool, &slots, &[7, 8]));
    assert_eq!(events.try_iter().collect::<Vec<_>>(), all.try_iter().collect::<Vec<_>>());
    events.begin_again();
    assert_eq!(events.try_iter().count(), 3);
    drop(pool);
    assert!(events.recv().is_err(), "a stream does not keep its pool");
}

#[test]
fn a_scheduler_can_look_up_what_a_prompt_would_take() {
    let (pool, slots) = Slots::pool(8, 2);
    let short = computed(&pool, &slots, &tokens(0..2));
    drop(computed(&pool, &slots, &tokens(0..7)));
    let (before, found) = (pool.snapshot(), pool.lookup_prefix(&PrefixKey::new(), &tokens(0..9)));
    // Two evictable blocks and two new ones.
    assert_eq!((found.tokens, found.in_use, found.evictable, found.blocks), (6, 1, 2, 4));
    let other = pool.lookup_prefix(&PrefixKey::new().salt(Salt::new(b"x")), &tokens(0..9));
    assert_eq!((other.tokens, other.in_use, other.evictable, other.blocks), (0, 0, 0, 5));
    assert_eq!(pool.snapshot(), before, "a look-up changes nothing");
    drop(short);
}

#[test]
fn hits_are_counted() {
    let (pool, slots) = Slots::pool(8, 2);
    drop(computed(&pool, &slots, &tokens(0..6)));
    assert_eq!(BlockTable::new(&pool).match_prefix(&tokens(0..10)), 6);
    assert_eq!(BlockTable::new(&pool).match_prefix(&[9; 4]), 0);
    let stats = pool.stats();
    assert_eq!((stats.queries, stats.queried_tokens, stats.hit_tokens), (2, 9 + 3, 6));
    assert_eq!(stats.hit_rate(), 0.5);
}

#[test]
fn a_swapped_sequence_comes_back_byte_for_byte_and_is_cached_again() {
    let (pool, slots) = Slots::pool(4, 2);
    let mut table = computed(&pool, &slots, &tokens(0..7));
    slots.fail(true);
    assert!(table.swap_out().is_err());
    slots.fail(false);
    assert_holds(&table, &slots, &tokens(0..7));
    let swapped = table.swap_out().unwrap();
    assert_eq!((table.len(), pool.available(), swapped.len(), swapped.bytes()), (0, 4, 7, 4 * 2 * 8));

    let hoard = pool.allocate(1).unwrap();
    assert!(matches!(swapped.swap_in(), Err(ReserveError::OutOfBlocks(_))));
    drop(hoard);
    slots.fail(true);
    assert!(matches!(swapped.swap_in(), Err(ReserveError::Storage(_))));
    assert_eq!(pool.available(), 4);
    slots.fail(false);
    drop(pool.allocate(4).unwrap()); // overwrites every block of the pool
    let mut back = swapped.swap_in().unwrap();
    assert_holds(&back, &slots, &tokens(0..7));
    slots.append(&mut back, &tokens(0..7), &[7]);
    drop(back);
    assert_eq!(BlockTable::new(&pool).match_prefix(&tokens(0..20)), 8);
}
