//! Random numbers, and dense attention in f64 as the reference of the tests.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test binary uses only some of it

pub mod caches;
pub mod model;

use std::ops::Range;

use bitnet_kv::BlocksInUse;
use candle_core::{Device, Tensor};

/// Numbers in (-1, 1), the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    pub fn number(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn tensor(&mut self, dims: &[usize]) -> Tensor {
        let numbers: Vec<f32> = (0..dims.iter().product()).map(|_| self.number()).collect();
        Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap()
    }
}

/// The numbers of blocks in the storage of new tokens, and in 8-bit storage.
pub fn counts(blocks: BlocksInUse) -> [usize; 2] {
    [blocks.recent, blocks.compressed]
}

pub fn numbers(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Concatenates `[B, H, T, D]` tensors along the tokens.
pub fn cat(parts: &[Tensor]) -> Tensor {
    Tensor::cat(parts, 2).unwrap().contiguous().unwrap()
}

/// Tokens `range` of `[B, H, T, D]`.
pub fn tokens(t: &Tensor, range: Range<usize>) -> Tensor {
    t.narrow(2, range.start, range.len()).unwrap()
}

/// `[B, H, T, D]` as `[T, H, D]`, for a batch of one.
pub fn flat(t: &Tensor) -> Tensor {
    t.squeeze(0).unwrap().transpose(0, 1).unwrap().contiguous().unwrap()
}

/// `softmax(scale q kᵀ) v` in f64, `[B, heads, T, D]`. The queries are those of the last `T` tokens, and the token at
/// position `p` sees each position for which `sees(p, position)`.
pub fn dense(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, sees: impl Fn(usize, usize) -> bool) -> Vec<f64> {
    let (batch, heads, rows, dim) = q.dims4().unwrap();
    let (_, kv_heads, len, _) = k.dims4().unwrap();
    let (q, k, v) = (numbers(q), numbers(k), numbers(v));
    let mut out = Vec::new();
    for b in 0..batch {
        for head in 0..heads {
            let kv = b * kv_heads + head / (heads / kv_heads);
            for row in 0..rows {
                let q = &q[((b * heads + head) * rows + row) * dim..][..dim];
                let seen: Vec<usize> = (0..len).filter(|&at| sees(len - rows + row, at)).collect();
                let score = |&at: &usize| -> f64 {
                    let k = &k[(kv * len + at) * dim..][..dim];
                    scale * q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
                };
                let scores: Vec<f64> = seen.iter().map(score).collect();
                let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let value = |at: usize| f64::from(v[(kv * len + at) * dim + d]);
                    out.push(seen.iter().zip(&weights).map(|(&at, weight)| weight * value(at)).sum::<f64>() / total);
                }
            }
        }
    }
    out
}

/// The largest difference, relative to the largest number of the reference.
pub fn difference(got: &Tensor, reference: &[f64]) -> f64 {
    let got = numbers(got);
    assert_eq!(got.len(), reference.len());
    let largest = reference.iter().fold(0f64, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(reference).map(|(&a, b)| (f64::from(a) - b).abs());
    // `max` would swallow a NaN.
    worst.fold(0f64, |m, x| if x.is_nan() || x > m { x } else { m }) / largest
}
