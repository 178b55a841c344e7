//! The online softmax state of each row, and how two states over different tokens are merged.

use std::ops::Range;

use super::exp2::exp2;
use super::wide::{LANES, Wide};

/// For each row, over the tokens seen so far: the running maximum of the scores (as exponents of two), the running sum
/// of weights relative to it, and the accumulators, which hold the weighted sum of values.
pub(super) struct State {
    running_max: Vec<f32>,
    running_sum: Vec<f32>,
    /// `(rows, vectors, 16)`.
    accumulators: Vec<[f32; LANES]>,
    /// Vectors of 16 lanes per row.
    vectors: usize,
}

impl State {
    /// Rows of `dims` dimensions that have seen no token.
    pub(super) fn new(rows: usize, dims: usize) -> Self {
        let vectors = dims / LANES;
        Self {
            running_max: vec![f32::NEG_INFINITY; rows],
            running_sum: vec![0.0; rows],
            accumulators: vec![[0.0; LANES]; rows * vectors],
            vectors,
        }
    }

    /// Makes these states of `rows` rows of `dims` dimensions that have seen no token, in the same memory.
    pub(super) fn reset(&mut self, rows: usize, dims: usize) {
        self.vectors = dims / LANES;
        self.running_max.resize(rows, 0.0);
        self.running_sum.resize(rows, 0.0);
        self.accumulators.resize(rows * self.vectors, [0.0; LANES]);
        self.clear();
    }

    pub(super) fn clear(&mut self) {
        self.running_max.fill(f32::NEG_INFINITY);
        self.running_sum.fill(0.0);
        self.accumulators.fill([0.0; LANES]);
    }

    /// The states of the rows `part` of each head, where there are `rows` rows of each.
    pub(super) fn part(&self, rows: usize, part: Range<usize>) -> Rows<'_> {
        Rows { state: self, rows, part }
    }

    /// Sets what the first row has seen.
    #[cfg(test)]
    pub(super) fn set_seen(&mut self, max: f32, sum: f32) {
        (self.running_max[0], self.running_sum[0]) = (max, sum);
    }

    /// Several states one after the other.
    #[cfg(test)]
    pub(super) fn of_rows(states: Vec<State>) -> Self {
        let mut all = State::new(0, states[0].vectors * LANES);
        for state in states {
            all.running_max.extend(state.running_max);
            all.running_sum.extend(state.running_sum);
            all.accumulators.extend(state.accumulators);
        }
        all
    }

    /// The accumulators of these rows.
    pub(super) fn accumulators(&mut self, rows: Range<usize>) -> &mut [[f32; LANES]] {
        &mut self.accumulators[rows.start * self.vectors..rows.end * self.vectors]
    }

    /// The running maximum of a row.
    pub(super) fn running_max(&self, row: usize) -> f32 {
        self.running_max[row]
    }

    /// Sets a row's running maximum to `max`, multiplies its running sum and accumulators by `rescale`, since they were
    /// relative to the old maximum, and adds `weights`, the sum of the new tokens' weights relative to `max`.
    #[inline(always)]
    pub(super) fn update<V: Wide>(&mut self, row: usize, max: f32, rescale: f32, weights: f32) {
        self.running_sum[row] = self.running_sum[row] * rescale + weights;
        self.running_max[row] = max;
        if rescale != 1.0 {
            for accumulator in &mut self.accumulators[row * self.vectors..][..self.vectors] {
                V::load(accumulator).mul(V::splat(rescale)).store(accumulator);
            }
        }
    }

    /// The number of rows.
    pub(super) fn rows(&self) -> usize {
        self.running_max.len()
    }

    /// Merges `other`, the state of the same rows over later tokens, into this one.
    pub(super) fn merge(&mut self, other: &Self) {
        self.merge_rows(&other.part(other.rows(), 0..other.rows()));
    }

    /// The same, with the state of the same rows among others.
    pub(super) fn merge_rows(&mut self, others: &Rows<'_>) {
        let other = others.state;
        for (row, other_row) in others.of_heads().flatten().enumerate() {
            let (a, b) = (self.running_max[row], other.running_max[other_row]);
            // A row that has seen no token has only zeros, which add nothing. NaN in the accumulators stays NaN.
            let max = if b > a { b } else { a };
            let (rescale, other_rescale) = (exp2(a - finite(max)), exp2(b - finite(max)));
            self.running_max[row] = max;
            self.running_sum[row] = self.running_sum[row] * rescale + other.running_sum[other_row] * other_rescale;
            let own = self.accumulators[row * self.vectors..][..self.vectors].as_flattened_mut();
            let others = other.accumulators[other_row * self.vectors..][..self.vectors].as_flattened();
            for (x, y) in own.iter_mut().zip(others) {
                *x = *x * rescale + y * other_rescale;
            }
        }
    }

    /// Adds the weight of a sink logit to a row's sum. It has no value, so only the running maximum and sum change, and
    /// the accumulators where they are relative to another maximum.
    pub(super) fn add_sink_logit(&mut self, row: usize, logit: f32) {
        let score = logit * std::f32::consts::LOG2_E;
        if score == f32::NEG_INFINITY {
            return;
        }
        let before = self.running_max[row];
        let max = if score > before { score } else { before };
        let rescale = exp2(before - max);
        self.running_max[row] = max;
        self.running_sum[row] = self.running_sum[row] * rescale + exp2(score - max);
        for x in self.accumulators[row * self.vectors..][..self.vectors].as_flattened_mut() {
            *x *= rescale;
        }
    }

    /// The log-sum-exp of a row's scores, to base two. Outputs over different tokens are merged by it. -inf if all
    /// weights that the row has seen are zero, or if it has seen none.
    pub(super) fn lse(&self, row: usize) -> f32 {
        self.running_max[row] + self.running_sum[row].log2()
    }

    /// Whether all numbers that a row has summed were finite: all of `output`, the row's output, is finite, and its
    /// running maximum is above -inf and below the largest f32. A NaN score makes the weights NaN, and with them the
    /// output.
    pub(super) fn is_finite(&self, row: usize, output: &[f32]) -> bool {
        let max = self.running_max[row];
        // Without an early exit, so that the compiler can vectorise the comparison.
        let all_finite = output.iter().fold(true, |all, x| all & x.is_finite());
        f32::NEG_INFINITY < max && max < f32::MAX && all_finite
    }

    /// Writes the output of a row: its accumulators divided by its running sum, or zeros if all weights that it has
    /// seen are zero. A zero is written as +0: a value of weight zero can make the sign of a zero sum negative.
    pub(super) fn write_output(&self, row: usize, out: &mut [f32]) {
        let running_sum = self.running_sum[row];
        let by = if running_sum == 0.0 { 0.0 } else { 1.0 / running_sum };
        let accumulators = self.accumulators[row * self.vectors..][..self.vectors].as_flattened();
        for (out, x) in out.iter_mut().zip(accumulators) {
            *out = x * by + 0.0;
        }
    }
}

/// The states of some rows of each head.
pub(super) struct Rows<'a> {
    state: &'a State,
    /// How many rows each head has, and which of them.
    rows: usize,
    part: Range<usize>,
}

impl Rows<'_> {
    /// The indices of each head's rows.
    fn of_heads(&self) -> impl Iterator<Item = Range<usize>> {
        let Self { rows, part, .. } = self;
        (0..self.state.rows() / (*rows).max(1)).map(move |head| head * rows + part.start..head * rows + part.end)
    }

    /// A copy.
    pub(super) fn copy(&self) -> State {
        let State { vectors, .. } = *self.state;
        let rows = self.of_heads().map(|rows| rows.len()).sum();
        let (mut running_max, mut running_sum) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        let mut accumulators = Vec::with_capacity(rows * vectors);
        for rows in self.of_heads() {
            running_max.extend_from_slice(&self.state.running_max[rows.clone()]);
            running_sum.extend_from_slice(&self.state.running_sum[rows.clone()]);
            accumulators.extend_from_slice(&self.state.accumulators[rows.start * vectors..rows.end * vectors]);
        }
        State { running_max, running_sum, accumulators, vectors }
    }
}

/// A maximum to subtract from scores: 0 in place of -inf, the maximum of a row that has seen no token. (-inf minus -inf
/// is NaN.)
#[inline(always)]
pub(super) fn finite(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}
