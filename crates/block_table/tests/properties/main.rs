//! The guarantees of blocks and tables, checked over random histories against a naive model.
//!
//! A pool has one or several groups of layers, which share its budget. Each guarantee holds in every group; a model
//! writes something else in each, so that a slot of another group is noticed.
//!
//! 1. A written token stays readable at its position until it is truncated, the window or the chunk of the group has
//!    passed it or its table is dropped, whatever forks, failures, evictions and other sequences do: two writers never
//!    share a slot, and freed blocks are overwritten at once.
//! 2. A failed request changes nothing: the table, the ref_count of every block and the number of available units are
//!    as before. When too little is available, all that is cached stays cached, too.
//! 3. A table has exactly as many blocks as its tokens need, plus the reserved ones, minus those that a window or a
//!    chunk has passed or that were freed. All groups number them alike. It can go back to a length if nothing that the
//!    next token sees was freed.
//! 4. Every block is free, or evictable, or in use with a ref_count equal to the number of tables that use it.
//! 5. A match has the content that a sequence with these tokens, the same salts and the same window has computed. A salt
//!    may hold for all of the sequence or from a position on. It is never that of another, never what was not committed, never what was computed before a reset. The last of the given
//!    tokens is never matched.
//! 6. Nothing is evicted while there are free blocks: a prefix whose blocks are all cached is matched in full.
//! 7. The stream of events tells what can be matched. Applied in order, the parent of each stored block is stored; no
//!    block is removed before its children unless a sequence has freed it before them; and at the end the same blocks
//!    are stored as in the pool. A stream that begins late leads to the same.
//! 8. A sequence that was swapped out comes back byte for byte.
//! 9. After all tables are dropped, all units are available. As many blocks can be allocated as are available.
//! 10. A match is as long as possible: in whole blocks it is never shorter than the stored blocks allow, according to
//!     the events, and it is never longer. It can end where all blocks that the next token sees are stored in each
//!     group.
//! 11. A look-up uses nothing, and gives exactly what a match and a reservation right after it get and use.
//! 12. Slots that were made writable are in blocks that no other table uses and that are not cached. A table whose
//!     committed tokens may have been overwritten is private from then on: it matches nothing, and no more of its
//!     blocks are cached than before.
//! 13. The groups never have more memory together than the budget. Memory that was given back has any content.
//!
//! `PROPTEST_CASES` sets the number of histories of each test.
//!
//! - `config`: the groups of a pool, and what their tokens see;
//! - `actions`: what happens in a history;
//! - `model`: what a sequence has computed;
//! - `router`: what the events tell;
//! - `world`: the pool and the model, and the checks after every action;
//! - `grow`, `shrink`, `overwrite`: the actions on sequences;
//! - `known`: histories that have found defects.

#![allow(clippy::unwrap_used, clippy::panic)]

mod actions;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod grow;
mod known;
mod model;
mod overwrite;
mod router;
mod shrink;
mod world;

use block_table::{BlockTable, SaltFrom, Window};
use proptest::prelude::*;

use actions::{Action, action};
use config::{Config, all_kinds, config, five_to_one, long_windows, one_window, two_windows, uniform};
use model::{before, in_group, options, salted, salts};
use world::World;

pub(crate) type Check = Result<(), TestCaseError>;

/// Checks every guarantee after each action.
fn keeps_every_guarantee(config: Config, actions: &[Action]) -> Check {
    let (units, each) = (config.units, config.one_of_each());
    let mut world = World::new(config);
    for action in actions {
        world.apply(action)?;
        world.check()?;
    }
    let World { pool, tables, hoard, .. } = world;
    drop((tables, hoard));
    prop_assert_eq!(pool.available(), units);
    drop(pool.allocate(units / each).unwrap());
    for group in 0..pool.groups().len() {
        prop_assert_eq!(pool.check_ref_counts_of_group(group, []), Ok(()));
    }
    Ok(())
}

fn history() -> impl Strategy<Value = Vec<Action>> {
    prop::collection::vec(action(), 1..60)
}

// One test for each kind of pool, so that each gets as many histories as `PROPTEST_CASES` says.
proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_keeps_every_guarantee(config in config(uniform()), actions in history()) {
        keeps_every_guarantee(config, &actions)?;
    }

    #[test]
    fn any_history_of_a_full_group_and_a_window_does(config in config(five_to_one()), actions in history()) {
        keeps_every_guarantee(config, &actions)?;
    }

    #[test]
    fn any_history_of_all_kinds_of_groups_does(config in config(all_kinds()), actions in history()) {
        keeps_every_guarantee(config, &actions)?;
    }

    #[test]
    fn any_history_of_two_windows_does(config in config(two_windows()), actions in history()) {
        keeps_every_guarantee(config, &actions)?;
    }

    #[test]
    fn any_history_of_one_window_does(config in config(one_window()), actions in history()) {
        keeps_every_guarantee(config, &actions)?;
    }

    /// In a pool that never becomes full, a match is as long as the longest common prefix with the full blocks of any
    /// earlier stream of the same salt and window, up to the first block in which salts from a position on differ. It may
    /// end inside a block.
    #[test]
    fn with_room_nothing_is_evicted(
        (block_size, kind_of_pool, chunk) in (1..9usize, 0..4usize, 1..12usize),
        streams in prop::collection::vec((prop::collection::vec(0..2u32, 1..30), 0..4usize, 0..16usize), 1..20),
    ) {
        // The window of a sequence has to be longer than a block, too.
        let options = |kind: usize| {
            let window = Window::new(block_size + 1 + kind).with_sink_tokens(kind % 3);
            if kind < 2 { options(kind) } else { options(kind % 2).window(window) }
        };
        let config = Config { groups: long_windows(kind_of_pool, block_size, chunk), units: 6000, block_size };
        let (pool, slots) = config.pool();
        let mut earlier: Vec<(Vec<u32>, usize, Vec<SaltFrom>)> = vec![];
        for (stream, salt, number) in streams {
            // Some without such salts.
            let salts = salts(number.saturating_sub(4));
            let what = |group: usize, tokens: &[u32]| in_group(group, salted(&salts, tokens) ^ (salt as u64) << 50);
            let mut table = BlockTable::with_options(&pool, &options(salt));
            for SaltFrom { position, salt } in salts.clone() {
                table.salt_from(position, salt).unwrap();
            }
            let matched = table.match_prefix(&stream);
            let full = |other: &[u32]| other.len() / block_size * block_size;
            let common = |other: &[u32]| stream.iter().zip(&other[..full(other)]).take_while(|(a, b)| a == b).count();
            let until_salts = |n: usize, of: &[SaltFrom]| {
                let mut ends = (1..=n.div_ceil(block_size)).map(|block| block * block_size);
                let differs = ends.find(|end| before(of, *end) != before(&salts, *end));
                differs.map_or(n, |end| end - block_size)
            };
            let most = earlier
                .iter()
                .filter(|(_, s, _)| *s == salt)
                .map(|(other, _, of)| common(other).min(until_salts(common(other), of)))
                .max()
                .unwrap_or(0);
            prop_assert_eq!(matched, most.min(stream.len() - 1));
            for (group, slots) in slots.iter().enumerate() {
                for position in 0..matched {
                    if let Some(slot) = table.slot_of_group(group, position) {
                        prop_assert_eq!(slots.get(slot), what(group, &stream[..=position]));
                    }
                }
            }
            table.reserve(stream.len() - matched).unwrap();
            for (group, slots) in slots.iter().enumerate() {
                for position in matched..stream.len() {
                    let slot = table.slot_of_group(group, position).unwrap();
                    slots.write(slot, what(group, &stream[..=position]));
                }
            }
            table.commit_tokens(&stream[matched..]).unwrap();
            earlier.push((stream, salt, salts));
        }
        prop_assert_eq!(pool.stats().evictions, 0);
    }
}
