//! The SIMD interface that the algorithm is written with: a vector of sixteen lanes.

use half::{bf16, f16};

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// A computation that can run with any instruction set.
///
/// `run` and the functions that it calls must be inlined into the shim that enables the instruction set.
pub(super) trait Run {
    type Output;

    fn run<V: Wide>(self) -> Self::Output;
}

/// A vector of sixteen f32, in one register or several.
///
/// Every kernel computes the same sums in the same order. Their results differ only because a multiply-add is rounded
/// once in some and twice in others.
///
/// The methods are safe, although an instruction set has to be enabled for them: each implementation is private to its
/// file, where only `run`, which enables the instruction set, names it. So no other code can call them without.
pub(super) trait Wide: Copy {
    /// Register blocking of a product of floats: how many vectors of accumulators it keeps for each of up to four rows.
    /// As many as fit into the registers.
    const COLUMNS: usize;
    /// Register blocking of a product of integers: how many rows it computes at a time.
    const INT_ROWS: usize;
    /// How many vectors of sums a product of integers computes for each of these rows at a time.
    const INT_COLUMNS: usize;

    /// Runs `run` in a function that is not inlined, so that it has all registers to itself: for the innermost loops.
    fn outlined<R: Run>(run: R) -> R::Output;

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
    /// `self > other ? self : other`: `other` if either is NaN.
    fn max(self, other: Self) -> Self;
    /// `self < other ? self : other`: `other` if either is NaN.
    fn min(self, other: Self) -> Self;
    /// The larger of two numbers that are not negative. NaN is larger than every number: the bits are compared, as
    /// unsigned integers.
    fn max_or_nan(self, other: Self) -> Self;
    /// `self < limit ? then : otherwise`.
    fn select_less(self, limit: Self, then: Self, otherwise: Self) -> Self;
    /// Two vectors that have the lanes of both in turns: `self[0], other[0], self[1], ..`, and the same from lane 8 on.
    fn interleave(self, other: Self) -> [Self; 2];
    /// `2^n` for a float whose lowest bits are `n + 127`.
    fn power_of_two(self) -> Self;

    /// Sixteen i32 sums.
    type Ints: Copy;
    /// Sixteen groups of four bytes.
    type Quads: Copy;

    fn zero_ints() -> Self::Ints;
    fn load_quads(from: &[u8; 4 * LANES]) -> Self::Quads;
    /// Adds to each sum the dot product of its four bytes, unsigned, with the four in `by`, each from -64 to 64.
    fn dot_unsigned(sums: Self::Ints, quads: Self::Quads, by: [i8; 4]) -> Self::Ints;
    /// Adds to each sum the dot product of its four bytes, signed, with the four in `by`, each from 0 to 127.
    fn dot_signed(sums: Self::Ints, quads: Self::Quads, by: [u8; 4]) -> Self::Ints;
    /// `(high << SHIFT) + low - subtract`.
    fn combine<const SHIFT: i32>(high: Self::Ints, low: Self::Ints, subtract: i32) -> Self::Ints;
    /// Converts each sum to f32.
    fn from_ints(ints: Self::Ints) -> Self;
    /// Rounds each lane to the nearest integer.
    fn round_to_ints(self, to: &mut [i32; LANES]);

    /// Rounds each lane, from 0 to below `2^(8 + SHIFT)`, to the nearest integer, and splits it into two bytes:
    /// `(high << SHIFT) + low`.
    #[inline(always)]
    fn split<const SHIFT: i32>(self, high: &mut [u8; LANES], low: &mut [u8; LANES]) {
        let mut ints = [0; LANES];
        self.round_to_ints(&mut ints);
        *high = ints.map(|x| (x >> SHIFT) as u8);
        *low = ints.map(|x| (x & ((1 << SHIFT) - 1)) as u8);
    }
}

/// The largest lane.
#[inline(always)]
pub(super) fn reduce_max<V: Wide>(x: V) -> f32 {
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

/// The largest of sixteen lanes that are not negative. NaN is larger than every number.
#[inline(always)]
pub(super) fn reduce_max_or_nan<V: Wide>(x: V) -> f32 {
    let mut lanes = [0.0; LANES];
    x.store(&mut lanes);
    f32::from_bits(lanes.map(f32::to_bits).into_iter().fold(0, u32::max))
}

/// The sum of all lanes, added as a tree.
#[inline(always)]
pub(super) fn reduce_sum<V: Wide>(x: V) -> f32 {
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
