//! What the algorithm asks of an instruction set: sixteen numbers at a time.

use half::{bf16, f16};

use super::kernel::Run;

/// Numbers that are computed at a time.
pub(super) const LANES: usize = 16;

/// Sixteen numbers, in as many registers as they take.
///
/// Every kernel computes the same sums in the same order, so that they differ only where multiplying and adding is one
/// rounding instead of two.
pub(super) trait Wide: Copy {
    /// How many of these a product computes side by side, beside four rows: what the registers hold.
    const COLUMNS: usize;
    /// How many rows a product of integers computes at a time.
    const INT_ROWS: usize;
    /// How many sums it computes side by side for each of them.
    const INT_COLUMNS: usize;

    /// Runs `run` in a function of its own, which has all registers to itself: for the innermost loops.
    fn apart<R: Run>(run: R) -> R::Output;

    fn splat(x: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    fn load_f16(from: &[f16; LANES]) -> Self;
    fn load_bf16(from: &[bf16; LANES]) -> Self;

    /// `self * by + plus`.
    fn multiply_add(self, by: Self, plus: Self) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, by: Self) -> Self;
    fn div(self, by: Self) -> Self;
    /// `self > other ? self : other`: `other` if one of them is not a number.
    fn larger(self, other: Self) -> Self;
    /// `self < other ? self : other`: `other` if one of them is not a number.
    fn smaller(self, other: Self) -> Self;
    /// Of numbers that are not negative the larger one; what is not a number is larger than all of them. Their bits are
    /// compared, as unsigned integers.
    fn larger_or_nan(self, other: Self) -> Self;
    /// `self < limit ? then : otherwise`.
    fn if_less(self, limit: Self, then: Self, otherwise: Self) -> Self;
    /// `2^n` for a number whose lowest bits are `n + 127`.
    fn power_of_two(self) -> Self;

    /// Sixteen sums of integers.
    type Ints: Copy;
    /// Sixteen groups of four bytes.
    type Quads: Copy;

    fn no_ints() -> Self::Ints;
    fn load_quads(from: &[u8; 4 * LANES]) -> Self::Quads;
    /// Adds to each sum the products of its four bytes, unsigned, and the four in `by`, each from -64 to 64.
    fn dot_unsigned(sums: Self::Ints, quads: Self::Quads, by: [i8; 4]) -> Self::Ints;
    /// Adds to each sum the products of its four bytes, signed, and the four in `by`, each from 0 to 127.
    fn dot_signed(sums: Self::Ints, quads: Self::Quads, by: [u8; 4]) -> Self::Ints;
    /// `(high << SHIFT) + low - less`.
    fn combine<const SHIFT: i32>(high: Self::Ints, low: Self::Ints, less: i32) -> Self::Ints;
    fn floats(ints: Self::Ints) -> Self;
    /// Each number rounded to the nearest integer.
    fn rounded(self, to: &mut [i32; LANES]);

    /// Each number, from 0 to below `2^(8 + SHIFT)`, rounded to the nearest integer and cut in two: `(high << SHIFT) + low`.
    #[inline(always)]
    fn split<const SHIFT: i32>(self, high: &mut [u8; LANES], low: &mut [u8; LANES]) {
        let mut ints = [0; LANES];
        self.rounded(&mut ints);
        *high = ints.map(|x| (x >> SHIFT) as u8);
        *low = ints.map(|x| (x & ((1 << SHIFT) - 1)) as u8);
    }
}

/// The largest of sixteen numbers.
#[inline(always)]
pub(super) fn largest<V: Wide>(x: V) -> f32 {
    let mut lanes = [0.0; LANES];
    x.store(&mut lanes);
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest of sixteen numbers that are not negative; what is not a number is larger than all of them.
#[inline(always)]
pub(super) fn largest_or_nan<V: Wide>(x: V) -> f32 {
    let mut lanes = [0.0; LANES];
    x.store(&mut lanes);
    f32::from_bits(lanes.map(f32::to_bits).into_iter().fold(0, u32::max))
}

/// The sum of sixteen numbers, as a tree.
#[inline(always)]
pub(super) fn sum<V: Wide>(x: V) -> f32 {
    let mut lanes = [0.0; LANES];
    x.store(&mut lanes);
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
