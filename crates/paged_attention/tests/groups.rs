//! A cache with several groups of layers: each layer's attention equals dense attention in f64 over the tokens that its
//! span shows, for layers that differ in shape, type and span, through one table and one step. All groups share one
//! memory.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::{DType, Device};
use common::{Configure, Random, backends, dense, difference, stored_as, tensor};
use paged_attention::{
    AttendError, Attention, BlockTable, CacheError, CommitError, KvCache, KvDtype, KvShape, LayerGroup, OutOfBlocks,
    PushError, TableOptions, Window, find_error,
};

/// Query heads of every layer.
const HEADS: usize = 4;
const SCALE: f32 = 0.3;

/// The groups of a model of six layers: what each token sees, and the shape of the layers.
fn groups() -> Vec<LayerGroup> {
    vec![
        LayerGroup::new([0, 3], 2, 24).window(Window::new(9).with_sink_tokens(2)),
        LayerGroup::new([5], 1, 40),
        LayerGroup::new([1, 2], 4, 16).chunks(12),
        LayerGroup::new([4], 2, 24).window(Window::new(6)).dtype(KvDtype::F16),
    ]
}

/// Whether the token at `position` sees the one at `at` in a group: written once more, apart from the crates.
fn sees(group: usize, position: usize, at: usize) -> bool {
    at <= position
        && match group {
            0 => at < 2 || at + 9 > position,
            1 => true,
            2 => at / 12 == position / 12,
            _ => at + 6 > position,
        }
}

struct Model {
    cache: KvCache,
    /// The number of key heads, the dimensions, the type and the group of each layer.
    layers: Vec<(usize, usize, KvDtype, usize)>,
}

/// A sequence, and all its keys and values of each layer, as they are stored.
struct Sequence {
    table: BlockTable,
    tokens: Vec<u32>,
}

/// What a layer computes for a token: it depends on the token, its position and the layer only.
fn numbers(what: u32, layer: usize, token: u32, position: usize, n: usize) -> Vec<f32> {
    let seed = u64::from(token) << 32 | (position as u64) << 8 | (layer as u64) << 2 | u64::from(what);
    Random::new(seed.wrapping_mul(0x9e37_79b9)).numbers(n)
}

impl Model {
    fn new(configure: &Configure, block_size: usize, dtype: KvDtype, memory: usize) -> Self {
        let builder = configure(KvCache::builder_of(groups()).memory(memory).block_size(block_size).dtype(dtype));
        let cache = builder.build().unwrap();
        let of = |layer: usize| {
            let group = cache.group_of(layer).unwrap();
            let shape = cache.groups().nth(group).unwrap().shape();
            (shape.kv_heads, shape.head_dim, if group == 3 { KvDtype::F16 } else { dtype }, group)
        };
        let layers = (0..6).map(of).collect();
        Self { cache, layers }
    }

    fn sequence(&self) -> Sequence {
        Sequence { table: self.cache.table(), tokens: vec![] }
    }

    /// One step: sequence `i` gets the tokens `new[i]`. Checks each layer's attention.
    fn step(&self, name: &str, sequences: &mut [&mut Sequence], new: &[&[u32]]) {
        let mut step = self.cache.step();
        let mut rows: Vec<(Vec<u32>, usize)> = Vec::new();
        for (sequence, new) in sequences.iter_mut().zip(new) {
            assert_eq!(sequence.table.len(), sequence.tokens.len());
            let start = sequence.tokens.len();
            sequence.tokens.extend_from_slice(new);
            rows.extend((start..sequence.tokens.len()).map(|position| (sequence.tokens.clone(), position)));
            step.push(&mut sequence.table, new).unwrap();
        }
        for (layer, &(kv_heads, head_dim, dtype, group)) in self.layers.iter().enumerate() {
            let of = |what: u32, heads: usize| -> Vec<f32> {
                let row = |(tokens, position): &(Vec<u32>, usize)| {
                    numbers(what, layer, tokens[*position], *position, heads * head_dim)
                };
                rows.iter().flat_map(row).collect()
            };
            let (q, k, v) = (of(0, HEADS), of(1, kv_heads), of(2, kv_heads));
            let given = |numbers: &[f32], heads| tensor(numbers, heads, head_dim, DType::F32);
            let attention = Attention::new(SCALE);
            let got =
                step.attend(layer, &given(&q, HEADS), &given(&k, kv_heads), &given(&v, kv_heads), &attention).unwrap();
            let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
            let mut reference = Vec::new();
            for ((tokens, position), q) in rows.iter().zip(q.chunks_exact(HEADS * head_dim)) {
                let all = |what: u32| -> Vec<f32> {
                    let one = |at: usize| numbers(what, layer, tokens[at], at, kv_heads * head_dim);
                    stored_as(&(0..=*position).flat_map(one).collect::<Vec<_>>(), head_dim, dtype)
                };
                let seen: Vec<usize> = (0..=*position).filter(|&at| sees(group, *position, at)).collect();
                let scale = f64::from(SCALE);
                reference.extend(dense(q, &all(1), &all(2), &seen, kv_heads, head_dim, scale, |_, _, score| score));
            }
            let worst = difference(&got, &reference);
            let bound = if dtype == KvDtype::Int8 { 1e-3 } else { 1e-5 };
            assert!(worst < bound, "{name}, layer {layer}: {worst:e}");
        }
        step.commit().unwrap();
        self.cache.pool().check().unwrap();
    }
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).collect()
}

#[test]
fn every_layer_attends_to_what_its_span_shows() {
    for (name, configure) in backends() {
        for dtype in KvDtype::ALL.into_iter().filter(|&dtype| name != "gather" || dtype != KvDtype::Int8) {
            for block_size in [1, 4, 16] {
                let name = format!("{name}, {dtype}, blocks of {block_size}");
                let model = Model::new(&configure, block_size, dtype, 1 << 20);
                let [mut a, mut b] = [(); 2].map(|()| model.sequence());
                model.step(&name, &mut [&mut a], &[&tokens(30)]);
                // Another sequence joins: prefill beside decode.
                model.step(&name, &mut [&mut a, &mut b], &[&[7], &[5; 13]]);
                for token in 0..6 {
                    model.step(&name, &mut [&mut b, &mut a], &[&[token], &[token + 9, 3]]);
                }
                // A fork continues on its own, and so does the original after going back as far as it can.
                let mut fork = Sequence { table: a.table.fork(), tokens: a.tokens.clone() };
                let kept = (0..a.tokens.len()).rev().take_while(|&len| a.table.fork_at(len).is_ok()).last();
                let kept = kept.unwrap_or(a.tokens.len());
                a.table.truncate(kept).unwrap();
                a.tokens.truncate(kept);
                model.step(&name, &mut [&mut a, &mut fork], &[&[50, 51], &[60]]);
                // What was computed is found by another sequence, which then computes the rest.
                let (asked, done) = ([&fork.tokens[..], &[1]].concat(), fork.tokens.len() / block_size * block_size);
                drop(fork);
                let mut again = model.sequence();
                assert_eq!(again.table.match_prefix(&asked), done, "{name}");
                again.tokens = asked[..done].to_vec();
                model.step(&name, &mut [&mut again, &mut b], &[&asked[done..], &[2]]);
            }
        }
    }
}

#[test]
fn windows_free_their_blocks_and_all_groups_share_the_memory() {
    let (_, configure) = backends().pop().unwrap();
    let model = Model::new(&configure, 4, KvDtype::F32, 1 << 17);
    let pool = model.cache.pool();
    assert_eq!(model.cache.bytes_per_unit() * pool.units(), 1 << 17);
    let mut lengths = Vec::new();
    for _ in 0..2 {
        // One sequence as long as the memory holds.
        let mut long = model.sequence();
        while let Ok(()) = long.table.reserve(4) {
            long.table.commit(4).unwrap();
        }
        let blocks = |group| long.table.blocks_of_group(group).len();
        // Sink tokens, windows and chunks only, and a block more where one begins inside a block.
        assert!(blocks(0) <= 1 + 3 && blocks(2) <= 3 && blocks(3) <= 3, "{:?}", [0, 2, 3].map(blocks));
        assert!(blocks(1) > 75);
        lengths.push(long.table.len());
        drop(long);
        // Then as many short ones as it holds.
        let mut short = Vec::new();
        loop {
            let mut table = model.cache.table_with(&TableOptions::default().private());
            if table.reserve(8).is_err() {
                break;
            }
            table.commit(8).unwrap();
            short.push(table);
        }
        assert!(pool.available() < 2 * model.cache.bytes_per_block() / model.cache.bytes_per_unit());
        pool.check().unwrap();
        assert!(pool.resident() <= pool.units());
    }
    assert_eq!(lengths[0], lengths[1]);
}

#[test]
fn a_push_fits_in_all_groups_or_changes_none() {
    let (_, configure) = backends().pop().unwrap();
    let model = Model::new(&configure, 4, KvDtype::F32, 1 << 15);
    let pool = model.cache.pool();
    let mut sequence = model.sequence();
    model.step("first", &mut [&mut sequence], &[&tokens(6)]);
    let before = (pool.snapshot(), pool.available());
    let mut step = model.cache.step();
    let Err(PushError::OutOfBlocks(OutOfBlocks { requested, available })) =
        step.push(&mut sequence.table, &vec![1; 4000])
    else {
        panic!("4,000 tokens do not fit");
    };
    assert!(requested > available && available == before.1);
    drop(step);
    assert_eq!((pool.snapshot(), pool.available()), before);
    // A layer that was forgotten is reported, whichever group it is in.
    let mut step = model.cache.step();
    step.push(&mut sequence.table, &[1]).unwrap();
    assert_eq!(step.commit().unwrap_err(), CommitError::Unwritten { layer: 0, layers: 6 });
    assert_eq!(sequence.table.len(), 6);
}

#[test]
fn a_layer_takes_tensors_of_its_own_shape() {
    let (_, configure) = backends().pop().unwrap();
    let model = Model::new(&configure, 4, KvDtype::F32, 1 << 16);
    let mut sequence = model.sequence();
    let mut step = model.cache.step();
    step.push(&mut sequence.table, &[1, 2]).unwrap();
    let zeros = |heads, dim| candle_core::Tensor::zeros((2, heads, dim), DType::F32, &Device::Cpu).unwrap();
    let attend = |layer, kv_heads, dim| {
        let k = zeros(kv_heads, dim);
        step.attend(layer, &zeros(HEADS, dim), &k, &k, &Attention::new(SCALE))
    };
    assert!(attend(5, 1, 40).is_ok());
    for (layer, kv_heads, dim) in [(5, 2, 24), (0, 1, 40), (1, 2, 16)] {
        let error = attend(layer, kv_heads, dim).unwrap_err();
        assert!(matches!(find_error(&error), Some(AttendError::Shape { .. })), "{error}");
    }
    let error = attend(6, 1, 40).unwrap_err();
    assert_eq!(find_error(&error), Some(&AttendError::NoLayer { layer: 6, layers: 6 }));
    assert_eq!(model.cache.tensor(1).unwrap().dims()[1], 4 * 4 * 16 * 2);
}

#[test]
fn groups_that_make_no_cache_are_refused() {
    let build = |groups: Vec<LayerGroup>| KvCache::builder_of(groups).memory(1 << 16).block_size(4).build();
    let error = |groups| build(groups).unwrap_err().to_string();
    let group = |layers: &[usize]| LayerGroup::new(layers.iter().copied(), 1, 8);
    assert_eq!(
        error(vec![group(&[0, 1]), group(&[1])]),
        "the groups must have each layer once: layer 1 is there twice"
    );
    assert_eq!(
        error(vec![group(&[0, 3]), group(&[1])]),
        "the groups must have each layer once: layer 3 leaves out layers before it"
    );
    assert!(matches!(build(vec![]), Err(CacheError::NoGroups)));
    assert_eq!(error(vec![group(&[0]), group(&[])]), "group 1 has no layers: leave it out");
    assert!(matches!(build(vec![group(&[])]), Err(CacheError::Pool(_))));
    assert!(matches!(build(vec![LayerGroup::new([0], 0, 8), group(&[1])]), Err(CacheError::Pool(_))));
    assert!(matches!(
        build(vec![LayerGroup::new([0], usize::MAX, 8), group(&[1])]),
        Err(CacheError::Pool(_)) | Err(CacheError::TooLittleMemory { .. })
    ));
    let little = KvCache::builder_of([group(&[0]), group(&[1])]).memory(511).block_size(4).build();
    assert!(matches!(little, Err(CacheError::TooLittleMemory { bytes: 511, bytes_per_block: 512 })));
    let enough = KvCache::builder_of([group(&[0]), group(&[1])]).memory(512).block_size(4).build().unwrap();
    assert_eq!((enough.pool().units(), enough.bytes_per_unit(), enough.layers()), (2, 256, 2));
    // The same layers in one group are the uniform cache.
    let one = KvCache::builder_of([group(&[0, 1])]).blocks(3).build().unwrap();
    assert_eq!((one.shape(), one.pool().blocks(), one.groups().len()), (KvShape::new(2, 1, 8), 3, 1));
}
