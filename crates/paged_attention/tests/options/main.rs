//! What layers of today's models ask for: sink logits, values of another dimension or in the keys, tokens that see each
//! other, logarithms of sums of weights, attention without writing. Every option with every backend, kernel, type and
//! block size equals dense attention in f64, and for the fused backend is the same to the last bit however it is
//! computed.

#![allow(clippy::unwrap_used, clippy::panic)]

mod case;
#[path = "../common/mod.rs"]
mod common;
mod errors;
mod foreign;
mod shared;
mod unseen;

use std::ops::Range;

use candle_core::Tensor;
use case::{Case, Numbers, Results, bound, cases, stores};
use common::{Configure, Random, difference};
use paged_attention::{BlockTable, Kernel, KvCache, KvDtype};

/// Where pushes of one sequence begin and end. They cut no image.
const STEPS: [Range<usize>; 6] = [0..41, 41..42, 42..88, 88..153, 153..160, 160..161];
const TOKENS: usize = 161;

fn numbers_of(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Computes the rows at `positions` as one step, and adds their results.
fn compute(
    case: &Case,
    cache: &KvCache,
    table: &mut BlockTable,
    numbers: &Numbers,
    positions: Range<usize>,
    results: &mut Results<f32>,
) {
    let (q, k, v) = case.tensors(numbers, &positions);
    let mut step = cache.step();
    step.push_with(table, &numbers.ids(&positions), &case.push_options(&positions)).unwrap();
    let (out, lse) = step.attend_with_lse(0, &q, &k, v.as_ref(), &case.attention()).unwrap();
    assert_eq!(out.dims(), [positions.len(), case.heads, case.shape.value_dim]);
    assert_eq!(lse.dims(), [positions.len(), case.heads]);
    results.out.extend(numbers_of(&out));
    results.lse.extend(numbers_of(&lse));
    step.commit().unwrap();
}

#[test]
fn every_option_equals_dense_attention() {
    for (name, configure, dtype) in stores() {
        for case in cases() {
            let numbers = case.numbers(TOKENS, 3);
            let mut expected = Results::default();
            for rows in STEPS {
                let dense = case.dense(&numbers, dtype, rows.clone(), rows.end);
                expected.out.extend(dense.out);
                expected.lse.extend(dense.lse);
            }
            for block_size in [1, 7, 16, 24, 32] {
                let cache = case.cache(&configure, dtype, block_size, TOKENS);
                let (mut table, mut got) = (cache.table(), Results::default());
                for positions in STEPS {
                    compute(&case, &cache, &mut table, &numbers, positions, &mut got);
                }
                let worst = [difference(&got.out, &expected.out), difference(&got.lse, &expected.lse)];
                assert!(
                    worst.iter().all(|worst| *worst < bound(dtype)),
                    "{}: {name}, blocks of {block_size}: {worst:?}",
                    case.name
                );
            }
        }
    }
}

/// Without writing, and without the logarithms: the same. Another layer can have other heads and options.
#[test]
fn attending_without_writing_is_the_same() {
    for (name, configure, dtype) in stores() {
        for case in cases() {
            let numbers = case.numbers(TOKENS, 3);
            let cache = case.cache(&configure, dtype, 16, TOKENS);
            let mut table = cache.table();
            let other = Case { heads: 2 * case.heads, sinks: !case.sinks, alibi: !case.alibi, ..case.clone() };
            let other_numbers = Numbers { q: other.numbers(TOKENS, 4).q, ..numbers.clone() };
            for rows in STEPS {
                let (q, k, v) = case.tensors(&numbers, &rows);
                let attention = case.attention();
                let mut step = cache.step();
                step.push_with(&mut table, &numbers.ids(&rows), &case.push_options(&rows)).unwrap();
                let (out, lse) = step.attend_with_lse(0, &q, &k, v.as_ref(), &attention).unwrap();
                let (out, lse) = (numbers_of(&out), numbers_of(&lse));
                let again = step.attend_cached_with_lse(0, &q, &attention).unwrap();
                assert_eq!((numbers_of(&again.0), numbers_of(&again.1)), (out.clone(), lse), "{}: {name}", case.name);
                assert_eq!(numbers_of(&step.attend_cached(0, &q, &attention).unwrap()), out, "{}: {name}", case.name);

                assert_eq!(numbers_of(&step.attend(0, &q, &k, v.as_ref(), &attention).unwrap()), out, "{name}");

                let (q, ..) = other.tensors(&other_numbers, &rows);
                let got = numbers_of(&step.attend_cached(0, &q, &other.attention()).unwrap());
                let expected = other.dense(&other_numbers, dtype, rows.clone(), rows.end).out;
                let worst = difference(&got, &expected);
                assert!(worst < bound(dtype), "{}: {name}: {worst:e}", case.name);
                step.commit().unwrap();
            }
        }
    }
}

/// The latent cache of DeepSeek-V2: more dimensions than a task's other buffers, many heads on one key head.
#[test]
fn the_latent_cache_of_deepseek() {
    for (name, configure, dtype) in stores() {
        for heads in [16, 128] {
            let shape = paged_attention::KvShape::new(1, 1, 576).values_in_keys(512);
            let case = Case { name: "DeepSeek-V2", heads, shape, ..cases().swap_remove(0) };
            let numbers = case.numbers(83, 4);
            let cache = case.cache(&configure, dtype, 16, 83);
            let (mut table, mut got) = (cache.table(), Results::default());
            for positions in [0..82, 82..83] {
                compute(&case, &cache, &mut table, &numbers, positions, &mut got);
            }
            let rows = 80..83;
            let expected = case.dense(&numbers, dtype, rows.clone(), 83);
            let worst = [
                difference(&got.out[rows.start * heads * 512..], &expected.out),
                difference(&got.lse[rows.start * heads..], &expected.lse),
            ];
            assert!(worst.iter().all(|worst| *worst < bound(dtype)), "{name}, {heads} heads: {worst:?}");
        }
    }
}

/// The bits of a long sequence's results, computed in steps of these lengths beside neighbours, by some threads.
fn bits(
    case: &Case,
    configure: &Configure,
    dtype: KvDtype,
    block_size: usize,
    steps: &[usize],
    threads: usize,
) -> Vec<u32> {
    let tokens: usize = steps.iter().sum();
    let numbers = case.numbers(tokens, 5);
    let cache = case.cache(configure, dtype, block_size, 2 * tokens + 64);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (mut table, mut neighbour) = (cache.table(), cache.table());
    let (mut results, mut at) = (Results::default(), 0);
    for (i, &n) in steps.iter().enumerate() {
        if threads > 1 {
            // It takes blocks between those of the sequence.
            let positions = i * 5..i * 5 + 5;
            let lone = Case { images: Vec::new(), ..case.clone() };
            compute(&lone, &cache, &mut neighbour, &numbers, positions, &mut Results::default());
        }
        pool.install(|| compute(case, &cache, &mut table, &numbers, at..at + n, &mut results));
        at += n;
    }
    results.out.iter().chain(&results.lse).map(|x| x.to_bits()).collect()
}

#[test]
fn fused_results_do_not_depend_on_how_they_are_computed() {
    let fused = stores().into_iter().filter(|(name, ..)| !name.starts_with("gather"));
    for (name, configure, dtype) in fused {
        for case in cases().into_iter().filter(|case| case.causal) {
            // Several chunks of tokens; the last image begins in one and ends in another.
            let images = if case.images.is_empty() { vec![] } else { vec![4..37, 90..150, 505..520] };
            let case = Case { images, ..case };
            let alone = bits(&case, &configure, dtype, 16, &[560, 1], 1);
            for (block_size, steps, threads) in [
                (16, &[560, 1][..], 2),
                (32, &[200, 303, 57, 1], 3),
                (7, &[1, 560], 2),
                (1, &[88, 62, 352, 16 + 42, 1], 2),
            ] {
                let same = alone == bits(&case, &configure, dtype, block_size, steps, threads);
                assert!(same, "{}: {name}, blocks of {block_size}, {steps:?}", case.name);
            }
        }
    }
}

/// Integer sums are exact, and everything else is computed in one order, so all kernels with fused multiply-add agree.
#[test]
fn kernels_agree_to_the_last_bit() {
    let fused = |name: &str| !name.starts_with("gather") && !name.starts_with(Kernel::Portable.name());
    for dtype in KvDtype::ALL {
        for case in cases() {
            let all = stores().into_iter().filter(|(name, _, of)| *of == dtype && fused(name));
            let mut all = all.map(|(_, configure, _)| bits(&case, &configure, dtype, 16, &[153, 1], 1));
            if let Some(first) = all.next() {
                assert!(all.all(|other| other == first), "{}, {dtype}", case.name);
            }
        }
    }
}

/// Attention of one query over all tokens is that over some of them and that over the rest, merged.
#[test]
fn parts_merge_to_the_whole() {
    for (name, configure, dtype) in stores() {
        for case in cases().into_iter().filter(|case| case.images.is_empty() && case.layer_window.is_none()) {
            let numbers = case.numbers(TOKENS, 6);
            let cache = case.cache(&configure, dtype, 16, 3 * TOKENS);
            let whole = case.dense(&numbers, dtype, TOKENS - 1..TOKENS, TOKENS);
            let mut parts = Vec::new();
            // Distances count from the query, which is a token of the last part only.
            if case.alibi {
                continue;
            }
            for (i, part) in [0..70, 70..150, 150..TOKENS].into_iter().enumerate() {
                let mut table = cache.table();
                let (_, k, v) = case.tensors(&numbers, &part);
                let (q, ..) = case.tensors(&numbers, &(TOKENS - 1..TOKENS));
                // The query attends to all tokens of the part.
                let q = Tensor::cat(&vec![q; part.len()], 0).unwrap();
                let mut step = cache.step();
                step.push(&mut table, &vec![0; part.len()]).unwrap();
                let attention = if i == 1 { case.attention() } else { case.attention().without_sink_logits() };
                let (out, lse) = step.attend_with_lse(0, &q, &k, v.as_ref(), &attention).unwrap();
                let last = |tensor: &Tensor| tensor.narrow(0, part.len() - 1, 1).unwrap();
                parts.push((last(&out), last(&lse)));
            }
            let (out, lse) = paged_attention::merge_states(&parts).unwrap();
            let worst = [difference(&numbers_of(&out), &whole.out), difference(&numbers_of(&lse), &whole.lse)];
            assert!(worst.iter().all(|worst| *worst < bound(dtype)), "{}: {name}: {worst:?}", case.name);
        }
    }
}

/// Segments in two caches: a sink logit counts once, and values have their own dimension or are in the keys.
#[test]
fn segments_are_merged_with_one_sink_logit() {
    for (name, configure, dtype) in stores() {
        let of = |name: &str| cases().into_iter().find(|case| case.name == name).unwrap();
        for case in ["plain", "odd values", "latent", "small odd latent"].map(of) {
            let case = Case { sinks: true, ..case };
            let numbers = case.numbers(TOKENS, 11);
            let caches = [0..70, 70..TOKENS].map(|part| {
                let cache = case.cache(&configure, dtype, 16, TOKENS);
                let mut tables = [cache.table()];
                tables[0].append(part.len()).unwrap();
                let (_, k, v) = case.tensors(&numbers, &part);
                cache.write(0, &mut tables, 0, &k, v.as_ref()).unwrap();
                (cache, tables, part)
            });
            let segments = caches.each_ref().map(|(cache, tables, part)| paged_attention::Segment {
                cache,
                tables,
                start: part.start,
                end: part.end,
            });
            let rows = 90..TOKENS;
            let (q, ..) = case.tensors(&numbers, &rows);
            let got = paged_attention::attend_segments(&segments, 0, rows.start, &q, &case.attention()).unwrap();
            assert_eq!(got.dims(), [rows.len(), case.heads, case.shape.value_dim]);
            let expected = case.dense(&numbers, dtype, rows, TOKENS).out;
            let worst = difference(&numbers_of(&got), &expected);
            assert!(worst < bound(dtype), "{}: {name}: {worst:e}", case.name);
        }
    }
}

#[test]
fn merged_states_of_rows_that_see_nothing() {
    let device = &candle_core::Device::Cpu;
    let out = Tensor::new(&[[[0f32, 0.0]], [[2.0, 4.0]]], device).unwrap();
    let lse = Tensor::new(&[[f32::NEG_INFINITY], [1.0]], device).unwrap();
    let none = Tensor::new(&[[f32::NEG_INFINITY], [f32::NEG_INFINITY]], device).unwrap();
    let (merged, logs) =
        paged_attention::merge_states(&[(out.clone(), lse), (out.zeros_like().unwrap(), none)]).unwrap();
    assert_eq!(numbers_of(&merged), numbers_of(&out));
    assert_eq!(numbers_of(&logs), [f32::NEG_INFINITY, 1.0]);
}

/// Encoders of different lengths in one call, one of them read by two sequences; several rows, none, and no tokens.
#[test]
fn cross_attention_over_encoders_of_different_lengths() {
    for (name, configure, dtype) in stores() {
        let case = Case { causal: false, sinks: true, ..cases().swap_remove(0) };
        for case in [case.clone(), Case { shape: case.shape.value_dim(20), ..case }] {
            let cache = case.cache(&configure, dtype, 16, 700);
            let lens = [37, 600, 1, 16];
            let encoders: Vec<_> = lens.iter().zip(10..).map(|(&len, seed)| case.numbers(len, seed)).collect();
            let mut tables: Vec<_> = lens.iter().map(|_| cache.table()).collect();
            for ((table, numbers), &len) in tables.iter_mut().zip(&encoders).zip(&lens) {
                compute(&case, &cache, table, numbers, 0..len, &mut Results::default());
            }
            let empty = cache.table();
            let readers = [(1, 3), (0, 1), (3, 20), (1, 1), (2, 2), (0, 0)];
            let mut sequences: Vec<_> = readers.iter().map(|&(of, rows)| (&tables[of], rows)).collect();
            sequences.insert(2, (&empty, 1));
            // The queries are those of the first tokens, whatever sequence reads them; the empty one reads its own.
            let mut q = Random::new(1).numbers(28 * case.heads * 32);
            let mut expected: Vec<f64> = Vec::new();
            let (mut row, mut queries) = (0, Vec::new());
            for &(table, rows) in &sequences {
                let of = tables.iter().position(|other| std::ptr::eq(other, table));
                for _ in 0..rows {
                    let own = &mut q[row * case.heads * 32..][..case.heads * 32];
                    queries.extend_from_slice(own);
                    let mut numbers = match of {
                        Some(of) => encoders[of].clone(),
                        None => case.numbers(0, 0),
                    };
                    numbers.q = own.to_vec();
                    let len = of.map_or(0, |of| lens[of]);
                    expected.extend(case.dense(&numbers, dtype, 0..1, len).out);
                    row += 1;
                }
            }
            let q = common::tensor(&queries, case.heads, 32, candle_core::DType::F32);
            let got = cache.attend_cached(0, &sequences, &q, &case.attention()).unwrap();
            assert_eq!(got.dims(), [28, case.heads, case.shape.value_dim]);
            let worst = difference(&numbers_of(&got), &expected);
            assert!(worst < bound(dtype), "{name}: {worst:e}");
        }
    }
}

/// A row that is computed alone, among the rows of others, and as one of a prompt, by the same instructions.
#[test]
fn causal_rows_of_attend_cached_are_those_of_a_step() {
    let case = cases().swap_remove(0);
    for (name, configure, dtype) in stores().into_iter().filter(|(name, ..)| !name.starts_with("gather")) {
        let numbers = case.numbers(TOKENS, 8);
        let cache = case.cache(&configure, dtype, 16, TOKENS);
        let (mut table, mut results) = (cache.table(), Results::default());
        compute(&case, &cache, &mut table, &numbers, 0..TOKENS, &mut results);
        let (q, ..) = case.tensors(&numbers, &(TOKENS - 3..TOKENS));
        let got = numbers_of(&cache.attend_cached(0, &[(&table, 3)], &q, &case.attention()).unwrap());
        assert_eq!(got, results.out[results.out.len() - got.len()..], "{name}");
    }
}
