//! Queries and positions at the limits of what a table has slots for: the right numbers, or an error that names the
//! position.
//!
//! - A query that sees a position which a table's window has freed is an error, with every backend and kernel.
//! - Every other result equals dense attention over the positions that are seen. A query that sees none gets zeros.
//! - A step never fails this way: whatever was truncated, a table keeps the positions that its next tokens see.
//! - Ranges that end before they start, and positions near the limits of `usize`, are errors and change nothing.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use common::{Random, backends, dense, difference, poison, tensor};
use paged_attention::{Attention, BlockTable, KvCache, KvShape, Segment, TableOptions, Window, attend_segments};

const DIM: usize = 16;
const HEADS: usize = 2;
const SHAPE: KvShape = KvShape::new(1, 1, DIM);
const SCALE: f32 = 0.3;

fn table(cache: &KvCache, window: Option<Window>) -> BlockTable {
    let options = TableOptions::default().private();
    cache.table_with(&window.map_or(options.clone(), |window| options.window(window)))
}

/// Appends tokens whose keys and values are both `k` to a table, and commits them.
fn append(cache: &KvCache, table: &mut BlockTable, k: &[f32]) {
    let k = tensor(k, 1, DIM, DType::F32);
    let mut step = cache.step();
    step.push(table, &vec![0; k.dims()[0]]).unwrap();
    step.write(0, &k, &k).unwrap();
    step.commit().unwrap();
}

/// Dense attention of the queries from position `at` on, each over the positions for which `sees(query, position)` is
/// true.
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
    // `difference` divides by the largest number of the reference, which is zero here.
    let off = if expected.iter().all(|x| *x == 0.0) {
        got.iter().fold(0f64, |off, x| if x.is_nan() { f64::NAN } else { off.max(f64::from(x.abs())) })
    } else {
        difference(&got, expected)
    };
    assert!(off < 1e-5, "{what}: off by {off}");
}

fn window_of(tokens: usize, sink_tokens: usize) -> Window {
    Window::new(tokens).with_sink_tokens(sink_tokens)
}

#[test]
fn a_query_that_sees_a_freed_position_is_refused() {
    for (name, configure) in backends() {
        let cache = configure(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
        // Every key is 0, so attention is the mean of the values, and the value of a token is its position.
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
            let segments = [Segment { cache: &cache, tables: &tables, start: 0, end: 9 }];
            let q = Tensor::ones((rows, 1, DIM), DType::F32, &Device::Cpu).unwrap();
            attend_segments(&segments, 0, at, &q, attention)
                .map(|y| numbers(&y).into_iter().step_by(DIM).collect::<Vec<f32>>())
                // Older versions of candle append a backtrace, if backtraces are enabled.
                .map_err(|error| error.to_string().lines().take(1).collect::<String>())
        };
        let refused = |at: usize, seen: usize| {
            let kept = "which was freed: the window has kept the positions from 4 on";
            Err(format!("the query at position {at} sees position {seen}, {kept}"))
        };
        assert_eq!(attend(6, 1, &attention), refused(6, 3), "{name}");
        assert_eq!(attend(5, 4, &attention), refused(5, 2), "{name}");
        assert_eq!(attend(0, 1, &attention), refused(0, 0), "{name}");
        assert_eq!(attend(7, 2, &attention), Ok(vec![5.5, 6.5]), "{name}");
        assert_eq!(attend(6, 1, &attention.clone().causal(false)), refused(6, 3), "{name}");
        // A layer with a smaller window sees no freed position.
        assert_eq!(attend(6, 1, &attention.clone().window(Window::new(3))), Ok(vec![5.0]), "{name}");
        assert_eq!(attend(9, 3, &attention), Ok(vec![7.0, 7.5, 8.0]), "{name}");
        assert_eq!(attend(11, 2, &attention), Ok(vec![8.0, 0.0]), "{name}");
    }
}

#[test]
fn attention_over_any_window_is_dense_or_refused() {
    for (name, configure) in backends() {
        let mut random = Random::new(11);
        let (mut answered, mut refused) = (0, 0);
        for _ in 0..400 {
            let block_size = [1, 3, 4, 16][random.below(4)];
            let window = window_of(1 + random.below(12), random.below(6));
            let cache = configure(KvCache::builder(SHAPE).blocks(80).block_size(block_size)).build().unwrap();
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
            let narrower = (random.below(3) == 0).then(|| window_of(1 + random.below(12), random.below(6)));
            let causal = random.below(4) > 0;
            let mut attention = Attention::new(SCALE).causal(causal);
            if let Some(window) = narrower {
                attention = attention.window(window);
            }
            let sees = |query: usize, position: usize| {
                let in_window = |window: Window| position < window.sink_tokens() || position + window.tokens() > query;
                (!causal || position <= query) && in_window(window) && narrower.is_none_or(in_window)
            };
            // The smaller of the two windows applies, and the smaller number of sink tokens.
            let smaller = narrower.map_or(window, |other| {
                window_of(window.tokens().min(other.tokens()), window.sink_tokens().min(other.sink_tokens()))
            });
            let sees = |query: usize, position: usize| {
                sees(query, position) && (position < smaller.sink_tokens() || position + smaller.tokens() > query)
            };
            let missing = (at..at + rows)
                .any(|query| (0..end).any(|position| sees(query, position) && tables[0].slot(position).is_none()));
            let segments = [Segment { cache: &cache, tables: &tables, start, end: start + end }];
            let q = random.numbers(rows * HEADS * DIM);
            let got = attend_segments(&segments, 0, start + at, &tensor(&q, HEADS, DIM, DType::F32), &attention);
            let what = format!(
                "{name}, {window:?} and {narrower:?}, {rows} rows at {at} over {end} of {len} tokens, blocks of \
                 {block_size}"
            );
            match got {
                Ok(got) => {
                    answered += 1;
                    assert!(!missing, "{what}: it sees a freed position");
                    assert_equal(&got, &expected(&q, &k[..end * DIM], at, sees), &what);
                }
                Err(error) => {
                    refused += 1;
                    let error = error.to_string();
                    assert!(missing || end == 0, "{what}: {error}");
                    assert!(error.contains("was freed") || error.contains("no tokens to attend to"), "{what}: {error}");
                }
            }
        }
        assert!(answered > 100 && refused > 50, "{name}: {answered} answered, {refused} refused");
    }
}

#[test]
fn a_step_with_a_window_sees_no_freed_position() {
    for (name, configure) in backends() {
        let mut random = Random::new(12);
        for _ in 0..40 {
            let block_size = [1, 3, 4, 16][random.below(4)];
            let window = window_of(1 + random.below(9), random.below(5));
            let cache = configure(KvCache::builder(SHAPE).blocks(80).block_size(block_size)).build().unwrap();
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
                    position <= query && (position < window.sink_tokens() || position + window.tokens() > query)
                };
                let what = format!("{name}, {window:?}, {rows} rows after {at} tokens, blocks of {block_size}");
                assert_equal(&got.unwrap(), &expected(&q, &k, at, sees), &what);
            }
        }
    }
}

#[test]
fn a_sequence_begins_where_its_first_segment_begins() {
    for (name, configure) in backends() {
        let cache = configure(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
        let mut tables = [table(&cache, None)];
        let k = Random::new(13).numbers(22 * DIM);
        append(&cache, &mut tables[0], &k);
        tables[0].free_before(11); // position 8 is the first one now
        let q = Random::new(14).numbers(2 * HEADS * DIM);
        let attention = Attention::new(SCALE).window(window_of(3, 2));
        let sees =
            |query: usize, position: usize| (8..=query).contains(&position) && (position < 10 || position + 3 > query);
        for start in [0, 100] {
            let segments = [Segment { cache: &cache, tables: &tables, start, end: start + 22 }];
            let got = attend_segments(&segments, 0, start + 20, &tensor(&q, HEADS, DIM, DType::F32), &attention);
            assert_equal(&got.unwrap(), &expected(&q, &k, 20, sees), name);
        }
    }
}

#[test]
fn queries_before_the_last_segment_are_refused_if_their_position_matters() {
    for (name, configure) in backends() {
        let cache = configure(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
        let k = Random::new(15).numbers(24 * DIM);
        let mut tables = [[table(&cache, None)], [table(&cache, None)]];
        append(&cache, &mut tables[0][0], &k[..8 * DIM]);
        append(&cache, &mut tables[1][0], &k[8 * DIM..]);
        let [first, second] = &tables;
        let segments = [
            Segment { cache: &cache, tables: first, start: 0, end: 8 },
            Segment { cache: &cache, tables: second, start: 8, end: 24 },
        ];
        let numbers = Random::new(16).numbers(14 * HEADS * DIM);
        let q = tensor(&numbers, HEADS, DIM, DType::F32);
        let attention = Attention::new(SCALE).causal(false);
        let all = attend_segments(&segments, 0, 2, &q, &attention).unwrap();
        assert_equal(&all, &expected(&numbers, &k, 2, |_, _| true), name);
        for attention in [
            attention.clone().window(Window::new(4)),
            attention.clone().alibi(&Attention::alibi_slopes(HEADS)),
            attention.clone().causal(true),
        ] {
            let error = attend_segments(&segments, 0, 2, &q, &attention).unwrap_err().to_string();
            assert!(error.contains("queries at 2 come before position 8"), "{name}: {error}");
        }
    }
}

/// Positions at which arithmetic can overflow.
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
    for (name, configure) in backends() {
        for window in [None, Some(Window::new(4)), Some(window_of(usize::MAX, usize::MAX))] {
            let cache = configure(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
            let mut tables = [table(&cache, window)];
            let k = Random::new(17).numbers(10 * DIM);
            append(&cache, &mut tables[0], &k);
            let first_kept = if tables[0].slot(0).is_some() { 0 } else { 4 };
            let has_slots = |range: &Range<usize>| first_kept <= range.start && range.end <= 12;
            let new = tensor(&k[..2 * DIM], 1, DIM, DType::F32);
            let q = tensor(&k[..4 * DIM], HEADS, DIM, DType::F32);
            for start in EXTREMES {
                for end in EXTREMES {
                    let range = start..end;
                    let read = cache.read(0, &tables[0], range.clone());
                    match read {
                        Ok((k, v)) => {
                            assert!(start == end || (start < end && has_slots(&range)), "{name}: {range:?} was read");
                            assert_eq!((k.dims(), v.dims()), (&[end - start, 1, DIM][..], &[end - start, 1, DIM][..]));
                        }
                        Err(error) => {
                            let what = if end < start { "end before they start" } else { "have a slot" };
                            assert!(error.to_string().contains(what), "{name}: {error}");
                        }
                    }
                    // Segments and queries at every position.
                    for at in EXTREMES {
                        let segments = [Segment { cache: &cache, tables: &tables, start, end }];
                        for attention in [
                            Attention::new(SCALE),
                            Attention::new(SCALE).causal(false),
                            Attention::new(SCALE).window(window_of(usize::MAX, usize::MAX)),
                            Attention::new(SCALE).alibi(&[0.5; HEADS]),
                        ] {
                            if let Ok(y) = attend_segments(&segments, 0, at, &q, &attention) {
                                let fits = start < end && end - start <= 12 && at <= isize::MAX as usize - 2;
                                assert!(fits && end <= isize::MAX as usize, "{name}: {at} over {range:?}");
                                assert!(numbers(&y).iter().all(|x| x.is_finite()), "{name}: {at} over {range:?}");
                            }
                        }
                    }
                }
                let end = start.saturating_add(2);
                let before = cache.read(0, &tables[0], first_kept..10).unwrap().0;
                match cache.write(0, &mut tables, start, &new, &new) {
                    Ok(()) => {
                        assert!(has_slots(&(start..end)), "{name}: written from {start} on");
                        let (written, _) = cache.read(0, &tables[0], start..end).unwrap();
                        assert_eq!(numbers(&written), k[..2 * DIM], "{name}");
                    }
                    Err(error) => {
                        assert!(!has_slots(&(start..end)), "{name}: {error}");
                        let after = cache.read(0, &tables[0], first_kept..10).unwrap().0;
                        assert_eq!(numbers(&before), numbers(&after));
                    }
                }
            }
        }
    }
}
