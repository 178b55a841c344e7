//! What attention knows of a row after some of its tokens, and how two such states become one.

use std::ops::Range;

use super::exp2::exp2;
use super::wide::{LANES, Wide};

/// For each row, after some tokens: the largest score (in powers of two), the sum of weights relative to it, and the weighted
/// sum of values.
pub(super) struct State {
    largest: Vec<f32>,
    weight: Vec<f32>,
    /// `(rows, chunks, sixteen)`.
    sums: Vec<[f32; LANES]>,
    /// Sixteens of a row.
    chunks: usize,
}

impl State {
    /// Rows of `dims` dimensions that have seen nothing.
    pub(super) fn new(rows: usize, dims: usize) -> Self {
        let chunks = dims / LANES;
        Self {
            largest: vec![f32::NEG_INFINITY; rows],
            weight: vec![0.0; rows],
            sums: vec![[0.0; LANES]; rows * chunks],
            chunks,
        }
    }

    pub(super) fn clear(&mut self) {
        self.largest.fill(f32::NEG_INFINITY);
        self.weight.fill(0.0);
        self.sums.fill([0.0; LANES]);
    }

    /// The sums of these rows.
    pub(super) fn sums(&mut self, rows: Range<usize>) -> &mut [[f32; LANES]] {
        &mut self.sums[rows.start * self.chunks..rows.end * self.chunks]
    }

    /// The largest score of a row.
    pub(super) fn largest(&self, row: usize) -> f32 {
        self.largest[row]
    }

    /// Takes in the weights of further tokens of a row: `weight` in sum, relative to `largest`. What it has summed shrinks
    /// to `shrink` times as much, as its largest score has grown.
    #[inline(always)]
    pub(super) fn grow<V: Wide>(&mut self, row: usize, largest: f32, shrink: f32, weight: f32) {
        self.weight[row] = self.weight[row] * shrink + weight;
        self.largest[row] = largest;
        if shrink != 1.0 {
            for sums in &mut self.sums[row * self.chunks..][..self.chunks] {
                V::load(sums).mul(V::splat(shrink)).store(sums);
            }
        }
    }

    /// Takes in what `other` knows: the same rows after later tokens.
    pub(super) fn merge(&mut self, other: &Self) {
        for row in 0..self.largest.len() {
            let (a, b) = (self.largest[row], other.largest[row]);
            // Where nothing has been seen there are zeros, which add nothing; sums that are not a number stay visible.
            let largest = if b > a { b } else { a };
            let (shrink, other_shrink) = (exp2(a - finite(largest)), exp2(b - finite(largest)));
            self.largest[row] = largest;
            self.weight[row] = self.weight[row] * shrink + other.weight[row] * other_shrink;
            let own = self.sums[row * self.chunks..][..self.chunks].as_flattened_mut();
            let others = other.sums[row * self.chunks..][..self.chunks].as_flattened();
            for (x, y) in own.iter_mut().zip(others) {
                *x = *x * shrink + y * other_shrink;
            }
        }
    }

    /// The logarithm, to base two, of the sum of a row's weights: what makes means over different tokens comparable. -inf if
    /// it has seen nothing that weighs anything.
    pub(super) fn log_weight(&self, row: usize) -> f32 {
        self.largest[row] + self.weight[row].log2()
    }

    /// Whether all that a row has summed is finite, `mean` is its mean, and its largest score within f32: whether it can have
    /// met nothing that is not finite. A score that is not a number makes the weights so, and with them the mean.
    pub(super) fn is_finite(&self, row: usize, mean: &[f32]) -> bool {
        let largest = self.largest[row];
        // All of them, without looking whether one is found: then the compiler compares several at a time.
        let all_finite = mean.iter().fold(true, |all, x| all & x.is_finite());
        f32::NEG_INFINITY < largest && largest < f32::MAX && all_finite
    }

    /// The weighted mean of a row's values; zeros if it has seen nothing that weighs anything. A zero is positive: the sign
    /// of a sum that is zero can be that of a value that weighs nothing.
    pub(super) fn mean(&self, row: usize, out: &mut [f32]) {
        let weight = self.weight[row];
        let by = if weight == 0.0 { 0.0 } else { 1.0 / weight };
        let sums = self.sums[row * self.chunks..][..self.chunks].as_flattened();
        for (out, x) in out.iter_mut().zip(sums) {
            *out = x * by + 0.0;
        }
    }
}

/// A largest score, to be subtracted: -inf, where nothing has been seen, would give what is not a number.
#[inline(always)]
pub(super) fn finite(largest: f32) -> f32 {
    if largest == f32::NEG_INFINITY { 0.0 } else { largest }
}
