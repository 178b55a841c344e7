//! Threads on one cache, usually more than cores, with thousands of random actions: inserting, stepping, forking,
//! truncating, swapping and removing sequences, and panicking during a step. At all times every sequence has its own
//! keys, and at the end every block is accounted for.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use candle_core::{Device, Tensor};
use common::Random;
use paged_attention::{
    Attention, BlockTable, KvCache, KvShape, LayerGroup, PushError, SequenceError, SequenceId, Sequences, Window,
};

const THREADS: usize = 8;
/// The number of actions of each thread.
const ACTIONS: usize = 20_000;
/// The maximum, for a thread that goes on because some event has not happened yet.
const MOST_ACTIONS: usize = 1_000_000;
const SHAPE: KvShape = KvShape::new(2, 1, 4);

/// The payload of the panics that a worker causes on purpose.
struct OnPurpose;

/// Events that must all happen for the test to prove something.
#[derive(Debug, Clone, Copy)]
enum Event {
    Joined,
    MatchedPrefix,
    Left,
    Forked,
    Truncated,
    SwappedOut,
    SwappedIn,
    Committed,
    RolledBack,
    Panicked,
    PoolFull,
    Busy,
}

use Event::*;

const EVENTS: [Event; 12] = [
    Joined,
    MatchedPrefix,
    Left,
    Forked,
    Truncated,
    SwappedOut,
    SwappedIn,
    Committed,
    RolledBack,
    Panicked,
    PoolFull,
    Busy,
];

/// How often each event has happened.
#[derive(Default)]
struct Counts([AtomicUsize; EVENTS.len()]);

impl Counts {
    fn add(&self, event: Event) {
        self.0[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn of(&self, event: Event) -> usize {
        self.0[event as usize].load(Ordering::Relaxed)
    }

    fn missing(&self) -> Option<Event> {
        EVENTS.into_iter().find(|&event| self.of(event) == 0)
    }
}

/// The keys of tokens: each number is the token id.
fn keys(tokens: &[u32]) -> Tensor {
    let numbers: Vec<f32> = tokens.iter().flat_map(|&token| [token as f32; 4]).collect();
    Tensor::from_vec(numbers, (tokens.len(), 1, 4), &Device::Cpu).unwrap()
}

/// Asserts that the table has the keys of the first `table.len()` of these tokens, except those that a window has passed.
fn assert_holds(cache: &KvCache, table: &BlockTable, tokens: &[u32]) {
    for layer in 0..SHAPE.layers {
        let freed = table.freed_blocks_of_group(cache.group_of(layer).unwrap());
        let kept = if freed.is_empty() { 0 } else { freed.end * cache.pool().block_size() };
        let (k, _) = cache.read(layer, table, kept..table.len()).unwrap();
        let stored: Vec<f32> = k.narrow(2, 0, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let expected: Vec<f32> = tokens[kept..table.len()].iter().map(|&token| token as f32).collect();
        assert_eq!(stored, expected);
    }
}

/// Runs one step with these sequences. It sometimes drops the step uncommitted, and sometimes panics during it.
fn step(cache: &KvCache, tables: &mut [(&mut BlockTable, &mut Vec<u32>)], random: &mut Random, counts: &Counts) {
    let mut step = cache.step();
    let mut new = vec![];
    let mut pushed = 0;
    for (table, tokens) in tables.iter_mut() {
        tokens.truncate(table.len());
        let n = 1 + random.below(7);
        // Only two different tokens, so that sequences often share prefixes.
        let more: Vec<u32> = (0..n).map(|_| random.below(2) as u32).collect();
        match step.push(table, &more) {
            Ok(()) => {}
            Err(PushError::OutOfBlocks(_)) => {
                counts.add(PoolFull);
                break;
            }
            Err(error) => panic!("{error}"),
        }
        new.extend(&more);
        tokens.extend(more);
        pushed += 1;
    }
    if pushed == 0 {
        return;
    }
    let k = keys(&new);
    let attention = Attention::new(0.5);
    step.attend(0, &k, &k, &k, &attention).unwrap();
    match random.below(10) {
        0 => {
            counts.add(RolledBack);
            return;
        }
        1 => resume_unwind(Box::new(OnPurpose)),
        _ => {}
    }
    step.attend(1, &k, &k, &k, &attention).unwrap();
    step.commit().unwrap();
    counts.add(Committed);
}

#[test]
fn threads_that_panic_during_a_step_leak_nothing() {
    hammer(&KvCache::builder(SHAPE).blocks(60).block_size(4).build().unwrap());
}

#[test]
fn threads_lose_nothing_in_groups_of_layers_either() {
    let groups = || [LayerGroup::new([1], 1, 4), LayerGroup::new([0], 1, 4).window(Window::new(10))];
    // Without poison, the groups give each other memory through the system.
    for poison in [true, false] {
        hammer(&KvCache::builder_of(groups()).blocks(45).block_size(4).poison(poison).build().unwrap());
    }
}

fn hammer(cache: &KvCache) {
    // Where there is a window, a sequence cannot go back behind it.
    let goes_back = cache.groups().all(|group| group.span().is_all());
    let sequences = Sequences::new(cache.pool());
    // The tokens that each sequence should have.
    let known: Mutex<Vec<(SequenceId, Vec<u32>)>> = Mutex::new(vec![]);
    let counts = Counts::default();
    thread::scope(|scope| {
        for t in 0..THREADS {
            let (sequences, known, counts) = (&sequences, &known, &counts);
            scope.spawn(move || {
                let mut random = Random::new(t as u64 + 1);
                for action in 0..MOST_ACTIONS {
                    if action >= ACTIONS && counts.missing().is_none() {
                        break;
                    }
                    // About as many sequences as fill the pool.
                    let pick = {
                        let known = known.lock().unwrap();
                        let many = known.len() > random.below(24);
                        many.then(|| known[random.below(known.len())].0)
                    };
                    let Some(id) = pick else {
                        // A new sequence, whose prompt another sequence may have computed.
                        let prompt: Vec<u32> = (0..random.below(20) + 1).map(|i| (i / 9) as u32 % 2).collect();
                        let mut table = cache.table();
                        if table.match_prefix(&prompt) > 0 {
                            counts.add(MatchedPrefix);
                        }
                        counts.add(Joined);
                        assert_holds(cache, &table, &prompt);
                        let id = sequences.insert(table);
                        known.lock().unwrap().push((id, prompt));
                        continue;
                    };
                    match random.below(12) {
                        0 | 1 => {
                            // The thread that removes the sequence removes its tokens; for other threads it is unknown.
                            if sequences.remove(id).is_ok() {
                                known.lock().unwrap().retain(|(other, _)| *other != id);
                                counts.add(Left);
                            }
                        }
                        2 => {
                            // A fork at a random length, with an id of its own.
                            if let Ok(table) = sequences.check_out(id) {
                                let tokens = current(known, id);
                                let fork = table.fork_at(random.below(table.len() + 1));
                                assert!(fork.is_ok() || !goes_back);
                                drop(table);
                                if let (Some(tokens), Ok(fork)) = (tokens, fork) {
                                    let tokens = tokens[..fork.len()].to_vec();
                                    known.lock().unwrap().push((sequences.insert(fork), tokens));
                                    counts.add(Forked);
                                }
                            }
                        }
                        _ => match sequences.check_out(id) {
                            Ok(mut table) => {
                                // No other thread changes this sequence's tokens while it is checked out.
                                let Some(mut tokens) = current(known, id) else { continue };
                                assert_holds(cache, &table, &tokens);
                                match random.below(6) {
                                    0 => {
                                        let truncated = table.truncate(random.below(30));
                                        assert!(truncated.is_ok() || !goes_back);
                                        counts.add(Truncated);
                                    }
                                    1 => {
                                        let swapped = table.swap_out().unwrap();
                                        counts.add(SwappedOut);
                                        match swapped.swap_in() {
                                            Ok(swapped_in) => {
                                                *table = swapped_in;
                                                counts.add(SwappedIn);
                                            }
                                            Err(_) => tokens.clear(),
                                        }
                                    }
                                    _ => {
                                        let mut other = cache.table();
                                        let mut others = vec![];
                                        let mut tables = [(&mut *table, &mut tokens), (&mut other, &mut others)];
                                        let work = || step(cache, &mut tables, &mut random, counts);
                                        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                                            assert!(panic.is::<OnPurpose>(), "an unexpected panic");
                                            counts.add(Panicked);
                                        }
                                    }
                                }
                                tokens.truncate(table.len());
                                assert_holds(cache, &table, &tokens);
                                set(known, id, tokens);
                            }
                            Err(SequenceError::Busy(_)) => counts.add(Busy),
                            Err(SequenceError::Unknown(_)) => {}
                        },
                    }
                }
            });
        }
    });
    let known = known.into_inner().unwrap();
    let happened = EVENTS.map(|event| (event, counts.of(event)));
    println!("{} sequences left, {happened:?}, {:?}", known.len(), cache.pool().stats());
    assert!(counts.missing().is_none(), "{happened:?}");
    assert_eq!(sequences.len(), known.len());
    let ids: Vec<SequenceId> = known.iter().map(|(id, _)| *id).collect();
    let tables = sequences.check_out_all(ids).unwrap();
    let (pool, groups) = (cache.pool(), 0..cache.groups().len());
    for group in groups.clone() {
        pool.check_ref_counts_of_group(group, tables.iter().map(|table| table.blocks_of_group(group))).unwrap();
    }
    drop(tables);
    drop(sequences);
    for group in groups {
        pool.check_ref_counts_of_group(group, []).unwrap();
    }
    assert_eq!(pool.available(), pool.units());
}

fn current(known: &Mutex<Vec<(SequenceId, Vec<u32>)>>, id: SequenceId) -> Option<Vec<u32>> {
    known.lock().unwrap().iter().find(|(other, _)| *other == id).map(|(_, tokens)| tokens.clone())
}

fn set(known: &Mutex<Vec<(SequenceId, Vec<u32>)>>, id: SequenceId, tokens: Vec<u32>) {
    if let Some(entry) = known.lock().unwrap().iter_mut().find(|(other, _)| *other == id) {
        entry.1 = tokens;
    }
}
