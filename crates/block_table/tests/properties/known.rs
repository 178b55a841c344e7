//! Histories that have found defects. Random ones rarely come to some of these states.

use crate::actions::Action;
use crate::config::{Config, Layers, View};
use crate::keeps_every_guarantee;

const NEW: Action = Action::Create { kind: 0, prompt: 0, branch: 0, salts: 0 };

fn config(units: usize, block_size: usize, groups: &[(usize, View)]) -> Config {
    let groups = groups.iter().map(|&(units, view)| Layers { units, view }).collect();
    Config { groups, units, block_size }
}

/// Computes tokens that are known, so that their blocks are cached.
fn compute(table: usize, tokens: usize) -> Action {
    Action::Step { table, reserve: tokens, commit: tokens, known: true, roll_back: true }
}

/// The first group needs the memory of a block that the second group would allocate next.
#[test]
fn memory_that_one_group_gives_back_is_not_missed_by_the_next() {
    let config = config(6, 1, &[(1, View::ALL), (1, View::window(2, 0))]);
    let unknown = Action::Step { table: 0, reserve: 3, commit: 3, known: false, roll_back: true };
    keeps_every_guarantee(config, &[NEW, unknown, compute(0, 1)]).unwrap();
}

/// Cached blocks are evicted for another group, and no block is free otherwise.
#[test]
fn evicted_blocks_give_their_memory_back() {
    let config = config(6, 2, &[(1, View::window(2, 0)), (1, View::window(8, 0))]);
    let all = Action::Reserve { table: 0, tokens: 6 };
    keeps_every_guarantee(config, &[NEW, compute(0, 2), Action::Drop { table: 0 }, NEW, all]).unwrap();
}

/// A large block is evicted for a small one. What is left of its units is not enough for another large block.
#[test]
fn the_rest_of_an_evicted_block_is_counted_once() {
    let config = config(96, 1, &[(1, View::ALL), (5, View::window(2, 0))]);
    let others = Action::Reserve { table: 1, tokens: 7 };
    keeps_every_guarantee(config, &[NEW, compute(0, 15), NEW, others]).unwrap();
}

#[test]
fn a_window_passes_blocks_while_a_block_is_filled() {
    let config = config(60, 3, &[(1, View::ALL), (2, View::window(2, 0))]);
    keeps_every_guarantee(config, &[NEW, compute(0, 9), compute(0, 1)]).unwrap();
}

/// There is room for the first group's blocks, but not for those of all groups.
#[test]
fn a_refused_swap_evicts_nothing() {
    let config = config(9, 1, &[(1, View::ALL), (2, View::window(2, 0))]);
    let (out, others) = (Action::SwapOut { table: 0 }, Action::Reserve { table: 0, tokens: 2 });
    let history = [NEW, compute(0, 2), out, NEW, others, Action::SwapIn { swapped: 0 }];
    keeps_every_guarantee(config, &history).unwrap();
}

/// A block is written in place because there is no room for its copies in all groups. There is room for a part of them:
/// the evictable block that follows it in the first group.
#[test]
fn no_block_stays_cached_without_the_one_before_it() {
    // In the second history a salt begins in the block that follows.
    for salts in [0, 1] {
        let config = config(17, 2, &[(5, View::ALL), (1, View::chunks(4))]);
        let prompt = |prompt| Action::Create { kind: 0, prompt, branch: 0, salts };
        let back = Action::Truncate { table: 0, len: 1 };
        let end = Action::Drop { table: 0 };
        let history = [prompt(4), compute(0, 4), prompt(3), end, Action::Exhaust, back, compute(0, 1)];
        keeps_every_guarantee(config, &history).unwrap();
    }
}
