//! Truncation: after any appends, truncations and clears, a cache still has what a layer's last token sees.
//!
//! - Keys, values and attention over the visible range are those of a naive cache, or there is an error: never a wrong
//!   result.
//! - What a layer's last token sees can always be read and attended to.
//! - The last pass can always be truncated. A further truncation may be an error that says what is missing; it changes
//!   nothing.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use bitnet_kv::{
    CacheOptions, KVCache, KVCacheOptions, KvDtype, KvError, KvShape, Overflow, PagedKVCache, PagedKVPool,
    PagedKVPoolBuilder,
};
use candle_core::{DType, Device, Tensor};
use common::{Random, RandomTensor, cat, dense, difference, numbers, tokens};

const LAYERS: usize = 2;
const HEADS: usize = 2;
const DIM: usize = 8;
const SHAPE: KvShape = KvShape::new(LAYERS, HEADS, DIM);
const SCALE: f32 = 0.4;

/// One of the two caches.
enum Cache {
    Paged(PagedKVCache),
    /// For one sequence.
    Updated(KVCache),
}

impl Cache {
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(), KvError> {
        match self {
            Self::Paged(cache) => cache.layers_mut()[layer].append(k, v),
            Self::Updated(cache) => {
                let len = cache.seq_len(layer) + k.dims()[2];
                cache.update(layer, k.clone(), v.clone(), len)
            }
        }
    }

    /// Whether each layer can be truncated alone, to any length.
    fn truncates_layers_alone(&self) -> bool {
        matches!(self, Self::Updated(_))
    }

    fn truncate_layer(&mut self, layer: usize, len: usize) -> Result<(), KvError> {
        match self {
            Self::Paged(cache) if len == 0 => {
                cache.layers_mut()[layer].clear();
                Ok(())
            }
            Self::Paged(_) => panic!("a layer of a paged cache can only be cleared"),
            Self::Updated(cache) => {
                let none = Tensor::zeros((1, HEADS, 0, DIM), DType::F32, &Device::Cpu).unwrap();
                cache.update(layer, none.clone(), none, len)
            }
        }
    }

    fn len(&self, layer: usize) -> usize {
        match self {
            Self::Paged(cache) => cache.layers()[layer].seq_len(),
            Self::Updated(cache) => cache.seq_len(layer),
        }
    }

    /// `[B, H, S, D]` each.
    fn keys_and_values(&self, layer: usize) -> Result<(Tensor, Tensor), KvError> {
        match self {
            Self::Paged(cache) => Ok((cache.layers()[layer].keys()?, cache.layers()[layer].values()?)),
            Self::Updated(cache) => {
                let (k, v) = cache.get(layer)?;
                let batched = |t: Tensor| t.transpose(0, 1).unwrap().unsqueeze(0).unwrap().contiguous().unwrap();
                Ok((batched(k), batched(v)))
            }
        }
    }

    fn attend(&self, layer: usize, q: &Tensor, causal: bool) -> Result<Tensor, KvError> {
        match self {
            Self::Paged(cache) => cache.layers()[layer].attend(q, SCALE, causal),
            Self::Updated(cache) => cache.attend(layer, q, SCALE, causal),
        }
    }
}

/// The options of a cache.
#[derive(Debug, Clone, Copy)]
struct Case {
    batch: usize,
    block_size: usize,
    max_seq_len: usize,
    overflow: Overflow,
    older_than: Option<usize>,
    dtype: KvDtype,
    updated: bool,
}

const RING: Case = Case {
    batch: 1,
    block_size: 4,
    max_seq_len: 4,
    overflow: Overflow::Circular { sink_tokens: 0 },
    older_than: None,
    dtype: KvDtype::F32,
    updated: false,
};

impl Case {
    fn builder(&self) -> PagedKVPoolBuilder {
        let builder = PagedKVPool::builder(SHAPE).blocks(200).block_size(self.block_size).dtype(self.dtype);
        let builder = builder.max_seq_len(self.max_seq_len).overflow(self.overflow);
        self.older_than.map_or(builder.clone(), |n| builder.compress_older_than(n))
    }

    fn cache(&self) -> Cache {
        if self.updated {
            let options = KVCacheOptions::default().overflow(self.overflow).dtype(self.dtype);
            let options = self.older_than.map_or(options.clone(), |n| options.compress_older_than(n));
            let cache = KVCache::with_options(self.max_seq_len, LAYERS, HEADS, DIM, &Device::Cpu, &options);
            return Cache::Updated(cache.unwrap());
        }
        Cache::Paged(self.builder().build().unwrap().cache_with(&CacheOptions::default().batch(self.batch)))
    }

    /// Whether the token at position `at` sees the one at position `seen`.
    fn sees(&self, at: usize, seen: usize) -> bool {
        match self.overflow {
            Overflow::Circular { sink_tokens } => {
                seen <= at && (seen < sink_tokens || seen + self.max_seq_len - sink_tokens > at)
            }
            _ => seen <= at,
        }
    }

    /// How far stored numbers may be from the given ones, because they are stored in fewer bits.
    fn rounding(&self) -> f32 {
        if self.dtype == KvDtype::Int8 || self.older_than.is_some() { 0.5 / 127.0 + 1e-6 } else { 0.0 }
    }
}

/// The given keys and values of all positions: `[B, H, len, D]` for each layer.
struct Naive(Vec<(Tensor, Tensor)>);

impl Naive {
    fn len(&self, layer: usize) -> usize {
        self.0[layer].0.dims()[2]
    }

    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) {
        let (before_k, before_v) = self.0[layer].clone();
        self.0[layer] = (cat(&[before_k, k.clone()]), cat(&[before_v, v.clone()]));
    }

    fn truncate(&mut self, layer: usize, len: usize) {
        let len = len.min(self.len(layer));
        let (k, v) = &self.0[layer];
        self.0[layer] = (tokens(k, 0..len).contiguous().unwrap(), tokens(v, 0..len).contiguous().unwrap());
    }

    /// The tokens at these positions.
    fn at(t: &Tensor, positions: &[usize]) -> Tensor {
        let positions: Vec<u32> = positions.iter().map(|&at| at as u32).collect();
        t.index_select(&Tensor::new(positions, &Device::Cpu).unwrap(), 2).unwrap()
    }
}

/// Reads a layer in every way, and compares with `naive`. Attention of the last `pass` tokens must succeed.
fn check(case: &Case, cache: &Cache, naive: &Naive, layer: usize, pass: usize, random: &mut Random) {
    let len = naive.len(layer);
    assert_eq!(cache.len(layer), len);
    let (k, v) = &naive.0[layer];
    let last = len.saturating_sub(1);
    let seen: Vec<usize> = (0..len).filter(|&at| case.sees(last, at)).collect();
    let (got_k, got_v) = cache.keys_and_values(layer).unwrap();
    for (got, given) in [(&got_k, k), (&got_v, v)] {
        let expected = Naive::at(given, &seen);
        assert_eq!(got.dims(), expected.dims());
        for (got, expected) in numbers(got).into_iter().zip(numbers(&expected)) {
            assert!((got - expected).abs() <= case.rounding(), "{got} for {expected} of {len} tokens");
        }
    }
    if len == 0 {
        return;
    }
    // The expected values: in the visible range those that were read, which may be rounded. The rest must not be seen.
    let mut stored = [numbers(k), numbers(v)];
    for (stored, got) in stored.iter_mut().zip([&got_k, &got_v]) {
        let (mut from, rows) = (numbers(got).into_iter(), case.batch * HEADS);
        for row in 0..rows {
            for &at in &seen {
                let to = &mut stored[(row * len + at) * DIM..][..DIM];
                to.fill_with(|| from.next().unwrap());
            }
        }
    }
    let [k, v] = stored.map(|numbers| Tensor::from_vec(numbers, k.dims(), &Device::Cpu).unwrap());
    let exact = case.rounding() == 0.0;
    for rows in [1, 2, pass, 1 + random.below(len)] {
        if rows > len || (rows > 1 && !exact) {
            continue;
        }
        let q = random.tensor(&[case.batch, 2 * HEADS, rows, DIM]);
        let expected = dense(&q, &k, &v, f64::from(SCALE), |at, seen| case.sees(at, seen));
        match cache.attend(layer, &q, true) {
            Ok(got) => {
                let off = difference(&got, &expected);
                assert!(off < if exact { 1e-5 } else { 2e-4 }, "{case:?}: {rows} of {len} rows are off by {off}");
            }
            Err(error) => {
                assert!(rows > pass, "{case:?}, {rows} of {len}: {error}");
                assert!(error.to_string().contains("was freed"), "{error}");
            }
        }
    }
}

/// A random history of one cache. Returns how many truncations succeeded and how many were refused.
fn history(case: &Case, seed: u64, actions: usize) -> (usize, usize) {
    let mut random = Random::new(seed);
    let mut cache = case.cache();
    let empty = || random_tokens(case, &mut Random::new(0), 0);
    let mut naive = Naive((0..LAYERS).map(|_| empty()).collect());
    // The length of the cache before its last pass.
    let mut before = 0;
    let (mut refused, mut truncated) = (0, 0);
    for _ in 0..actions {
        let even = (0..LAYERS).all(|layer| naive.len(layer) == naive.len(0));
        let back = |random: &mut Random, len: usize| len - (1 + random.below(5)).min(len);
        match random.below(8) {
            0..4 => {
                let n = [1, 1, 1, 2, 5, 9][random.below(6)];
                if even {
                    before = naive.len(0);
                }
                for layer in 0..LAYERS {
                    let (k, v) = random_tokens(case, &mut random, n);
                    match cache.append(layer, &k, &v) {
                        Ok(()) => {
                            naive.append(layer, &k, &v);
                            check(case, &cache, &naive, layer, if even { n } else { 1 }, &mut random);
                        }
                        // A layer that was cleared, at positions whose blocks the window of the others has freed.
                        Err(error) => assert!(!even && error.to_string().contains("has no slot"), "{error}"),
                    }
                    (0..LAYERS).for_each(|layer| check(case, &cache, &naive, layer, 1, &mut random));
                }
            }
            4..6 if even || !cache.truncates_layers_alone() => {
                let len = if random.below(2) == 0 { before } else { back(&mut random, naive.len(0)) };
                let longest = (0..LAYERS).map(|layer| naive.len(layer)).max().unwrap();
                let result = match &mut cache {
                    Cache::Paged(cache) => cache.truncate(len),
                    // Layer after layer: if the first truncation succeeds, all do.
                    Cache::Updated(_) => (0..LAYERS)
                        .filter(|&layer| len < naive.len(layer))
                        .try_for_each(|layer| cache.truncate_layer(layer, len)),
                };
                match result {
                    Ok(()) => {
                        truncated += 1;
                        (0..LAYERS).for_each(|layer| naive.truncate(layer, len));
                    }
                    Err(KvError::OutOfWindow(error)) => {
                        refused += 1;
                        let Overflow::Circular { sink_tokens } = case.overflow else { panic!("{case:?}: {error}") };
                        let window = case.max_seq_len - sink_tokens;
                        assert_eq!((error.len, error.needed), (len, len.saturating_sub(window)));
                        assert!(error.needed < error.kept, "{error}");
                        assert!(
                            !even || len < before,
                            "{case:?}: truncated to {len} of {longest}, {before} before the pass: {error}"
                        );
                    }
                    Err(error) => panic!("{case:?}: {error}"),
                }
            }
            6 if cache.truncates_layers_alone() => {
                let layer = random.below(LAYERS);
                let len = back(&mut random, naive.len(layer));
                match cache.truncate_layer(layer, len) {
                    Ok(()) => naive.truncate(layer, len),
                    Err(error) => assert!(matches!(error, KvError::OutOfWindow(_)), "{error}"),
                }
            }
            7 if random.below(6) == 0 => {
                let layers = if random.below(2) == 0 { 0..LAYERS } else { 0..1 };
                for layer in layers {
                    cache.truncate_layer(layer, 0).unwrap();
                    naive.truncate(layer, 0);
                }
            }
            _ => {}
        }
        (0..LAYERS).for_each(|layer| check(case, &cache, &naive, layer, 1, &mut random));
    }
    (truncated, refused)
}

fn random_tokens(case: &Case, random: &mut Random, tokens: usize) -> (Tensor, Tensor) {
    let dims = [case.batch, HEADS, tokens, DIM];
    (random.tensor(&dims), random.tensor(&dims))
}

#[test]
fn a_truncated_ring_has_what_its_last_token_sees_or_is_an_error() {
    // Every key is 0, so that attention is the mean of the values, which are the positions.
    let append = |cache: &mut PagedKVCache, positions: std::ops::Range<usize>| {
        let values: Vec<f32> = positions.clone().map(|at| at as f32).collect();
        let values = Tensor::new(values, &Device::Cpu).unwrap().reshape((1, 1, positions.len(), 1)).unwrap();
        let values = values.broadcast_as((1, HEADS, positions.len(), DIM)).unwrap().contiguous().unwrap();
        let keys = values.zeros_like().unwrap();
        cache.layers_mut().iter_mut().for_each(|layer| layer.append(&keys, &values).unwrap());
    };
    let sees = |cache: &PagedKVCache, expected: &[f32]| {
        let q = Tensor::ones((1, HEADS, 1, DIM), DType::F32, &Device::Cpu).unwrap();
        let mean = expected.iter().sum::<f32>() / expected.len() as f32;
        for layer in cache.layers() {
            let got = numbers(&layer.attend(&q, SCALE, true).unwrap());
            assert!(got.iter().all(|x| *x == mean), "{got:?} for {mean}, the mean of {expected:?}");
            let values = numbers(&layer.values().unwrap());
            assert_eq!(values.into_iter().step_by(DIM).take(expected.len()).collect::<Vec<_>>(), expected);
        }
    };
    let cache = |max_seq_len| {
        let mut cache = Case { max_seq_len, ..RING }.builder().build().unwrap().cache();
        append(&mut cache, 0..8);
        append(&mut cache, 8..9);
        cache
    };
    // The token at position 6 sees position 3, in a block that was not visible any more when the second pass began.
    let mut four = cache(4);
    match four.truncate(7) {
        Err(KvError::OutOfWindow(error)) => assert_eq!((error.len, error.needed, error.kept), (7, 3, 4)),
        Ok(()) => sees(&four, &[3.0, 4.0, 5.0, 6.0]),
        Err(error) => panic!("{error}"),
    }
    sees(&four, &[5.0, 6.0, 7.0, 8.0]);
    four.truncate(8).unwrap();
    sees(&four, &[4.0, 5.0, 6.0, 7.0]);
    // The token at position 7 sees position 3; the next token does not.
    let mut five = cache(5);
    five.truncate(8).unwrap();
    sees(&five, &[3.0, 4.0, 5.0, 6.0, 7.0]);
    append(&mut five, 8..10);
    sees(&five, &[5.0, 6.0, 7.0, 8.0, 9.0]);
}

#[test]
fn a_ring_reads_as_a_naive_one_or_is_an_error() {
    let (mut truncated, mut refused) = (0, 0);
    let mut cases = vec![RING];
    for (max_seq_len, sink_tokens) in [(4, 1), (9, 4), (12, 0), (12, 5), (1, 0), (3, 2)] {
        for block_size in [1, 3, 4, 16] {
            cases.push(Case { max_seq_len, overflow: Overflow::Circular { sink_tokens }, block_size, ..RING });
        }
    }
    for max_seq_len in [20, 33, 40] {
        let overflow = Overflow::Circular { sink_tokens: max_seq_len % 7 };
        cases.push(Case { max_seq_len, overflow, block_size: 16, updated: true, ..RING });
    }
    cases.push(Case { batch: 3, ..RING });
    cases.push(Case { dtype: KvDtype::Int8, ..RING });
    for (seed, case) in cases.iter().enumerate() {
        for round in 0..3 {
            let (succeeded, failed) = history(case, (seed * 100 + round) as u64, 60);
            truncated += succeeded;
            refused += failed;
        }
    }
    assert!(truncated > 300 && refused > 100, "{truncated} truncations succeeded, {refused} were refused");
}

#[test]
fn caches_without_a_ring_are_truncated_to_any_length() {
    for (seed, (overflow, older_than, updated, batch)) in [
        (Overflow::Grow, None, false, 1),
        (Overflow::Grow, None, true, 1),
        (Overflow::Grow, Some(6), false, 1),
        (Overflow::Grow, Some(6), false, 2),
        (Overflow::Grow, Some(0), true, 1),
        (Overflow::Error, Some(9), false, 1),
        (Overflow::Error, None, false, 3),
    ]
    .into_iter()
    .enumerate()
    {
        let max_seq_len = if overflow == Overflow::Grow { 16 } else { 4096 };
        let case = Case { max_seq_len, overflow, older_than, updated, batch, ..RING };
        for round in 0..3 {
            let (_, refused) = history(&case, (seed * 100 + round) as u64, 60);
            assert_eq!(refused, 0, "{case:?}");
        }
    }
}

#[test]
fn a_matched_prefix_of_a_ring_can_be_read_at_once() {
    let pool = Case { max_seq_len: 6, ..RING }.builder().build().unwrap();
    let mut random = Random::new(7);
    let case = Case { max_seq_len: 6, ..RING };
    let (k, v) = random_tokens(&case, &mut random, 60);
    let prompt: Vec<u32> = (0..60).collect();
    // The longest first: its cached blocks match all tokens of the shorter ones but the last.
    for len in (2..=60).rev() {
        let mut first = pool.cache();
        assert!(first.match_prefix(&prompt[..len]).unwrap() < len);
        let known = first.seq_len();
        for layer in first.layers_mut() {
            layer.append(&tokens(&k, known..len), &tokens(&v, known..len)).unwrap();
        }
        drop(first);
        let mut again = pool.cache();
        let matched = again.match_prefix(&prompt[..len]).unwrap();
        let cache = Cache::Paged(again);
        let prefix = (tokens(&k, 0..matched).contiguous().unwrap(), tokens(&v, 0..matched).contiguous().unwrap());
        let naive = Naive(vec![prefix; LAYERS]);
        (0..LAYERS).for_each(|layer| check(&case, &cache, &naive, layer, 1, &mut random));
    }
}

#[test]
fn a_layer_is_read_before_its_turn_in_a_pass() {
    let case = Case { max_seq_len: 6, ..RING };
    let mut random = Random::new(8);
    let mut cache = case.cache();
    let mut naive = Naive((0..LAYERS).map(|_| random_tokens(&case, &mut Random::new(0), 0)).collect());
    for _ in 0..40 {
        for layer in 0..LAYERS {
            let (k, v) = random_tokens(&case, &mut random, 1);
            cache.append(layer, &k, &v).unwrap();
            naive.append(layer, &k, &v);
            (0..LAYERS).for_each(|layer| check(&case, &cache, &naive, layer, 1, &mut random));
        }
    }
}
