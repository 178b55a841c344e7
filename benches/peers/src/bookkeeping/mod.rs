//! Our bookkeeping compared with that of `kvbm-logical`: allocating blocks, matching a prompt's blocks, publishing them
//! (caching them here, registering them there), and two threads at once.
//!
//! Both sides free the blocks inside the measured time. The tokens, and for `kvbm-logical` their hashes, are computed
//! outside of it, as a caller can compute them beforehand; the rows marked `hashing` include its hashing. Ours always
//! gets the tokens and compares them.

use std::hint::black_box;
use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Contender, Race, Record, Rounds};
use kvbm_logical::SequenceHash;

use crate::{is_smoke_test, median};

mod kvbm;
mod ours;
mod prompts;
mod report;
mod threads;

use kvbm::{Backend, Kvbm, NAME as KVBM, hashes};
use ours::Ours;
use prompts::Prompts;
use report::{Comparison, Line, Report, Target, comparisons};
use threads::throughput;

/// Our name in a race.
const OURS: &str = "ours";

/// Tokens per block, on both sides.
const BLOCK_SIZE: usize = 16;

const POOL: usize = 4096;
/// Blocks of a prompt.
const PROMPT: usize = 64;
/// Tokens to match a prompt with: one more than its blocks have, because ours leaves at least one token for the model
/// to compute.
const LOOKED_UP: usize = PROMPT * BLOCK_SIZE + 1;

/// Measures all cases, prints them in a table with the target of each, and adds them to the record.
///
/// # Errors
///
/// If a pool cannot be created, or one of the two sides does not match a prompt that it has cached.
pub fn measure(record: &mut Record) -> Result<()> {
    let mut report = Report::default();
    allocate(&mut report, 1, Target { ratio: Some(3.0), at_most: Some(35.0), ..Target::default() })?;
    allocate(&mut report, PROMPT, Target { ratio: Some(10.0), at_most: Some(4.0), ..Target::default() })?;
    match_in_use(&mut report, Target { at_most: Some(15.0), ..Target::default() })?;
    match_evictable(&mut report, Target { ratio: Some(5.0), at_most: Some(30.0), ..Target::default() })?;
    publish_and_evict(&mut report, Target { ratio: Some(6.0), ..Target::default() })?;
    two_threads(&mut report, Target { at_least: Some(1.0), ..Target::default() })?;
    print!("{report}");
    record.rows.extend(report.rows());
    Ok(())
}

/// Many short rounds, after some in which caches and branch predictors warm up and lists grow to their size.
fn rounds() -> Rounds {
    if is_smoke_test() { Rounds::exactly(2) } else { Rounds::exactly(201).after_warm_up(20) }
}

fn run<const N: usize>(mut contenders: [Contender<'_>; N]) -> Result<Race> {
    Race::run(rounds(), &mut contenders)
}

/// Allocates `n` blocks from an empty pool and frees them.
fn allocate(report: &mut Report, n: usize, target: Target) -> Result<()> {
    let (ours, kvbm) = (Ours::new(POOL)?, Kvbm::new(POOL, Backend::Lru)?);
    // A run is long compared with reading the clock, and short enough to be rarely interrupted.
    let times = 2048_usize.div_ceil(n);
    let race = run([
        Contender::timed(OURS, |()| (0..times).for_each(|_| drop(black_box(ours.allocate(n))))),
        Contender::timed(KVBM, |()| (0..times).for_each(|_| drop(black_box(kvbm.allocate(n))))),
    ])?;
    let case = format!("allocate {n} and free, per block");
    for comparison in comparisons(&race, times * n) {
        report.push(Line::time(&case, comparison, Some(target)));
    }
    Ok(())
}

/// Matches the blocks of a prompt that another sequence uses.
fn match_in_use(report: &mut Report, target: Target) -> Result<()> {
    const TIMES: usize = 32;
    let tokens = Prompts::default().next(LOOKED_UP);
    let hashed = hashes(&tokens);
    let (ours, kvbm) = (Ours::new(POOL)?, Kvbm::new(POOL, Backend::Lru)?);
    let (our_blocks, their_blocks) = (ours.publish(&tokens[..LOOKED_UP - 1]), kvbm.publish(&hashed));
    let available = (ours.available(), kvbm.available());
    ensure!(available == (POOL - PROMPT, POOL - PROMPT), "{available:?} of {POOL} blocks are available");
    let matched = (ours.matches(&tokens), kvbm.matches(&hashed));
    ensure!(matched == (PROMPT, PROMPT), "{matched:?} of {PROMPT} blocks match");

    let race = run([
        Contender::timed(OURS, |()| (0..TIMES).for_each(|_| drop(black_box(ours.matching(black_box(&tokens)))))),
        Contender::timed(KVBM, |()| (0..TIMES).for_each(|_| drop(black_box(kvbm.matching(black_box(&hashed)))))),
        Contender::timed(format!("{KVBM}, hashing"), |()| {
            (0..TIMES).for_each(|_| drop(black_box(kvbm.matching(&hashes(black_box(&tokens))))));
        }),
    ])?;
    for (comparison, target) in comparisons(&race, TIMES * PROMPT).zip([Some(target), None]) {
        report.push(Line::time(&format!("match {PROMPT} in use and drop, per block"), comparison, target));
    }
    drop((our_blocks, their_blocks));
    Ok(())
}

/// Matches the blocks of a prompt that are cached but not in use, and frees them again.
fn match_evictable(report: &mut Report, target: Target) -> Result<()> {
    const TIMES: usize = 32;
    let tokens = Prompts::default().next(LOOKED_UP);
    let hashed = hashes(&tokens);
    let ours = Ours::new(POOL)?;
    drop(ours.publish(&tokens[..LOOKED_UP - 1]));
    let (matched, available) = (ours.matches(&tokens), ours.available());
    ensure!((matched, available) == (PROMPT, POOL), "ours: {matched} blocks match, {available} are available");

    for backend in Backend::ALL {
        let kvbm = Kvbm::new(POOL, backend)?;
        drop(kvbm.publish(&hashed));
        let (matched, available) = (kvbm.matches(&hashed), kvbm.available());
        ensure!(
            (matched, available) == (PROMPT, POOL),
            "{backend:?}: {matched} blocks match, {available} are available"
        );

        let race = run([
            Contender::timed(OURS, |()| (0..TIMES).for_each(|_| drop(black_box(ours.matching(black_box(&tokens)))))),
            Contender::timed(backend.peer(), |()| {
                (0..TIMES).for_each(|_| drop(black_box(kvbm.matching(black_box(&hashed)))));
            }),
        ])?;
        for comparison in comparisons(&race, TIMES * PROMPT) {
            let case = format!("match {PROMPT} evictable and drop, per block");
            report.push(Line::time(&case, comparison, Some(target)));
        }
    }
    Ok(())
}

/// Allocates the blocks of a prompt from a pool in which all blocks are evictable, publishes them, and frees them.
fn publish_and_evict(report: &mut Report, target: Target) -> Result<()> {
    for backend in Backend::ALL {
        publish_and_evict_against(report, backend, false, Some(target))?;
    }
    publish_and_evict_against(report, Backend::Lru, true, None)
}

/// Measures one peer at a time, because the processor's caches do not have room for the memory of several.
fn publish_and_evict_against(
    report: &mut Report,
    backend: Backend,
    hashing: bool,
    target: Option<Target>,
) -> Result<()> {
    // Half the pool per run, for the same reason.
    const TIMES: usize = POOL / PROMPT / 2;
    let mut prompts = Prompts::default();
    let (ours, kvbm) = (Ours::new(POOL)?, Kvbm::new(POOL, backend)?);
    let we_publish = |batch: &Batch| batch.tokens.iter().for_each(|tokens| drop(black_box(ours.publish(tokens))));
    let they_publish = |batch: &Batch| {
        if hashing {
            batch.tokens.iter().for_each(|tokens| drop(black_box(kvbm.publish(&hashes(tokens)))));
        } else {
            batch.hashes.iter().for_each(|hashes| drop(black_box(kvbm.publish(hashes))));
        }
    };
    let matched = |batch: &Batch, at: usize| {
        let one_more = [&batch.tokens[at][..], &[0]].concat();
        (ours.matches(&one_more), kvbm.matches(&batch.hashes[at]))
    };

    let first = Batch::draw(&mut prompts, POOL / PROMPT);
    we_publish(&first);
    they_publish(&first);
    ensure!(matched(&first, 0) == (PROMPT, PROMPT), "a block was evicted before the pool was full");

    let peer = backend.peer() + if hashing { ", hashing" } else { "" };
    let mut last = Batch::default();
    let mut contenders = [Contender::timed(OURS, we_publish), Contender::timed(peer, they_publish)];
    let race = Race::run_with(rounds(), &mut contenders, || {
        last = Batch::draw(&mut prompts, TIMES);
        last.clone()
    })?;
    drop(contenders);
    // The first prompt was matched just before; the second is the oldest.
    let (we_kept, they_kept) = matched(&first, 1);
    ensure!(we_kept < PROMPT && they_kept < PROMPT, "the oldest blocks were not evicted");
    ensure!(matched(&last, TIMES - 1) == (PROMPT, PROMPT), "the newest prompt was not published");
    for comparison in comparisons(&race, TIMES * PROMPT) {
        report.push(Line::time(&format!("allocate {PROMPT}, publish, free, evicting, per block"), comparison, target));
    }
    Ok(())
}

/// New prompts, and their hashes.
#[derive(Default, Clone)]
struct Batch {
    tokens: Vec<Vec<u32>>,
    hashes: Vec<Vec<SequenceHash>>,
}

impl Batch {
    fn draw(prompts: &mut Prompts, n: usize) -> Self {
        let tokens: Vec<_> = (0..n).map(|_| prompts.next(PROMPT * BLOCK_SIZE)).collect();
        let hashes = tokens.iter().map(|tokens| hashes(tokens)).collect();
        Self { tokens, hashes }
    }
}

/// Two threads that repeatedly allocate one block of the same pool and free it: their throughput together, and its
/// ratio to the throughput of one thread alone.
fn two_threads(report: &mut Report, target: Target) -> Result<()> {
    let (rounds, window) =
        if is_smoke_test() { (1, Duration::from_micros(100)) } else { (101, Duration::from_millis(5)) };
    let (ours, kvbm) = (Ours::new(POOL)?, Kvbm::new(POOL, Backend::Lru)?);
    let our_rate = |threads| throughput(threads, window, || drop(black_box(ours.allocate(1))));
    let their_rate = |threads| throughput(threads, window, || drop(black_box(kvbm.allocate(1))));

    let rates: Vec<_> = (0..rounds).map(|_| [our_rate(1), their_rate(1), our_rate(2), their_rate(2)]).collect();
    let middle = |of: fn(&[f64; 4]) -> f64| median(rates.iter().map(of).collect());
    let case = "allocate 1 and free, two threads";
    let comparison = Comparison {
        peer: KVBM.into(),
        ours: middle(|[_, _, ours, _]| 1e9 / ours),
        theirs: middle(|[_, _, _, theirs]| 1e9 / theirs),
        ratio: middle(|[_, _, ours, theirs]| ours / theirs),
    };
    report.push(Line::time(case, comparison, None));
    report.push(Line {
        case: format!("{case}, of one thread's throughput"),
        metric: "scaling",
        unit: "x",
        ours: middle(|[one, _, two, _]| two / one),
        peer: KVBM.into(),
        theirs: middle(|[_, one, _, two]| two / one),
        ratio: middle(|[our_one, their_one, our_two, their_two]| (our_two / our_one) / (their_two / their_one)),
        target: Some(target),
    });
    Ok(())
}
