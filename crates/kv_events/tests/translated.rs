//! What a pool does, as routers see it.

#![allow(clippy::unwrap_used, clippy::panic)]

use block_pool::{BlockPool, PoolGroup, Salt, Window};
use block_table::{BlockTable, TableOptions};
use kv_events::{Event, Medium, SpecKind, Translator};

/// Computes a sequence of these tokens.
fn compute(pool: &BlockPool, options: &TableOptions, tokens: std::ops::Range<u32>) -> BlockTable {
    let mut table = BlockTable::with_options(pool, options);
    let tokens: Vec<u32> = tokens.collect();
    let matched = table.match_prefix(&tokens);
    table.reserve(tokens.len() - matched).unwrap();
    table.commit_tokens(&tokens[matched..]).unwrap();
    table
}

/// The names, parent, tokens and extra keys of a stored event.
type Stored = (Vec<u64>, Option<u64>, Vec<u32>, Option<Vec<Option<Vec<String>>>>);

fn stored(event: &Event) -> Stored {
    match event.clone() {
        Event::BlockStored { block_hashes, parent_block_hash, token_ids, extra_keys, .. } => {
            (block_hashes, parent_block_hash, token_ids, extra_keys)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chain_is_one_event_and_names_stay_the_same() {
    let pool = BlockPool::new(8, 2).unwrap();
    let (mut events, mut translator) = (pool.subscribe(), Translator::of(&pool).medium(Medium::Cpu));
    let plain = TableOptions::default();
    drop(compute(&pool, &plain, 0..7));
    let first = translator.translate(events.try_iter());
    let [event] = &first[..] else { panic!("{first:?}") };
    let (names, parent, tokens, keys) = stored(event);
    assert_eq!((names.len(), parent, tokens, keys), (3, None, (0..6).collect(), None));

    // A longer sequence goes on after the last name.
    drop(compute(&pool, &plain, 0..9));
    let more = translator.translate(events.try_iter());
    let (fourth, parent, tokens, _) = stored(&more[0]);
    assert_eq!((fourth.len(), parent, tokens), (1, Some(names[2]), vec![6, 7]));

    // Eviction names what is gone, the last first; the same tokens get the same names again.
    drop(pool.allocate(6).unwrap());
    let removed = translator.translate(events.try_iter());
    let gone = vec![fourth[0], names[2]];
    assert_eq!(removed, [Event::BlockRemoved { block_hashes: gone, medium: Medium::Cpu, group_idx: None }]);
    drop(compute(&pool, &plain, 0..9));
    let again = translator.translate(events.try_iter());
    assert_eq!((stored(&again[0]).0, stored(&again[0]).1), (vec![names[2], fourth[0]], Some(names[1])));

    pool.reset_prefix_cache();
    assert_eq!(translator.translate(events.try_iter()), [Event::AllBlocksCleared {}]);
    drop(compute(&pool, &plain, 0..3));
    assert_eq!(stored(&translator.translate(events.try_iter())[0]).0, names[..1]);
}

#[test]
fn salts_are_extra_keys() {
    let pool = BlockPool::new(8, 2).unwrap();
    let (mut events, mut translator) = (pool.subscribe(), Translator::of(&pool));
    let mut names = Vec::new();
    for (salt, text) in [(&b"tenant"[..], "tenant"), (&[0xff, 1], "0xff01")] {
        drop(compute(&pool, &TableOptions::default().salt(Salt::new(salt)), 0..5));
        let events = translator.translate(events.try_iter());
        let (own, _, tokens, keys) = stored(&events[0]);
        // Only the first block: those after it have it through their parent.
        assert_eq!((tokens, keys), (vec![0, 1, 2, 3], Some(vec![Some(vec![text.to_owned()]), None])));
        names.extend(own);
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 4, "the same tokens under other salts are other blocks");
}

#[test]
fn groups_have_their_number_and_kind() {
    let window = PoolGroup::new(1).span(Window::new(4));
    let pool = BlockPool::of_groups(32, 2, &[PoolGroup::new(1), window]).unwrap();
    let (mut events, mut translator) = (pool.subscribe(), Translator::of(&pool));
    drop(compute(&pool, &TableOptions::default(), 0..5));
    let events = translator.translate(events.try_iter());
    let mut groups = [vec![], vec![]];
    for event in &events {
        match event {
            Event::BlockStored { group_idx: Some(group), kv_cache_spec_kind, kv_cache_spec_sliding_window, .. } => {
                let expected = [(Some(SpecKind::FullAttention), None), (Some(SpecKind::SlidingWindow), Some(4))];
                assert_eq!((*kv_cache_spec_kind, *kv_cache_spec_sliding_window), expected[*group]);
                groups[*group].extend(stored(event).0);
            }
            other => panic!("{other:?}"),
        }
    }
    // The same tokens have the same name in each group, as in vLLM.
    assert_eq!((groups[0].len(), &groups[0]), (2, &groups[1]));
}

#[test]
fn a_translator_that_lost_events_clears_all() {
    let pool = BlockPool::new(8, 2).unwrap();
    let (mut events, mut translator) = (pool.subscribe_within(3), Translator::of(&pool));
    let plain = TableOptions::default();
    drop(compute(&pool, &plain, 0..4));
    let names = stored(&translator.translate(events.try_iter())[0]).0;
    // Evicts both blocks, and stores three others: two events too many.
    drop(pool.allocate(8).unwrap());
    drop(compute(&pool, &plain, 10..16));
    let after = translator.translate(events.try_iter());
    assert_eq!(after[0], Event::AllBlocksCleared {});
    let (others, parent, tokens, _) = stored(&after[1]);
    assert_eq!((after.len(), others.len(), parent, tokens), (2, 3, None, (10..16).collect()));
    // What is stored again has the names that it had.
    drop(compute(&pool, &plain, 0..4));
    let again = translator.translate(events.try_iter());
    assert_eq!((stored(&again[0]).0, again.len()), (names, 1));
}

#[test]
fn blocks_after_removed_ones_keep_their_names() {
    let pool = BlockPool::new(16, 2).unwrap();
    let (mut events, mut translator) = (pool.subscribe(), Translator::of(&pool));
    let mut table = BlockTable::with_options(&pool, &TableOptions::default().window(Window::new(2)));
    // A salt in the second block, which the window passes; then the first two blocks are evicted.
    table.salt_from(3, Salt::new(b"image")).unwrap();
    for tokens in [[0, 1], [2, 3], [4, 5], [6, 7]] {
        table.reserve(2).unwrap();
        table.commit_tokens(&tokens).unwrap();
    }
    let stored_at_once = translator.translate(events.try_iter());
    let keys: Vec<_> = stored_at_once.iter().flat_map(|event| stored(event).3.unwrap_or_default()).collect();
    assert!(keys.contains(&Some(vec!["image".to_owned()])), "{stored_at_once:?}");
    let free = pool.available() - pool.evictable();
    let all = pool.allocate(free + 2).unwrap();
    let removed = translator.translate(events.try_iter());
    let [Event::BlockRemoved { block_hashes: removed, .. }] = &removed[..] else { panic!("{removed:?}") };
    // A subscriber that comes now is told of them in the event of the next block.
    events.begin_again();
    let after = translator.translate(events.try_iter());
    let (_, parent, tokens, keys) = stored(&after[1]);
    assert_eq!((removed.len(), parent, tokens, keys), (2, Some(removed[1]), vec![4, 5, 6, 7], None));
    drop((all, table));
}
