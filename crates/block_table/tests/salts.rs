//! Salts from a position on: what sequences with images share.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::{HashMap, HashSet};

use block_table::{
    BlockPool, BlockTable, GroupBlock, KvEvent, KvEvents, PoolGroup, PrefixKey, Salt, SaltFrom, SaltTooLate, Span,
    TableOptions, Window,
};

type Salts<'s> = &'s [(usize, &'s str)];

fn salt(bytes: &str) -> Salt {
    Salt::new(bytes.as_bytes())
}

fn add_salts(table: &mut BlockTable, salts: Salts<'_>) {
    for &(position, bytes) in salts {
        table.salt_from(position, salt(bytes)).unwrap();
    }
}

fn salted(pool: &BlockPool, salts: Salts<'_>) -> BlockTable {
    let mut table = BlockTable::new(pool);
    add_salts(&mut table, salts);
    table
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).collect()
}

/// Computes the rest of `prompt`, and checks the pool.
fn compute(table: &mut BlockTable, prompt: &[u32]) {
    table.reserve(prompt.len() - table.len()).unwrap();
    table.commit_tokens(&prompt[table.len()..]).unwrap();
    check(table.pool());
}

/// A sequence with these salts, all of whose tokens are computed.
fn computed(pool: &BlockPool, salts: Salts<'_>, prompt: &[u32]) -> BlockTable {
    let mut table = salted(pool, salts);
    table.match_prefix(prompt);
    compute(&mut table, prompt);
    table
}

/// How many tokens of the prompt a sequence with these salts finds.
fn found(pool: &BlockPool, salts: Salts<'_>, prompt: &[u32]) -> usize {
    let mut table = salted(pool, salts);
    let expected = table.lookup_prefix(prompt).tokens;
    assert_eq!(table.match_prefix(prompt), expected);
    drop(table);
    check(pool);
    expected
}

fn check(pool: &BlockPool) {
    pool.check().unwrap();
}

/// Evicts one block after the other, until none is cached, and checks the pool after each. Returns what `look` sees
/// before and after each.
fn evict_all<T>(pool: &BlockPool, mut look: impl FnMut() -> T) -> Vec<T> {
    let mut seen = vec![look()];
    while pool.evictable() > 0 {
        let free = pool.available() - pool.evictable();
        drop(pool.allocate((free + 1).div_ceil(pool.units_per_block())).unwrap());
        check(pool);
        seen.push(look());
    }
    seen
}

#[test]
fn the_text_before_an_image_is_shared_and_what_follows_only_with_the_same_image() {
    let pool = BlockPool::new(64, 16).unwrap();
    let prompt = tokens(96 + 576 + 40);
    drop(computed(&pool, &[(96, "cat")], &prompt));
    assert_eq!(found(&pool, &[(96, "dog")], &prompt), 96);
    assert_eq!(found(&pool, &[(96, "cat")], &prompt), 704);
    assert_eq!(found(&pool, &[], &prompt), 96);
    // A salt for the whole sequence shares nothing.
    let mut whole = BlockTable::with_options(&pool, &TableOptions::default().salt(salt("cat")));
    assert_eq!(whole.match_prefix(&prompt), 0);
    // Sequences without an image and with another one are found in turn, each by its own kind.
    drop(computed(&pool, &[], &prompt[..200]));
    drop(computed(&pool, &[(96, "dog")], &prompt[..300]));
    assert_eq!(found(&pool, &[], &prompt), 192);
    assert_eq!(found(&pool, &[(96, "dog")], &prompt), 288);
    assert_eq!(found(&pool, &[(96, "cat")], &prompt), 704);
}

#[test]
fn several_images_are_compared_one_by_one() {
    let pool = BlockPool::new(64, 4).unwrap();
    let prompt = tokens(41);
    drop(computed(&pool, &[(8, "a"), (24, "b")], &prompt));
    assert_eq!(found(&pool, &[(8, "a"), (24, "b")], &prompt), 40);
    assert_eq!(found(&pool, &[(8, "a"), (24, "c")], &prompt), 24);
    assert_eq!(found(&pool, &[(8, "a")], &prompt), 24);
    assert_eq!(found(&pool, &[(8, "b"), (24, "b")], &prompt), 8);
    assert_eq!(found(&pool, &[(24, "b")], &prompt), 8);
    // Of several from the same position on, the order counts.
    drop(computed(&pool, &[(0, "x"), (0, "y")], &prompt));
    assert_eq!(found(&pool, &[(0, "x"), (0, "y")], &prompt), 40);
    assert_eq!(found(&pool, &[(0, "y"), (0, "x")], &prompt), 0);
    // They may be added in any order of their positions.
    assert_eq!(found(&pool, &[(24, "b"), (8, "a")], &prompt), 40);
}

#[test]
fn the_same_image_at_another_position_is_not_found() {
    let pool = BlockPool::new(64, 4).unwrap();
    let prompt = vec![7; 33];
    drop(computed(&pool, &[(8, "a")], &prompt));
    for (position, expected) in [(8, 32), (7, 4), (9, 8), (11, 8), (12, 8), (4, 4), (0, 0)] {
        assert_eq!(found(&pool, &[(position, "a")], &prompt), expected, "an image at {position}");
    }
}

#[test]
fn inside_the_block_of_a_salt_only_sequences_with_the_same_salt_match() {
    let pool = BlockPool::new(64, 8).unwrap();
    let prompt = tokens(30);
    drop(computed(&pool, &[(11, "a"), (14, "b")], &prompt));
    assert_eq!(found(&pool, &[(11, "a"), (14, "b")], &prompt), 24);
    for others in [&[][..], &[(11, "a")], &[(11, "a"), (13, "b")], &[(14, "b")], &[(11, "a"), (14, "c")]] {
        assert_eq!(found(&pool, others, &prompt), 8, "{others:?}");
    }
    // With the same salts a match is exact to the token, even before the salts.
    let other_end = [&prompt[..20], &[99; 10]].concat();
    assert_eq!(found(&pool, &[(11, "a"), (14, "b")], &other_end), 20);
    let other_text = [&prompt[..10], &[99; 10]].concat();
    assert_eq!(found(&pool, &[(11, "a"), (14, "b")], &other_text), 10);
    assert_eq!(found(&pool, &[(11, "x")], &other_text), 8);
    // Bytes are compared; an empty salt is one, and none is not.
    drop(computed(&pool, &[(3, "")], &prompt));
    assert_eq!(found(&pool, &[(3, "")], &prompt), 24);
    let mut none = BlockTable::new(&pool);
    none.salt_from(3, Salt::none()).unwrap();
    assert_eq!(none.salts(), []);
    assert_eq!(none.match_prefix(&prompt), 8);
}

#[test]
fn a_salt_can_begin_as_long_as_its_token_is_not_committed() {
    let pool = BlockPool::new(64, 8).unwrap();
    let prompt = tokens(30);
    let mut table = computed(&pool, &[], &prompt[..20]);
    table.reserve(10).unwrap();
    assert_eq!(table.salt_from(19, salt("a")), Err(SaltTooLate { position: 19, len: 20 }));
    assert_eq!(table.salts(), []);
    table.salt_from(20, salt("a")).unwrap();
    table.salt_from(25, salt("b")).unwrap();
    assert_eq!(table.salts().iter().map(|salt| salt.position).collect::<Vec<_>>(), [20, 25]);
    compute(&mut table, &prompt);
    assert_eq!(found(&pool, &[], &prompt), 16);
    assert_eq!(found(&pool, &[(20, "a")], &prompt), 24, "the second salt begins in a block that is not full");
    // A matched token is too late, too.
    let mut other = BlockTable::new(&pool);
    other.match_prefix(&prompt);
    let error = other.salt_from(15, salt("b")).unwrap_err();
    assert_eq!(error.to_string(), "the salts from position 15 on cannot change: 16 tokens are committed or matched");
}

#[test]
fn a_match_continues_after_the_blocks_of_a_table() {
    let pool = BlockPool::new(64, 4).unwrap();
    let prompt = tokens(33);
    drop(computed(&pool, &[(8, "a"), (20, "b")], &prompt));
    let mut table = BlockTable::new(&pool);
    assert_eq!(table.match_prefix(&prompt), 8);
    table.salt_from(8, salt("a")).unwrap();
    assert_eq!(table.match_prefix(&prompt), 12);
    table.salt_from(20, salt("b")).unwrap();
    assert_eq!((table.match_prefix(&prompt), table.len()), (12, 32));
}

#[test]
fn windows_see_across_the_position_of_a_salt() {
    let pool = BlockPool::new(64, 4).unwrap();
    let options = TableOptions::default().window(Window::new(12));
    let prompt = tokens(41);
    let with = |salts: Salts<'_>| {
        let mut table = BlockTable::with_options(&pool, &options);
        add_salts(&mut table, salts);
        table
    };
    let mut first = with(&[(20, "a")]);
    for end in (4..=40).step_by(4).chain([41]) {
        compute(&mut first, &prompt[..end]);
    }
    drop(first);
    let lengths = |salts: Salts<'_>, len: usize| {
        let mut table = with(salts);
        table.match_prefix(&prompt[..len]);
        (table.len(), table.blocks().len())
    };
    // All that the next token sees: three blocks, two of them before the salt.
    assert_eq!(lengths(&[(20, "a")], 25), (24, 3));
    assert_eq!(lengths(&[(20, "b")], 25), (20, 3));
    assert_eq!(lengths(&[], 25), (20, 3));
    assert_eq!(lengths(&[(20, "a")], 41), (40, 3));
    check(&pool);
    let seen = evict_all(&pool, || [(), ()].map(|()| found(&pool, &[], &prompt)));
    assert_eq!(seen.last(), Some(&[0, 0]));
}

#[test]
fn groups_of_layers_share_what_is_before_a_salt() {
    for groups in [
        vec![PoolGroup::new(1), PoolGroup::new(2).span(Window::new(8))],
        vec![PoolGroup::new(2).span(Window::new(8)), PoolGroup::new(1)],
        vec![PoolGroup::new(1).span(Span::chunks(16)), PoolGroup::new(1).span(Window::new(6))],
    ] {
        let pool = BlockPool::of_groups(150, 4, &groups).unwrap();
        let prompt = tokens(45);
        for (salts, expected) in [(&[(16, "a")][..], 0), (&[(16, "b")], 16), (&[(16, "a"), (30, "c")], 28)] {
            let mut table = salted(&pool, salts);
            assert_eq!(table.match_prefix(&prompt), expected, "{salts:?} in {groups:?}");
            check(&pool);
            for end in (table.len() + 1)..=prompt.len() {
                compute(&mut table, &prompt[..end]);
            }
        }
        for salts in [&[(16, "a")][..], &[(16, "b")], &[(16, "a"), (30, "c")]] {
            assert_eq!(found(&pool, salts, &prompt), 44);
            assert_eq!(found(&pool, salts, &[&prompt[..42], &[9, 9]].concat()), 42);
        }
        assert_eq!(found(&pool, &[(16, "x")], &prompt), 16);
        evict_all(&pool, || found(&pool, &[(16, "b")], &prompt));
        assert_eq!(pool.evictable(), 0);
    }
}

#[test]
fn what_follows_a_salt_is_evicted_before_what_is_before_it() {
    let pool = BlockPool::new(12, 4).unwrap();
    let prompt = tokens(17);
    let images: [Salts<'_>; 4] = [&[], &[(8, "a")], &[(8, "b")], &[(9, "a")]];
    let order = [3, 0, 2, 1];
    for at in order {
        drop(computed(&pool, images[at], &prompt));
    }
    assert_eq!(pool.evictable(), 2 + 4 * 2);
    let seen = evict_all(&pool, || images.map(|salts| found(&pool, salts, &prompt)));
    // Never less than what comes before all images, until nothing else is left.
    for all in &seen {
        let shared = 8.min(*all.iter().max().unwrap());
        assert!(all.iter().all(|n| *n >= shared), "{seen:?}");
    }
    assert_eq!((seen.first().unwrap(), seen.last().unwrap()), (&[16; 4], &[0; 4]));
    assert_eq!(seen.len(), 11, "one block at a time");
    drop(computed(&pool, &[(8, "b")], &prompt));
    assert_eq!(found(&pool, &[(8, "b")], &prompt), 16);
}

#[test]
fn a_block_before_a_salt_can_become_a_tombstone_and_come_back() {
    let pool = BlockPool::new(12, 4).unwrap();
    let prompt = tokens(21);
    let (first, second): (Salts<'_>, Salts<'_>) = (&[(2, "t"), (8, "a")], &[(2, "t"), (8, "b")]);
    let mut table = computed(&pool, first, &prompt);
    table.free_before(8);
    check(&pool);
    // The freed blocks are evicted; their nodes stay while blocks after the salt are in use.
    drop(pool.allocate(pool.available()).unwrap());
    check(&pool);
    assert_eq!(found(&pool, first, &prompt), 0);
    // Late subscribers get their tokens with the next block, and the salts that begin there.
    let events: Vec<KvEvent> = pool.subscribe().try_iter().collect();
    assert!(matches!(&events[0], KvEvent::BlockStored { parent: None, tokens, salts, .. }
        if tokens[..] == prompt[..12] && *salts == [SaltFrom { position: 2, salt: salt("t") }, SaltFrom { position: 8, salt: salt("a") }]));
    // Another sequence computes them again.
    let again = computed(&pool, second, &prompt[..13]);
    assert_eq!((found(&pool, first, &prompt), found(&pool, second, &prompt)), (20, 12));
    drop(table);
    check(&pool);
    drop(again);
    let seen = evict_all(&pool, || found(&pool, first, &prompt));
    assert_eq!((seen[0], seen.last().copied()), (20, Some(0)));
    assert_eq!(pool.subscribe().try_iter().count(), 0);
}

#[test]
fn thousands_of_images_after_one_prompt_are_told_apart() {
    let pool = BlockPool::new(10_000, 4).unwrap();
    let prompt = tokens(13);
    let names: Vec<String> = (0..4000).map(|n| format!("image {n}")).collect();
    for name in &names {
        let mut table = salted(&pool, &[(4, name)]);
        table.match_prefix(&prompt);
        table.reserve(prompt.len() - table.len()).unwrap();
        table.commit_tokens(&prompt[table.len()..]).unwrap();
    }
    check(&pool);
    assert_eq!(pool.evictable(), 1 + 2 * 4000);
    for name in names.iter().step_by(97) {
        assert_eq!(found(&pool, &[(4, name)], &prompt), 12);
    }
    assert_eq!(found(&pool, &[(4, "image")], &prompt), 4);
    drop(pool.allocate(10_000).unwrap());
    check(&pool);
    assert_eq!((pool.evictable(), found(&pool, &[(4, "image 7")], &prompt)), (0, 0));
}

/// What a router knows: the salts and tokens of each stored block and of all before it.
#[derive(Default, PartialEq, Debug)]
struct Router(HashMap<GroupBlock, (Vec<SaltFrom>, Vec<u32>)>);

impl Router {
    fn follow(&mut self, events: &mut KvEvents) {
        for event in events.try_iter() {
            match event {
                KvEvent::BlockStored { group, block, parent, tokens, key, salts } => {
                    assert_eq!(key, PrefixKey::new());
                    let mut prefix = parent.map_or_else(Default::default, |parent| self.0[&parent].clone());
                    prefix.1.extend(tokens);
                    prefix.0.extend(salts);
                    assert_eq!(self.0.insert(GroupBlock { group, block }, prefix), None);
                }
                KvEvent::BlockRemoved { group, block } => drop(self.0.remove(&GroupBlock { group, block }).unwrap()),
                KvEvent::AllBlocksCleared => self.0.clear(),
                other => panic!("{other:?}"),
            }
        }
    }

    /// How many tokens, in whole blocks of four, a sequence with these salts finds.
    fn matchable(&self, salts: Salts<'_>, prompt: &[u32]) -> usize {
        let known: HashSet<&(Vec<SaltFrom>, Vec<u32>)> = self.0.values().collect();
        let is_known = |end: &usize| {
            let before = salts.iter().filter(|(position, _)| position < end);
            let of = before.map(|&(position, bytes)| SaltFrom { position, salt: salt(bytes) }).collect();
            known.contains(&(of, prompt[..*end].to_vec()))
        };
        (1..prompt.len().div_ceil(4)).map(|block| block * 4).take_while(is_known).last().unwrap_or(0)
    }
}

#[test]
fn a_router_knows_what_can_be_matched() {
    let pool = BlockPool::new(20, 4).unwrap();
    let (mut router, mut events) = (Router::default(), pool.subscribe());
    let prompt = tokens(29);
    let images: [Salts<'_>; 6] =
        [&[], &[(8, "a")], &[(8, "b")], &[(10, "a")], &[(8, "a"), (19, "c")], &[(0, "a"), (1, "b")]];
    let mut agree = |pool: &BlockPool| {
        router.follow(&mut events);
        for salts in images {
            assert_eq!(router.matchable(salts, &prompt), found(pool, salts, &prompt), "{salts:?}");
        }
        let mut late = Router::default();
        late.follow(&mut pool.subscribe());
        assert_eq!(late, router);
    };
    for (n, salts) in images.into_iter().enumerate() {
        drop(computed(&pool, salts, &prompt[..29 - n]));
        agree(&pool);
    }
    for _ in 0..3 {
        for salts in images.into_iter().rev() {
            drop(computed(&pool, salts, &prompt));
            agree(&pool);
        }
    }
    pool.reset_prefix_cache();
    check(&pool);
    agree(&pool);
    assert_eq!(found(&pool, images[1], &prompt), 0);
    drop(computed(&pool, images[1], &prompt));
    agree(&pool);
    assert_eq!(found(&pool, images[1], &prompt), 28);
}

#[cfg(feature = "serde")]
#[test]
fn events_with_salts_are_serialised() {
    let pool = BlockPool::new(4, 2).unwrap();
    let mut events = pool.subscribe();
    drop(computed(&pool, &[(2, "a")], &tokens(4)));
    let texts: Vec<String> = events
        .try_iter()
        .map(|event| {
            let text = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<KvEvent>(&text).unwrap(), event);
            text
        })
        .collect();
    assert!(!texts[0].contains("salts"));
    assert!(texts[1].contains(r#""salts":[{"position":2,"salt":[97]}]"#), "{}", texts[1]);
}

#[test]
fn forks_have_the_same_salts() {
    let pool = BlockPool::new(64, 4).unwrap();
    let prompt = tokens(33);
    let table = computed(&pool, &[(8, "a"), (18, "b"), (40, "c")], &prompt[..20]);
    let positions = |table: &BlockTable| table.salts().iter().map(|salt| salt.position).collect::<Vec<_>>();
    let mut fork = table.fork();
    assert_eq!(fork.salts(), table.salts());
    compute(&mut fork, &prompt);
    assert_eq!(found(&pool, &[(8, "a"), (18, "b")], &prompt), 32);
    assert_eq!(found(&pool, &[(8, "a")], &prompt), 16);
    for len in [41, 40, 20, 19, 18, 8, 0] {
        let mut fork = table.fork_at(len).unwrap();
        assert_eq!(positions(&fork), [8, 18, 40], "fork at {len}");
        fork.remove_salts_from(20).unwrap();
        assert_eq!(positions(&fork), [8, 18]);
    }
    // A fork from before the second salt continues without it, in a copy of the block.
    let mut other = table.fork_at(18).unwrap();
    other.remove_salts_from(18).unwrap();
    compute(&mut other, &[&prompt[..18], &[9; 10]].concat());
    assert_eq!(found(&pool, &[(8, "a")], &[&prompt[..18], &[9; 10]].concat()), 27);
    assert_eq!(found(&pool, &[(8, "a"), (18, "b")], &prompt), 32);
}

#[test]
fn going_back_to_before_a_salt_keeps_it_until_it_is_removed() {
    let pool = BlockPool::new(64, 4).unwrap();
    let prompt = tokens(25);
    let salts: Salts<'_> = &[(6, "a"), (14, "b"), (30, "c")];
    let mut table = computed(&pool, salts, &prompt);
    table.reserve(10).unwrap();
    table.roll_back();
    assert_eq!(table.salts().len(), 3);
    table.truncate(25).unwrap();
    assert_eq!(table.salts().len(), 3, "no token is dropped");
    table.truncate(10).unwrap();
    assert_eq!(table.salts().len(), 3, "a sequence that is computed again has the same salts");
    compute(&mut table, &prompt);
    assert_eq!(found(&pool, &salts[..2], &prompt), 24);
    table.salt_from(30, Salt::new(b"c")).unwrap();
    assert_eq!(table.salts().len(), 3, "it has this salt already");
    table.truncate(14).unwrap();
    assert_eq!(table.remove_salts_from(13), Err(SaltTooLate { position: 13, len: 14 }));
    table.remove_salts_from(14).unwrap();
    assert_eq!(table.salts().len(), 1);
    // The block was cached under the salt that is gone. It goes on in a copy.
    let text = [&prompt[..14], &[7; 12]].concat();
    compute(&mut table, &text);
    assert_eq!(found(&pool, &[(6, "a")], &text), 24);
    assert_eq!(found(&pool, &[(6, "a"), (14, "b")], &prompt), 24);
    assert_eq!(found(&pool, &[(6, "a"), (14, "b")], &text), 14, "the same text, up to the salt and in the same block");
    assert_eq!(found(&pool, &[(6, "a"), (14, "x")], &text), 12);
    table.truncate(0).unwrap();
    table.remove_salts_from(0).unwrap();
    assert_eq!(table.salts(), []);
    assert_eq!(table.match_prefix(&prompt), 4);
}

#[test]
fn a_window_that_refuses_to_go_back_keeps_the_salts() {
    let pool = BlockPool::new(64, 4).unwrap();
    let mut table = BlockTable::with_options(&pool, &TableOptions::default().window(Window::new(6)));
    add_salts(&mut table, &[(8, "a")]);
    compute(&mut table, &tokens(32));
    table.truncate(4).unwrap_err();
    assert_eq!(table.salts().len(), 1);
}

#[test]
fn a_swapped_sequence_keeps_its_salts() {
    let pool = BlockPool::new(10, 4).unwrap();
    let prompt = tokens(33);
    let salts: Salts<'_> = &[(6, "a"), (18, "b")];
    let mut table = computed(&pool, salts, &prompt[..26]);
    let own = table.salts().to_vec();
    let swapped = table.swap_out().unwrap();
    assert_eq!((table.salts(), table.len()), (&[][..], 0));
    drop(pool.allocate(10).unwrap());
    assert_eq!(found(&pool, salts, &prompt), 0);
    let mut back = swapped.swap_in().unwrap();
    check(&pool);
    assert_eq!((back.salts(), found(&pool, salts, &prompt)), (&own[..], 24));
    assert_eq!(found(&pool, &[], &prompt), 4);
    compute(&mut back, &prompt);
    assert_eq!(found(&pool, salts, &prompt), 32);

    // After going back to before a salt inside a block, the block comes back under the salt that it was cached under.
    back.truncate(17).unwrap();
    back.remove_salts_from(17).unwrap();
    let swapped = back.swap_out().unwrap();
    drop(pool.allocate(10).unwrap());
    back = swapped.swap_in().unwrap();
    assert_eq!((back.salts().len(), back.len()), (1, 17));
    assert_eq!((found(&pool, &[(6, "a")], &prompt), found(&pool, salts, &prompt)), (16, 20));
    let text = [&prompt[..17], &[7; 8]].concat();
    compute(&mut back, &text);
    assert_eq!((found(&pool, &[(6, "a")], &text), found(&pool, salts, &prompt)), (24, 20));
}

#[test]
fn a_private_table_shares_nothing_with_or_without_salts() {
    let pool = BlockPool::new(16, 4).unwrap();
    let prompt = tokens(17);
    drop(computed(&pool, &[(8, "a")], &prompt));
    let mut private = BlockTable::with_options(&pool, &TableOptions::default().private());
    add_salts(&mut private, &[(8, "a")]);
    assert_eq!(private.match_prefix(&prompt), 0);
    let other = [&prompt[..12], &[9; 5]].concat();
    compute(&mut private, &other);
    assert_eq!(found(&pool, &[(8, "a")], &other), 12);
}

#[test]
fn a_look_up_of_a_salted_prompt_tells_what_it_takes() {
    let pool = BlockPool::new(16, 4).unwrap();
    let prompt = tokens(33);
    let first = computed(&pool, &[(8, "a")], &prompt);
    let table = salted(&pool, &[(8, "b")]);
    let found = table.lookup_prefix(&prompt);
    assert_eq!((found.tokens, found.in_use, found.evictable, found.blocks), (8, 2, 0, 7));
    drop(first);
    let found = table.lookup_prefix(&prompt);
    assert_eq!((found.tokens, found.in_use, found.evictable, found.blocks), (8, 0, 2, 9));
    let same = salted(&pool, &[(8, "a")]).lookup_prefix(&prompt);
    assert_eq!((same.tokens, same.evictable, same.blocks), (32, 8, 9));
    // Without salts, in the pool's own look-up.
    assert_eq!(pool.lookup_prefix(&PrefixKey::new(), &prompt).tokens, 8);
}

#[test]
fn two_sequences_that_compute_the_same_image_get_the_same_blocks() {
    let pool = BlockPool::new(32, 4).unwrap();
    let prompt = tokens(21);
    let [mut a, mut b] = [(), ()].map(|()| salted(&pool, &[(5, "a")]));
    let mut c = salted(&pool, &[(5, "c")]);
    for table in [&mut a, &mut b, &mut c] {
        compute(table, &prompt);
    }
    assert_eq!(a.blocks()[..5], b.blocks()[..5]);
    assert_eq!(a.blocks()[0], c.blocks()[0]);
    assert!(a.blocks()[1..].iter().all(|block| !c.blocks().contains(block)));
    pool.check_ref_counts([a.blocks(), b.blocks(), c.blocks()]).unwrap();
}
