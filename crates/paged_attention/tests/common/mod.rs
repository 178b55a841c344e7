//! Shared helpers: random numbers, dense attention in f64 as a reference, and every backend and kernel of this machine.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test binary uses a different part

use candle_core::{DType, Device, Tensor};
use paged_attention::{Backend, Kernel, KvCache, KvCacheBuilder, KvDtype, TableOptions};

/// A generator of random numbers, the same numbers for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    /// A number in [-1, 1).
    pub fn number(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }
}

/// A tensor `(tokens, heads, head_dim)` of these numbers.
pub fn tensor(numbers: &[f32], heads: usize, head_dim: usize, dtype: DType) -> Tensor {
    let tokens = numbers.len() / (heads * head_dim);
    Tensor::from_slice(numbers, (tokens, heads, head_dim), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// These numbers, `(_, head_dim)`, as they are read back after being stored in `dtype`.
pub fn stored_as(numbers: &[f32], head_dim: usize, dtype: KvDtype) -> Vec<f32> {
    let round = |dtype| rounded(numbers, dtype);
    match dtype {
        KvDtype::F16 => round(DType::F16),
        KvDtype::Bf16 => round(DType::BF16),
        KvDtype::Int8 => numbers
            .chunks_exact(head_dim)
            .flat_map(|row| {
                // A number that is not finite makes the whole row NaN, because the row shares one scale.
                let finite = row.iter().all(|x| x.is_finite());
                let largest = row.iter().fold(0f32, |m, x| m.max(x.abs()));
                let step = f64::from(largest) / 127.0;
                let stored = move |x: &f32| (f64::from((x * (127.0 / largest)).round_ties_even()) * step) as f32;
                row.iter().map(move |x| if finite { stored(x) } else { f32::NAN })
            })
            .collect(),
        _ => numbers.to_vec(),
    }
}

/// These numbers, rounded to `dtype`.
pub fn rounded(numbers: &[f32], dtype: DType) -> Vec<f32> {
    let tensor = Tensor::from_slice(numbers, numbers.len(), &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// Dense attention of one token in f64: `softmax(score(scale q kᵀ)) v`, `(heads, head_dim)`, over the keys and values
/// `(_, kv_heads, head_dim)` at the positions `seen`. `score(head, position, product)` turns a product into a score.
#[allow(clippy::too_many_arguments)]
pub fn dense(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    seen: &[usize],
    kv_heads: usize,
    head_dim: usize,
    scale: f64,
    score: impl Fn(usize, usize, f64) -> f64,
) -> Vec<f64> {
    let heads = q.len() / head_dim;
    let mut out = Vec::new();
    for head in 0..heads {
        let at = |token: usize| (token * kv_heads + head / (heads / kv_heads)) * head_dim;
        let q = &q[head * head_dim..][..head_dim];
        let scores: Vec<f64> = seen
            .iter()
            .map(|&t| {
                let product: f64 = q.iter().zip(&k[at(t)..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                score(head, t, scale * product)
            })
            .collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..head_dim {
            let sum: f64 = seen.iter().zip(&weights).map(|(&t, weight)| weight * f64::from(v[at(t) + d])).sum();
            out.push(sum / total);
        }
    }
    out
}

/// The largest absolute difference, divided by the largest absolute number of the reference. NaN if a difference is
/// NaN.
pub fn difference(got: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(got.len(), reference.len());
    let largest = reference.iter().fold(0f64, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(reference).map(|(&a, b)| (f64::from(a) - b).abs());
    // `f64::max` would ignore a NaN.
    worst.fold(0f64, |m, x| if x.is_nan() || x > m { x } else { m }) / largest
}

/// Whether a row equals the reference: NaN and infinities at the same indices, and the other numbers within `bound`
/// relative to the largest finite number of the reference.
pub fn agrees(got: &[f32], reference: &[f64], bound: f64) -> bool {
    assert_eq!(got.len(), reference.len());
    let largest = reference.iter().filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
    got.iter().zip(reference).all(|(&got, &expected)| {
        let got = f64::from(got);
        if expected.is_finite() {
            (got - expected).abs() <= bound * largest
        } else {
            got == expected || (got.is_nan() && expected.is_nan())
        }
    })
}

/// Sets a backend and a kernel on a builder.
pub type Configure = Box<dyn Fn(KvCacheBuilder) -> KvCacheBuilder + Sync>;

/// The gather backend, and the fused backend with every kernel that this machine can run, by name.
pub fn backends() -> Vec<(&'static str, Configure)> {
    let mut backends: Vec<(&str, Configure)> =
        vec![("gather", Box::new(|b: KvCacheBuilder| b.backend(Backend::Gather)))];
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        backends.push((kernel.name(), Box::new(move |b: KvCacheBuilder| b.backend(Backend::Fused).kernel(kernel))));
    }
    backends
}

/// Writes NaN into every slot, so that a read of a slot that was not written by the test is detected.
pub fn poison(cache: &KvCache) {
    let shape = cache.shape();
    // Private, so that these blocks are not cached: a later prefix match finds only what the test has written.
    let mut table = cache.table_with(&TableOptions::default().private());
    let tokens = cache.pool().available() * cache.pool().block_size();
    let mut step = cache.step();
    step.push(&mut table, &vec![0; tokens]).unwrap();
    let nan =
        tensor(&vec![f32::NAN; tokens * shape.kv_heads * shape.head_dim], shape.kv_heads, shape.head_dim, DType::F32);
    for layer in 0..shape.layers {
        step.write(layer, &nan, &nan).unwrap();
    }
}
