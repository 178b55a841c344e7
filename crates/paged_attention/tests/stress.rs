//! More threads than cores on one cache, thousands of actions: joining, stepping, forking, truncating, swapping, leaving,
//! and panicking in mid-step. At the end every block is accounted for, and all along every sequence holds its own tokens.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use candle_core::{Device, Tensor};
use common::Random;
use paged_attention::{Attention, BlockTable, KvCache, KvShape, PushError, SequenceError, SequenceId, Sequences};

const THREADS: usize = 8;
/// What each thread does, and goes on to do at most while something has not happened yet.
const ACTIONS: usize = 20_000;
const MOST_ACTIONS: usize = 1_000_000;
const SHAPE: KvShape = KvShape { layers: 2, kv_heads: 1, head_dim: 4 };

/// What a worker throws on purpose.
struct OnPurpose;

/// What has to happen for the test to prove something.
#[derive(Debug, Clone, Copy)]
enum Event {
    Joined,
    FoundAPrefix,
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
    FoundAPrefix,
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

/// How often each of them has happened.
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

/// The keys that a sequence's tokens leave behind, and its tokens, which are few different ones so that prefixes meet.
fn keys(tokens: &[u32]) -> Tensor {
    let numbers: Vec<f32> = tokens.iter().flat_map(|&token| [token as f32; 4]).collect();
    Tensor::from_vec(numbers, (tokens.len(), 1, 4), &Device::Cpu).unwrap()
}

/// The table holds these tokens, as far as it says.
fn assert_holds(cache: &KvCache, table: &BlockTable, tokens: &[u32]) {
    for layer in 0..SHAPE.layers {
        let (k, _) = cache.keys_and_values(table, layer).unwrap();
        let held: Vec<f32> = k.narrow(2, 0, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let expected: Vec<f32> = tokens[..table.len()].iter().map(|&token| token as f32).collect();
        assert_eq!(held, expected);
    }
}

/// One step with a few of the sequences. Panics in the middle of it now and then.
fn step(cache: &KvCache, tables: &mut [(&mut BlockTable, &mut Vec<u32>)], random: &mut Random, counts: &Counts) {
    let mut step = cache.step();
    let mut new = vec![];
    let mut pushed = 0;
    for (table, tokens) in tables.iter_mut() {
        tokens.truncate(table.len());
        let n = 1 + random.below(7);
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
fn threads_that_panic_in_mid_step_lose_nothing() {
    let cache = KvCache::builder(SHAPE).blocks(60).block_size(4).build().unwrap();
    let sequences = Sequences::new(cache.pool());
    // The tokens of each sequence, known beside the cache.
    let known: Mutex<Vec<(SequenceId, Vec<u32>)>> = Mutex::new(vec![]);
    let counts = Counts::default();
    thread::scope(|scope| {
        for t in 0..THREADS {
            let (cache, sequences, known, counts) = (&cache, &sequences, &known, &counts);
            scope.spawn(move || {
                let mut random = Random::new(t as u64 + 1);
                for action in 0..MOST_ACTIONS {
                    if action >= ACTIONS && counts.missing().is_none() {
                        break;
                    }
                    // As many sequences as fill the pool, but not more.
                    let pick = {
                        let known = known.lock().unwrap();
                        let many = known.len() > random.below(24);
                        many.then(|| known[random.below(known.len())].0)
                    };
                    let Some(id) = pick else {
                        // A new sequence with a prompt that others may have computed.
                        let prompt: Vec<u32> = (0..random.below(20) + 1).map(|i| (i / 9) as u32 % 2).collect();
                        let mut table = cache.table();
                        if table.reuse(&prompt) > 0 {
                            counts.add(FoundAPrefix);
                        }
                        counts.add(Joined);
                        assert_holds(cache, &table, &prompt);
                        let id = sequences.insert(table);
                        known.lock().unwrap().push((id, prompt));
                        continue;
                    };
                    match random.below(12) {
                        0 | 1 => {
                            // Whoever removes it forgets it; others find it unknown.
                            if sequences.remove(id).is_ok() {
                                known.lock().unwrap().retain(|(other, _)| *other != id);
                                counts.add(Left);
                            }
                        }
                        2 => {
                            // A fork at any length, under a name of its own.
                            if let Ok(taken) = sequences.take(id) {
                                let tokens = current(known, id);
                                let fork = taken.fork_at(random.below(taken.len() + 1)).unwrap();
                                drop(taken);
                                if let Some(tokens) = tokens {
                                    let tokens = tokens[..fork.len()].to_vec();
                                    known.lock().unwrap().push((sequences.insert(fork), tokens));
                                    counts.add(Forked);
                                }
                            }
                        }
                        _ => match sequences.take(id) {
                            Ok(mut taken) => {
                                // Nobody else writes this sequence's tokens while it is taken.
                                let Some(mut tokens) = current(known, id) else { continue };
                                assert_holds(cache, &taken, &tokens);
                                match random.below(6) {
                                    0 => {
                                        taken.truncate(random.below(30)).unwrap();
                                        counts.add(Truncated);
                                    }
                                    1 => {
                                        let swapped = taken.swap_out().unwrap();
                                        counts.add(SwappedOut);
                                        match swapped.swap_in() {
                                            Ok(table) => {
                                                *taken = table;
                                                counts.add(SwappedIn);
                                            }
                                            Err(_) => tokens.clear(),
                                        }
                                    }
                                    _ => {
                                        let mut other = cache.table();
                                        let mut others = vec![];
                                        let mut tables = [(&mut *taken, &mut tokens), (&mut other, &mut others)];
                                        let work = || step(cache, &mut tables, &mut random, counts);
                                        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                                            assert!(panic.is::<OnPurpose>(), "a panic that nobody ordered");
                                            counts.add(Panicked);
                                        }
                                    }
                                }
                                tokens.truncate(taken.len());
                                assert_holds(cache, &taken, &tokens);
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
    let tables = sequences.take_all(ids).unwrap();
    cache.pool().check_held(tables.iter().map(|table| table.blocks())).unwrap();
    drop(tables);
    drop(sequences);
    cache.pool().check_held([]).unwrap();
    assert_eq!(cache.pool().available(), 60);
}

fn current(known: &Mutex<Vec<(SequenceId, Vec<u32>)>>, id: SequenceId) -> Option<Vec<u32>> {
    known.lock().unwrap().iter().find(|(other, _)| *other == id).map(|(_, tokens)| tokens.clone())
}

fn set(known: &Mutex<Vec<(SequenceId, Vec<u32>)>>, id: SequenceId, tokens: Vec<u32>) {
    if let Some(place) = known.lock().unwrap().iter_mut().find(|(other, _)| *other == id) {
        place.1 = tokens;
    }
}
