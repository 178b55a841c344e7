//! Queries and positions at the edges of what a table holds: the right numbers, or an error that names the position.
//!
//! - A query that sees what a table's window has given back is refused, by every backend and kernel.
//! - Whatever is not refused equals dense attention over what is seen; who sees nothing gets zeros.
//! - A step never gets there: whatever was truncated, a table holds what its next tokens see.
//! - Ranges that end before they start, and positions near the ends of `usize`, are errors and change nothing.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use common::{Random, dense, difference, poison, tensor, ways};
use paged_attention::{Attention, BlockTable, KvCache, KvShape, Part, TableOptions, Window, attend_parts};

const DIM: usize = 16;
const HEADS: usize = 2;
const SHAPE: KvShape = KvShape { layers: 1, kv_heads: 1, head_dim: DIM };
const SCALE: f32 = 0.3;

fn table(cache: &KvCache, window: Option<Window>) -> BlockTable {
    let options = TableOptions::default().private();
    cache.table_with(&window.map_or(options.clone(), |window| options.window(window)))
}

/// Writes `k`, also as values, behind a table's tokens, and commits.
fn append(cache: &KvCache, table: &mut BlockTable, k: &[f32]) {
    let k = tensor(k, 1, DIM, DType::F32);
    let mut step = cache.step();
    step.push(table, &vec![0; k.dims()[0]]).unwrap();
    step.write(0, &k, &k).unwrap();
    step.commit().unwrap();
}

/// Dense attention of the queries from position `at` on, over the positions that `sees(query, position)`.
fn expected(q: &[f32], k: &[f32], at: usize, sees: impl Fn(usize, usize) -> bool) -> Vec<f64> {
    let of_row = |(row, q): (usize, &[f32])| {
        let seen: Vec<usize> = (0..k.len() / DIM).filter(|&position| sees(at + row, position)).collect();
        match seen.is_empty() {
            true => vec![0.0; q.len()],
            false => dense(q, k, k, &seen, 1, DIM, SCALE.into(), |_, _, score| score),
        }
    };
    q.chunks_exact(HEADS * DIM).enumerate().flat_map(of_row).collect()
}

fn numbers(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_equal(got: &Tensor, expected: &[f64], what: &str) {
    let got = numbers(got);
    // `difference` is relative to the largest number, and there may be none but zeros.
    let off = if expected.iter().all(|x| *x == 0.0) {
        got.iter().fold(0f64, |off, x| if x.is_nan() { f64::NAN } else { off.max(f64::from(x.abs())) })
    } else {
        difference(&got, expected)
    };
    assert!(off < 1e-5, "{what}: off by {off}");
}

fn ring(tokens: usize, sinks: usize) -> Window {
    Window::new(tokens).with_sinks(sinks)
}

#[test]
fn a_query_that_sees_what_was_given_back_is_refused() {
    for (way, choose) in ways() {
        let cache = choose(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
        // Every key is 0, so that attention is the mean of the values, which are the positions.
        let mut tables = [table(&cache, Some(Window::new(4)))];
        let (k, v) =
            (Tensor::zeros((9, 1, DIM), DType::F32, &Device::Cpu).unwrap(), Tensor::arange(0f32, 9.0, &Device::Cpu));
        let v = v.unwrap().reshape((9, 1, 1)).unwrap().broadcast_as((9, 1, DIM)).unwrap().contiguous().unwrap();
        let mut step = cache.step();
        step.push(&mut tables[0], &[0; 9]).unwrap();
        step.write(0, &k, &v).unwrap();
        step.commit().unwrap();
        assert_eq!((tables[0].slot(3), tables[0].slot(4).is_some()), (None, true));

        let attention = Attention::new(SCALE);
        let attend = |at: usize, rows: usize, attention: &Attention| {
            let parts = [Part { cache: &cache, tables: &tables, start: 0, end: 9 }];
            let q = Tensor::ones((rows, 1, DIM), DType::F32, &Device::Cpu).unwrap();
            attend_parts(&parts, 0, at, &q, attention)
                .map(|y| numbers(&y).into_iter().step_by(DIM).collect::<Vec<f32>>())
                // Older candles say where an error was made, if they are told to.
                .map_err(|error| error.to_string().lines().take(1).collect::<String>())
        };
        let refused = |at: usize, seen: usize| {
            let held = "which was given back: the window holds what lies from 4 on";
            Err(format!("the query at position {at} sees position {seen}, {held}"))
        };
        assert_eq!(attend(6, 1, &attention), refused(6, 3), "{way}");
        assert_eq!(attend(5, 4, &attention), refused(5, 2), "{way}");
        assert_eq!(attend(0, 1, &attention), refused(0, 0), "{way}");
        assert_eq!(attend(7, 2, &attention), Ok(vec![5.5, 6.5]), "{way}");
        assert_eq!(attend(6, 1, &attention.clone().causal(false)), refused(6, 3), "{way}");
        // A layer that looks less far back sees nothing of it.
        assert_eq!(attend(6, 1, &attention.clone().window(Window::new(3))), Ok(vec![5.0]), "{way}");
        assert_eq!(attend(9, 3, &attention), Ok(vec![7.0, 7.5, 8.0]), "{way}");
        assert_eq!(attend(11, 2, &attention), Ok(vec![8.0, 0.0]), "{way}");
    }
}

#[test]
fn attention_over_any_ring_is_dense_or_refused() {
    for (way, choose) in ways() {
        let mut random = Random::new(11);
        let (mut answered, mut refused) = (0, 0);
        for _ in 0..400 {
            let block_size = [1, 3, 4, 16][random.below(4)];
            let window = ring(1 + random.below(12), random.below(6));
            let cache = choose(KvCache::builder(SHAPE).blocks(80).block_size(block_size)).build().unwrap();
            poison(&cache);
            let start = random.below(2) * 100;
            let mut tables = [table(&cache, Some(window))];
            let mut k = Vec::new();
            for _ in 0..1 + random.below(4) {
                let n = 1 + random.below(20);
                let new = random.numbers(n * DIM);
                append(&cache, &mut tables[0], &new);
                k.extend(new);
                let back = tables[0].len() - random.below(4).min(tables[0].len());
                if tables[0].truncate(back).is_ok() {
                    k.truncate(back * DIM);
                }
            }
            let len = tables[0].len();
            let (end, at, rows) = (random.below(len + 1), random.below(len + 5), 1 + random.below(7));
            let narrower = (random.below(3) == 0).then(|| ring(1 + random.below(12), random.below(6)));
            let causal = random.below(4) > 0;
            let mut attention = Attention::new(SCALE).causal(causal);
            if let Some(window) = narrower {
                attention = attention.window(window);
            }
            let sees = |query: usize, position: usize| {
                let in_window = |window: Window| position < window.sinks() || position + window.tokens() > query;
                (!causal || position <= query) && in_window(window) && narrower.is_none_or(in_window)
            };
            // Of two windows the smaller one counts, and of two numbers of sinks.
            let smaller = narrower
                .map_or(window, |other| ring(window.tokens().min(other.tokens()), window.sinks().min(other.sinks())));
            let sees = |query: usize, position: usize| {
                sees(query, position) && (position < smaller.sinks() || position + smaller.tokens() > query)
            };
            let missing = (at..at + rows)
                .any(|query| (0..end).any(|position| sees(query, position) && tables[0].slot(position).is_none()));
            let parts = [Part { cache: &cache, tables: &tables, start, end: start + end }];
            let q = random.numbers(rows * HEADS * DIM);
            let got = attend_parts(&parts, 0, start + at, &tensor(&q, HEADS, DIM, DType::F32), &attention);
            let what = format!("{way}, {window:?} and {narrower:?}, {at}+{rows} over {end} of {len} in {block_size}");
            match got {
                Ok(got) => {
                    answered += 1;
                    assert!(!missing, "{what}: it sees what was given back");
                    assert_equal(&got, &expected(&q, &k[..end * DIM], at, sees), &what);
                }
                Err(error) => {
                    refused += 1;
                    let error = error.to_string();
                    assert!(missing || end == 0, "{what}: {error}");
                    assert!(error.contains("was given back") || error.contains("hold nothing"), "{what}: {error}");
                }
            }
        }
        assert!(answered > 100 && refused > 50, "{way}: {answered} answered, {refused} refused");
    }
}

#[test]
fn a_step_of_a_ring_sees_only_what_is_held() {
    for (way, choose) in ways() {
        let mut random = Random::new(12);
        for _ in 0..40 {
            let block_size = [1, 3, 4, 16][random.below(4)];
            let window = ring(1 + random.below(9), random.below(5));
            let cache = choose(KvCache::builder(SHAPE).blocks(80).block_size(block_size)).build().unwrap();
            poison(&cache);
            let mut table = table(&cache, Some(window));
            let mut k: Vec<f32> = Vec::new();
            for _ in 0..15 {
                let back = table.len() - random.below(5).min(table.len());
                let truncated = match random.below(3) {
                    0 => table.truncate(back),
                    1 => table.fork_at(back).map(|fork| table = fork),
                    _ => continue,
                };
                if truncated.is_ok() {
                    k.truncate(back * DIM);
                }
                let (at, rows) = (table.len(), 1 + random.below(9));
                k.extend(random.numbers(rows * DIM));
                let q = random.numbers(rows * HEADS * DIM);
                let new = tensor(&k[at * DIM..], 1, DIM, DType::F32);
                let mut step = cache.step();
                step.push(&mut table, &vec![0; rows]).unwrap();
                let got = step.attend(0, &tensor(&q, HEADS, DIM, DType::F32), &new, &new, &Attention::new(SCALE));
                step.commit().unwrap();
                let sees = |query: usize, position: usize| {
                    position <= query && (position < window.sinks() || position + window.tokens() > query)
                };
                let what = format!("{way}, {window:?}, {rows} behind {at} in {block_size}");
                assert_equal(&got.unwrap(), &expected(&q, &k, at, sees), &what);
            }
        }
    }
}

#[test]
fn a_sequence_begins_where_its_first_part_does() {
    for (way, choose) in ways() {
        let cache = choose(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
        let mut tables = [table(&cache, None)];
        let k = Random::new(13).numbers(22 * DIM);
        append(&cache, &mut tables[0], &k);
        tables[0].release_before(11); // position 8 is the first one now
        let q = Random::new(14).numbers(2 * HEADS * DIM);
        let attention = Attention::new(SCALE).window(ring(3, 2));
        let sees =
            |query: usize, position: usize| (8..=query).contains(&position) && (position < 10 || position + 3 > query);
        for start in [0, 100] {
            let parts = [Part { cache: &cache, tables: &tables, start, end: start + 22 }];
            let got = attend_parts(&parts, 0, start + 20, &tensor(&q, HEADS, DIM, DType::F32), &attention);
            assert_equal(&got.unwrap(), &expected(&q, &k, 20, sees), way);
        }
    }
}

#[test]
fn queries_before_a_part_are_refused_where_their_position_matters() {
    for (way, choose) in ways() {
        let cache = choose(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
        let k = Random::new(15).numbers(24 * DIM);
        let mut tables = [[table(&cache, None)], [table(&cache, None)]];
        append(&cache, &mut tables[0][0], &k[..8 * DIM]);
        append(&cache, &mut tables[1][0], &k[8 * DIM..]);
        let [first, second] = &tables;
        let parts = [
            Part { cache: &cache, tables: first, start: 0, end: 8 },
            Part { cache: &cache, tables: second, start: 8, end: 24 },
        ];
        let numbers = Random::new(16).numbers(14 * HEADS * DIM);
        let q = tensor(&numbers, HEADS, DIM, DType::F32);
        let attention = Attention::new(SCALE).causal(false);
        let all = attend_parts(&parts, 0, 2, &q, &attention).unwrap();
        assert_equal(&all, &expected(&numbers, &k, 2, |_, _| true), way);
        for placed in [
            attention.clone().window(Window::new(4)),
            attention.clone().alibi(&Attention::alibi_slopes(HEADS)),
            attention.clone().causal(true),
        ] {
            let error = attend_parts(&parts, 0, 2, &q, &placed).unwrap_err().to_string();
            assert!(error.contains("queries at 2 do not come behind position 8"), "{way}: {error}");
        }
    }
}

/// Numbers at which arithmetic goes wrong.
const EXTREMES: [usize; 8] = [
    0,
    3,
    40_000_000,
    isize::MAX as usize - 1,
    isize::MAX as usize,
    isize::MAX as usize + 1,
    usize::MAX - 1,
    usize::MAX,
];

#[test]
fn extreme_positions_are_refused() {
    for (way, choose) in ways() {
        for window in [None, Some(Window::new(4)), Some(ring(usize::MAX, usize::MAX))] {
            let cache = choose(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
            let mut tables = [table(&cache, window)];
            let k = Random::new(17).numbers(10 * DIM);
            append(&cache, &mut tables[0], &k);
            let first_held = if tables[0].slot(0).is_some() { 0 } else { 4 };
            let held = |range: &Range<usize>| first_held <= range.start && range.end <= 12;
            let new = tensor(&k[..2 * DIM], 1, DIM, DType::F32);
            let q = tensor(&k[..4 * DIM], HEADS, DIM, DType::F32);
            for start in EXTREMES {
                for end in EXTREMES {
                    let range = start..end;
                    let read = cache.read_at(0, &tables[0], range.clone());
                    match read {
                        Ok((k, v)) => {
                            assert!(start == end || (start < end && held(&range)), "{way}: {range:?} was read");
                            assert_eq!((k.dims(), v.dims()), (&[end - start, 1, DIM][..], &[end - start, 1, DIM][..]));
                        }
                        Err(error) => {
                            let what = if end < start { "end before they start" } else { "does not hold" };
                            assert!(error.to_string().contains(what), "{way}: {error}");
                        }
                    }
                    // Parts anywhere, seen from anywhere.
                    for at in EXTREMES {
                        let parts = [Part { cache: &cache, tables: &tables, start, end }];
                        for attention in [
                            Attention::new(SCALE),
                            Attention::new(SCALE).causal(false),
                            Attention::new(SCALE).window(ring(usize::MAX, usize::MAX)),
                            Attention::new(SCALE).alibi(&[0.5; HEADS]),
                        ] {
                            if let Ok(y) = attend_parts(&parts, 0, at, &q, &attention) {
                                let fits = start < end && end - start <= 12 && at <= isize::MAX as usize - 2;
                                assert!(fits && end <= isize::MAX as usize, "{way}: {at} over {range:?}");
                                assert!(numbers(&y).iter().all(|x| x.is_finite()), "{way}: {at} over {range:?}");
                            }
                        }
                    }
                }
                let end = start.saturating_add(2);
                let before = cache.read_at(0, &tables[0], first_held..10).unwrap().0;
                match cache.write_at(0, &mut tables, start, &new, &new) {
                    Ok(()) => {
                        assert!(held(&(start..end)), "{way}: written from {start} on");
                        let (written, _) = cache.read_at(0, &tables[0], start..end).unwrap();
                        assert_eq!(numbers(&written), k[..2 * DIM], "{way}");
                    }
                    Err(error) => {
                        assert!(!held(&(start..end)), "{way}: {error}");
                        let after = cache.read_at(0, &tables[0], first_held..10).unwrap().0;
                        assert_eq!(numbers(&before), numbers(&after));
                    }
                }
            }
        }
    }
}
