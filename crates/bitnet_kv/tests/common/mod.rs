//! Tensors of random numbers, and dense attention in f64 as the reference of the tests.
#![allow(dead_code, unused_imports, unreachable_pub, clippy::unwrap_used)] // each test binary uses only some of it

pub mod caches;
pub mod model;

use std::ops::Range;

use bitnet_kv::BlocksInUse;
use candle_core::{Device, Tensor};
pub use test_support::Random;

/// Tensors of random numbers.
pub trait RandomTensor {
    /// A tensor of these dimensions with numbers in [-1, 1).
    fn tensor(&mut self, dims: &[usize]) -> Tensor;
}

impl RandomTensor for Random {
    fn tensor(&mut self, dims: &[usize]) -> Tensor {
        Tensor::from_vec(self.numbers(dims.iter().product()), dims, &Device::Cpu).unwrap()
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
    let mut out = vec![0.0; batch * heads * rows * dim];
    for b in 0..batch {
        let [q, k, v] = [q, k, v].map(|t| numbers(&flat(&t.narrow(0, b, 1).unwrap())));
        for (row, q) in q.chunks_exact(heads * dim).enumerate() {
            let seen: Vec<usize> = (0..len).filter(|&at| sees(len - rows + row, at)).collect();
            let attended = test_support::dense(q, &k, &v, &seen, kv_heads, dim, scale, |_, _, score| score);
            for (head, attended) in attended.chunks_exact(dim).enumerate() {
                out[((b * heads + head) * rows + row) * dim..][..dim].copy_from_slice(attended);
            }
        }
    }
    out
}

/// The largest difference, relative to the largest number of the reference.
pub fn difference(got: &Tensor, reference: &[f64]) -> f64 {
    test_support::difference(&numbers(got), reference)
}
