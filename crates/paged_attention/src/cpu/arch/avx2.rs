//! AVX2 with FMA and F16C (half precision conversion): two registers of eight lanes. x86-64 since about 2013.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::cpu::wide::{LANES, Run, Wide};

/// Sixteen lanes in two registers.
#[derive(Clone, Copy)]
struct Avx2(__m256, __m256);

/// Whether this machine has the instruction sets that [`run`] enables.
pub(in crate::cpu) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Runs `run` with these instruction sets enabled.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn run<R: Run>(run: R) -> R::Output {
    run.run::<Avx2>()
}

/// The same instruction on both halves.
macro_rules! both {
    ($f:ident, $($x:expr),+) => { Self(instruction!($f($($x.0),+)), instruction!($f($($x.1),+))) };
}

impl Avx2 {
    /// Loads sixteen 16-bit numbers into two registers of eight.
    #[inline(always)]
    fn load_16_bit(from: &[bf16; LANES]) -> (__m128i, __m128i) {
        let (low, high) = from.split_at(8);
        (instruction!(_mm_loadu_si128(low.as_ptr().cast())), instruction!(_mm_loadu_si128(high.as_ptr().cast())))
    }
}

/// Shifts the bits of eight integers, and reads them as floats.
#[inline(always)]
fn shift_left<const BITS: i32>(x: __m256i) -> __m256 {
    instruction!(_mm256_castsi256_ps(instruction!(_mm256_slli_epi32::<BITS>(x))))
}

/// The lanes of both registers in turns.
#[inline(always)]
fn interleave(a: __m256, b: __m256) -> Avx2 {
    // Both work on halves of registers.
    let (low, high) = (instruction!(_mm256_unpacklo_ps(a, b)), instruction!(_mm256_unpackhi_ps(a, b)));
    Avx2(
        instruction!(_mm256_permute2f128_ps::<0x20>(low, high)),
        instruction!(_mm256_permute2f128_ps::<0x31>(low, high)),
    )
}

/// Adds to each sum the products of four unsigned bytes with four signed ones.
///
/// Two products are added in a signed 16-bit integer first: 255 * 64 * 2 and 127 * 127 * 2 fit.
#[inline(always)]
fn add_pairs(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    let pairs = instruction!(_mm256_maddubs_epi16(unsigned, signed));
    let quads = instruction!(_mm256_madd_epi16(pairs, instruction!(_mm256_set1_epi16(1))));
    instruction!(_mm256_add_epi32(sums, quads))
}

impl Wide for Avx2 {
    const COLUMNS: usize = 1;
    const INT_ROWS: usize = 2;
    const INT_COLUMNS: usize = 1;

    #[inline(always)]
    fn outlined<R: Run>(call: R) -> R::Output {
        instruction!(run(call))
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        let x = instruction!(_mm256_set1_ps(x));
        Self(x, x)
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(instruction!(_mm256_loadu_ps(from[..8].as_ptr())), instruction!(_mm256_loadu_ps(from[8..].as_ptr())))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        instruction!(_mm256_storeu_ps(to[..8].as_mut_ptr(), self.0));
        instruction!(_mm256_storeu_ps(to[8..].as_mut_ptr(), self.1));
    }

    #[inline(always)]
    fn load_f16(from: &[f16; LANES]) -> Self {
        let (low, high) = from.split_at(8);
        Self(
            instruction!(_mm256_cvtph_ps(instruction!(_mm_loadu_si128(low.as_ptr().cast())))),
            instruction!(_mm256_cvtph_ps(instruction!(_mm_loadu_si128(high.as_ptr().cast())))),
        )
    }

    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        let (low, high) = Self::load_16_bit(from);
        let widen = |half| shift_left::<16>(instruction!(_mm256_cvtepu16_epi32(half)));
        Self(widen(low), widen(high))
    }

    #[inline(always)]
    fn multiply_add(self, by: Self, plus: Self) -> Self {
        both!(_mm256_fmadd_ps, self, by, plus)
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        both!(_mm256_add_ps, self, other)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        both!(_mm256_sub_ps, self, other)
    }

    #[inline(always)]
    fn mul(self, by: Self) -> Self {
        both!(_mm256_mul_ps, self, by)
    }

    #[inline(always)]
    fn div(self, by: Self) -> Self {
        both!(_mm256_div_ps, self, by)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        both!(_mm256_max_ps, self, other)
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        both!(_mm256_min_ps, self, other)
    }

    #[inline(always)]
    fn max_or_nan(self, other: Self) -> Self {
        let max = |x, y| {
            let (x, y) = (instruction!(_mm256_castps_si256(x)), instruction!(_mm256_castps_si256(y)));
            instruction!(_mm256_castsi256_ps(instruction!(_mm256_max_epu32(x, y))))
        };
        Self(max(self.0, other.0), max(self.1, other.1))
    }

    #[inline(always)]
    fn select_less(self, limit: Self, then: Self, otherwise: Self) -> Self {
        let mask = (
            instruction!(_mm256_cmp_ps::<_CMP_LT_OQ>(self.0, limit.0)),
            instruction!(_mm256_cmp_ps::<_CMP_LT_OQ>(self.1, limit.1)),
        );
        both!(_mm256_blendv_ps, otherwise, then, mask)
    }

    #[inline(always)]
    fn interleave(self, other: Self) -> [Self; 2] {
        [interleave(self.0, other.0), interleave(self.1, other.1)]
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        let shifted = |x| shift_left::<23>(instruction!(_mm256_castps_si256(x)));
        Self(shifted(self.0), shifted(self.1))
    }

    type Ints = (__m256i, __m256i);
    type Quads = (__m256i, __m256i);

    #[inline(always)]
    fn zero_ints() -> Self::Ints {
        let zero = instruction!(_mm256_setzero_si256());
        (zero, zero)
    }

    #[inline(always)]
    fn load_quads(from: &[u8; 4 * LANES]) -> Self::Quads {
        let (low, high) = from.split_at(32);
        (instruction!(_mm256_loadu_si256(low.as_ptr().cast())), instruction!(_mm256_loadu_si256(high.as_ptr().cast())))
    }

    #[inline(always)]
    fn dot_unsigned(sums: Self::Ints, quads: Self::Quads, by: [i8; 4]) -> Self::Ints {
        let by = i32::from_ne_bytes(by.map(|x| x as u8));
        let by = instruction!(_mm256_set1_epi32(by));
        (add_pairs(sums.0, quads.0, by), add_pairs(sums.1, quads.1, by))
    }

    #[inline(always)]
    fn dot_signed(sums: Self::Ints, quads: Self::Quads, by: [u8; 4]) -> Self::Ints {
        let by = instruction!(_mm256_set1_epi32(i32::from_ne_bytes(by)));
        (add_pairs(sums.0, by, quads.0), add_pairs(sums.1, by, quads.1))
    }

    #[inline(always)]
    fn combine<const SHIFT: i32>(high: Self::Ints, low: Self::Ints, subtract: i32) -> Self::Ints {
        let subtract = instruction!(_mm256_set1_epi32(subtract));
        let combine = |high, low| {
            let sum = instruction!(_mm256_add_epi32(instruction!(_mm256_slli_epi32::<SHIFT>(high)), low));
            instruction!(_mm256_sub_epi32(sum, subtract))
        };
        (combine(high.0, low.0), combine(high.1, low.1))
    }

    #[inline(always)]
    fn from_ints(ints: Self::Ints) -> Self {
        Self(instruction!(_mm256_cvtepi32_ps(ints.0)), instruction!(_mm256_cvtepi32_ps(ints.1)))
    }

    #[inline(always)]
    fn round_to_ints(self, to: &mut [i32; LANES]) {
        let (low, high) = to.split_at_mut(8);
        instruction!(_mm256_storeu_si256(low.as_mut_ptr().cast(), instruction!(_mm256_cvtps_epi32(self.0))));
        instruction!(_mm256_storeu_si256(high.as_mut_ptr().cast(), instruction!(_mm256_cvtps_epi32(self.1))));
    }
}
