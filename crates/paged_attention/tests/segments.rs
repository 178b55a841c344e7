//! Attention over sequences that lie in several caches, and writes and reads without a step.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{Random, backends, dense, difference, poison, stored_as, tensor};
use paged_attention::{
    Attention, BlockTable, KvCache, KvDtype, KvShape, Segment, TableOptions, Window, attend_segments,
};

const SHAPE: KvShape = KvShape::new(2, 2, 24);
const HEADS: usize = 6;
const WIDTH: usize = SHAPE.kv_heads * SHAPE.head_dim;
const LAYER: usize = 1;

/// Random numbers for `tokens` tokens of each of two sequences.
fn sequences(random: &mut Random, tokens: usize, width: usize) -> [Vec<f32>; 2] {
    [random.numbers(tokens * width), random.numbers(tokens * width)]
}

/// The tokens `range` of both sequences, packed: `(2 * tokens, heads, head_dim)`.
fn packed(of: &[Vec<f32>; 2], range: std::ops::Range<usize>, heads: usize) -> Tensor {
    let width = heads * SHAPE.head_dim;
    let both: Vec<f32> = of.iter().flat_map(|one| &one[range.start * width..range.end * width]).copied().collect();
    tensor(&both, heads, SHAPE.head_dim, DType::F32)
}

fn write(cache: &KvCache, tables: &mut [BlockTable], at: usize, k: &Tensor, v: &Tensor) {
    let tokens = k.dims()[0] / tables.len();
    for table in tables.iter_mut() {
        table.reserve(at + tokens - table.len()).unwrap();
    }
    cache.write(LAYER, tables, at, k, v).unwrap();
    tables.iter_mut().for_each(|table| table.commit(tokens).unwrap());
}

#[test]
fn segments_equal_one_cache() {
    let mut random = Random::new(3);
    let scale = 0.25f32;
    for (name, configure) in backends() {
        for (first_dtype, len, cut) in
            [(KvDtype::F32, 70, 33), (KvDtype::F16, 40, 39), (KvDtype::Int8, 1300, 1200), (KvDtype::Int8, 90, 5)]
        {
            let first_dtype =
                if name == "gather" && first_dtype == KvDtype::Int8 { KvDtype::Bf16 } else { first_dtype };
            let bound = if first_dtype == KvDtype::Int8 { 2e-4 } else { 1e-5 };
            let (k, v) = (sequences(&mut random, len, WIDTH), sequences(&mut random, len, WIDTH));
            let q = sequences(&mut random, len, HEADS * SHAPE.head_dim);
            let make = |dtype, block_size| {
                let cache = configure(KvCache::builder(SHAPE).dtype(dtype)).block_size(block_size);
                let cache = cache.blocks(2 * len.div_ceil(block_size) + 2).build().unwrap();
                poison(&cache);
                let tables = vec![cache.table(), cache.table()];
                (cache, tables)
            };
            let ((early, mut early_tables), (late, mut late_tables)) = (make(first_dtype, 16), make(KvDtype::F32, 4));
            let pack = |range: std::ops::Range<usize>| (packed(&k, range.clone(), 2), packed(&v, range, 2));
            let (a, b) = pack(0..cut);
            write(&early, &mut early_tables, 0, &a, &b);
            // Written twice: the second write replaces the first.
            let (junk, _) = pack(cut..len);
            write(&late, &mut late_tables, 0, &junk, &junk);
            let (a, b) = pack(cut..len);
            late.write(LAYER, &mut late_tables, 0, &a, &b).unwrap();
            let segments = [
                Segment { cache: &early, tables: &early_tables, start: 0, end: cut },
                Segment { cache: &late, tables: &late_tables, start: cut, end: len },
            ];
            for (rows, causal, window) in
                [(1, true, None), (len - cut, true, None), (7, false, None), (1, true, Some(9))]
            {
                let rows = rows.min(len - cut);
                let attention = Attention::new(scale).causal(causal).soft_cap(3.0);
                let attention = window.map_or(attention.clone(), |window| attention.window(Window::new(window)));
                let query = packed(&q, len - rows..len, HEADS);
                let got = attend_segments(&segments, LAYER, len - rows, &query, &attention).unwrap();
                let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
                let mut expected = Vec::new();
                for sequence in 0..2 {
                    let stored = |of: &[f32]| {
                        let (early, late) = of.split_at(cut * WIDTH);
                        [stored_as(early, SHAPE.head_dim, first_dtype), late.to_vec()].concat()
                    };
                    let (k, v) = (stored(&k[sequence]), stored(&v[sequence]));
                    for at in len - rows..len {
                        let seen: Vec<usize> = (0..len)
                            .filter(|&t| (!causal || t <= at) && window.is_none_or(|window| t + window > at))
                            .collect();
                        let q = &q[sequence][at * HEADS * SHAPE.head_dim..][..HEADS * SHAPE.head_dim];
                        let capped = |_, _, score: f64| 3.0 * (score / 3.0).tanh();
                        expected.extend(dense(q, &k, &v, &seen, 2, SHAPE.head_dim, f64::from(scale), capped));
                    }
                }
                let off = difference(&got, &expected);
                assert!(off < bound, "{name} {first_dtype} {len} at {cut}, {rows} rows, {window:?}: {off}");
            }
        }
    }
}

#[test]
fn one_segment_equals_a_step_to_the_last_bit() {
    let mut random = Random::new(4);
    let cache = KvCache::builder(SHAPE).blocks(80).build().unwrap();
    let (k, v) = (sequences(&mut random, 600, WIDTH), sequences(&mut random, 600, WIDTH));
    let q = packed(&sequences(&mut random, 600, HEADS * SHAPE.head_dim), 0..600, HEADS);
    let (k, v) = (packed(&k, 0..600, 2), packed(&v, 0..600, 2));
    let mut tables = [cache.table(), cache.table()];
    let [a, b] = &mut tables;
    let mut step = cache.step();
    step.push(a, &[1; 600]).unwrap();
    step.push(b, &[2; 600]).unwrap();
    let attention = Attention::new(0.1);
    let stepped = step.attend(LAYER, &q, &k, &v, &attention).unwrap();
    step.leave_unwritten(0..LAYER).unwrap();
    step.commit().unwrap();
    let segments = [Segment { cache: &cache, tables: &tables, start: 0, end: 600 }];
    let got = attend_segments(&segments, LAYER, 0, &q, &attention).unwrap();
    let numbers = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(numbers(got), numbers(stepped));
}

#[test]
fn writing_without_a_step_copies_shared_blocks() {
    let cache = KvCache::builder(SHAPE).blocks(8).block_size(4).build().unwrap();
    let full = |x: f32, n: usize| Tensor::full(x, (n, 2, 24), &Device::Cpu).unwrap();
    let first = |table: &BlockTable, range| -> Vec<f32> {
        let (k, _) = cache.read(LAYER, table, range).unwrap();
        k.narrow(1, 0, 1).unwrap().narrow(2, 0, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &[1, 2, 3, 4, 5, 6]).unwrap();
    step.write(LAYER, &full(1.0, 6), &full(1.0, 6)).unwrap();
    step.leave_unwritten(0..LAYER).unwrap();
    step.commit().unwrap();
    let mut fork = [table.fork()];
    cache.write(LAYER, &mut fork, 2, &full(2.0, 3), &full(2.0, 3)).unwrap();
    assert_eq!((first(&table, 0..6), first(&fork[0], 1..6)), (vec![1.0; 6], vec![1.0, 2.0, 2.0, 2.0, 1.0]));
    // The fork's keys and values no longer match its token ids, so its blocks are not cached.
    fork[0].reserve(2).unwrap();
    fork[0].commit_tokens(&[7, 8]).unwrap();
    let mut other = cache.table();
    assert_eq!(other.match_prefix(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), 4);
    assert_eq!(first(&other, 0..4), [1.0; 4]);

    for (start, message) in
        [(7, "7..10 are not all reserved: position 8 has no slot in the table, whose capacity is 8"), (8, "8..11")]
    {
        let error = cache.write(LAYER, &mut fork, start, &full(3.0, 3), &full(3.0, 3)).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
    assert!(cache.read(LAYER, &table, 6..9).is_err());
    assert!(cache.read(7, &table, 0..1).unwrap_err().to_string().contains("no layer 7"));
}

#[test]
fn blocks_before_a_position_can_be_freed() {
    let cache = KvCache::builder(SHAPE).blocks(8).block_size(4).build().unwrap();
    let mut tables = [cache.table_with(&TableOptions::default().private())];
    let numbers = Random::new(5).numbers(22 * WIDTH);
    let k = tensor(&numbers, 2, 24, DType::F32);
    write(&cache, &mut tables, 0, &k, &k);
    tables[0].free_before(11);
    assert_eq!((cache.pool().in_use(), tables[0].len(), tables[0].slot(7)), (4, 22, None));
    assert!(cache.read(LAYER, &tables[0], 7..9).is_err());
    let (kept, _) = cache.read(LAYER, &tables[0], 9..22).unwrap();
    let kept: Vec<f32> = kept.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(kept, numbers[9 * WIDTH..]);
    // The segment begins at the first block that was not freed, and ends before the last token.
    let q = tensor(&Random::new(6).numbers(6 * 24), 6, 24, DType::F32);
    let segment = |end| [Segment { cache: &cache, tables: &tables, start: 0, end }];
    let got = attend_segments(&segment(20), LAYER, 19, &q, &Attention::new(0.3)).unwrap();
    let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
    let q: Vec<f32> = q.flatten_all().unwrap().to_vec1().unwrap();
    let expected =
        dense(&q, &numbers, &numbers, &(8..20).collect::<Vec<_>>(), 2, 24, 0.3f32.into(), |_, _, score| score);
    assert!(difference(&got, &expected) < 1e-5);

    let error = tables[0].truncate(5).unwrap_err();
    assert_eq!((error.len, error.kept), (5, 8));
    tables[0].truncate(9).unwrap();
    assert_eq!(cache.pool().in_use(), 1);
    tables[0].reserve(20).unwrap();
    tables[0].shrink_to(14);
    assert_eq!((cache.pool().in_use(), tables[0].capacity()), (2, 16));
}

#[test]
fn a_step_does_not_see_freed_blocks() {
    for (name, configure) in backends() {
        let cache = configure(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
        let mut tables = [cache.table_with(&TableOptions::default().private())];
        let numbers = Random::new(5).numbers(23 * WIDTH);
        let k = tensor(&numbers, 2, 24, DType::F32);
        let (old, new) = (k.narrow(0, 0, 22).unwrap(), k.narrow(0, 22, 1).unwrap());
        write(&cache, &mut tables, 0, &old, &old);
        tables[0].free_before(11);
        let numbers_of_q = Random::new(6).numbers(6 * 24);
        let q = tensor(&numbers_of_q, 6, 24, DType::F32);
        let mut step = cache.step();
        step.push(&mut tables[0], &[1]).unwrap();
        assert_eq!(step.positions().unwrap().to_vec1::<u32>().unwrap(), [22]);
        let got = step.attend(LAYER, &q, &new, &new, &Attention::new(0.3)).unwrap();
        let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
        let seen: Vec<_> = (8..23).collect();
        let expected = dense(&numbers_of_q, &numbers, &numbers, &seen, 2, 24, 0.3f32.into(), |_, _, score| score);
        assert!(difference(&got, &expected) < 1e-5, "{name}");
    }
}

#[test]
fn a_segment_with_a_window_may_end_before_the_positions_that_it_has_kept() {
    let cache = KvCache::builder(SHAPE).blocks(20).block_size(4).build().unwrap();
    let mut table = cache.table_with(&TableOptions::default().window(Window::new(6)));
    (0..40).for_each(|_| table.append(1).unwrap());
    let tables = [table];
    let q = tensor(&Random::new(6).numbers(6 * 24), 6, 24, DType::F32);
    for end in [4, 20, 30] {
        let segment = [Segment { cache: &cache, tables: &tables, start: 0, end }];
        let got = attend_segments(&segment, LAYER, 39, &q, &Attention::new(0.3)).unwrap();
        let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
        assert!(got.iter().all(|x| *x == 0.0), "no position before {end} is seen");
    }
}

#[test]
fn segments_that_do_not_fit_are_refused() {
    let cache = KvCache::builder(SHAPE).blocks(20).block_size(4).build().unwrap();
    let other = KvCache::builder(KvShape::new(SHAPE.layers, SHAPE.kv_heads, 8)).blocks(4).build().unwrap();
    let twin = KvCache::builder(SHAPE).blocks(4).build().unwrap();
    let filled = |cache: &KvCache, options: &TableOptions| {
        let mut table = cache.table_with(options);
        table.append(8).unwrap();
        [table]
    };
    let plain = TableOptions::default();
    let (a, b, odd) = (filled(&cache, &plain), filled(&cache, &plain), filled(&other, &plain));
    let windowed = filled(&cache, &plain.clone().window(Window::new(6)));
    fn segment<'a>(cache: &'a KvCache, tables: &'a [BlockTable], start: usize) -> Segment<'a> {
        Segment { cache, tables, start, end: start + 8 }
    }
    let q = |rows| Tensor::zeros((rows, HEADS, 24), DType::F32, &Device::Cpu).unwrap();
    let causal = Attention::new(1.0);
    let (first, second) = (segment(&cache, &a, 0), segment(&cache, &b, 8));
    let with_sink_tokens = causal.clone().window(Window::new(3).with_sink_tokens(1));
    let cases = [
        ("no segment", vec![], 0, 1, &causal),
        ("begins at 9 does not follow", vec![first, segment(&cache, &b, 9)], 15, 1, &causal),
        ("different numbers of heads", vec![first, segment(&other, &odd, 8)], 15, 1, &causal),
        ("another pool", vec![segment(&twin, &a, 0)], 7, 1, &causal),
        ("queries at 7 come before position 8", vec![first, second], 7, 2, &causal),
        ("lies in a table with a capacity of 8", vec![Segment { end: 9, ..first }], 8, 1, &causal),
        ("window", vec![first, segment(&cache, &windowed, 8)], 15, 1, &causal),
        ("window", vec![first, second], 15, 1, &with_sink_tokens),
    ];
    for (message, segments, at, rows, attention) in cases {
        let error = attend_segments(&segments, LAYER, at, &q(rows), attention).unwrap_err().to_string();
        assert!(error.contains(message), "{error:?} lacks {message:?}");
    }
    assert!(attend_segments(&[first, second], LAYER, 15, &q(1), &causal).is_ok());
}
