//! AVX-512 with VNNI: one register of sixteen lanes. Intel since Ice Lake, AMD since Zen 4.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::cpu::wide::{LANES, Run, Wide};

/// Sixteen lanes in one register.
#[derive(Clone, Copy)]
struct Avx512(__m512);

/// Whether this machine has the instruction sets that [`run`] enables.
pub(in crate::cpu) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Runs `run` with these instruction sets enabled.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::cpu) fn run<R: Run>(run: R) -> R::Output {
    run.run::<Avx512>()
}

/// Of two vectors, the first halves of both in turns: lanes from 16 on are those of the second vector.
const LOW_LANES: [i32; LANES] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
/// The second halves.
const HIGH_LANES: [i32; LANES] = [8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31];

#[inline(always)]
fn splat_int(x: i32) -> __m512i {
    instruction!(_mm512_set1_epi32(x))
}

impl Wide for Avx512 {
    const COLUMNS: usize = 4;
    const INT_ROWS: usize = 4;
    const INT_COLUMNS: usize = 2;

    #[inline(always)]
    fn outlined<R: Run>(call: R) -> R::Output {
        instruction!(run(call))
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(instruction!(_mm512_set1_ps(x)))
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(instruction!(_mm512_loadu_ps(from.as_ptr())))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        instruction!(_mm512_storeu_ps(to.as_mut_ptr(), self.0));
    }

    #[inline(always)]
    fn load_f16(from: &[f16; LANES]) -> Self {
        Self(instruction!(_mm512_cvtph_ps(instruction!(_mm256_loadu_si256(from.as_ptr().cast())))))
    }

    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        let upper = instruction!(_mm512_cvtepu16_epi32(instruction!(_mm256_loadu_si256(from.as_ptr().cast()))));
        Self(instruction!(_mm512_castsi512_ps(instruction!(_mm512_slli_epi32::<16>(upper)))))
    }

    #[inline(always)]
    fn multiply_add(self, by: Self, plus: Self) -> Self {
        Self(instruction!(_mm512_fmadd_ps(self.0, by.0, plus.0)))
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(instruction!(_mm512_add_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(instruction!(_mm512_sub_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn mul(self, by: Self) -> Self {
        Self(instruction!(_mm512_mul_ps(self.0, by.0)))
    }

    #[inline(always)]
    fn div(self, by: Self) -> Self {
        Self(instruction!(_mm512_div_ps(self.0, by.0)))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(instruction!(_mm512_max_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(instruction!(_mm512_min_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn max_or_nan(self, other: Self) -> Self {
        let (x, y) = (instruction!(_mm512_castps_si512(self.0)), instruction!(_mm512_castps_si512(other.0)));
        Self(instruction!(_mm512_castsi512_ps(instruction!(_mm512_max_epu32(x, y)))))
    }

    #[inline(always)]
    fn select_less(self, limit: Self, then: Self, otherwise: Self) -> Self {
        let mask = instruction!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, limit.0));
        Self(instruction!(_mm512_mask_blend_ps(mask, otherwise.0, then.0)))
    }

    #[inline(always)]
    fn interleave(self, other: Self) -> [Self; 2] {
        let low = instruction!(_mm512_loadu_si512(LOW_LANES.as_ptr().cast()));
        let high = instruction!(_mm512_loadu_si512(HIGH_LANES.as_ptr().cast()));
        [low, high].map(|lanes| Self(instruction!(_mm512_permutex2var_ps(self.0, lanes, other.0))))
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        let bits = instruction!(_mm512_castps_si512(self.0));
        Self(instruction!(_mm512_castsi512_ps(instruction!(_mm512_slli_epi32::<23>(bits)))))
    }

    type Ints = __m512i;
    type Quads = __m512i;

    #[inline(always)]
    fn zero_ints() -> __m512i {
        instruction!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn load_quads(from: &[u8; 4 * LANES]) -> __m512i {
        instruction!(_mm512_loadu_si512(from.as_ptr().cast()))
    }

    #[inline(always)]
    fn dot_unsigned(sums: __m512i, quads: __m512i, by: [i8; 4]) -> __m512i {
        let by = i32::from_ne_bytes(by.map(|x| x as u8));
        instruction!(_mm512_dpbusd_epi32(sums, quads, splat_int(by)))
    }

    #[inline(always)]
    fn dot_signed(sums: __m512i, quads: __m512i, by: [u8; 4]) -> __m512i {
        instruction!(_mm512_dpbusd_epi32(sums, splat_int(i32::from_ne_bytes(by)), quads))
    }

    #[inline(always)]
    fn combine<const SHIFT: i32>(high: __m512i, low: __m512i, subtract: i32) -> __m512i {
        let shifted = instruction!(_mm512_sllv_epi32(high, splat_int(SHIFT)));
        let sum = instruction!(_mm512_add_epi32(shifted, low));
        instruction!(_mm512_sub_epi32(sum, splat_int(subtract)))
    }

    #[inline(always)]
    fn from_ints(ints: __m512i) -> Self {
        Self(instruction!(_mm512_cvtepi32_ps(ints)))
    }

    #[inline(always)]
    fn round_to_ints(self, to: &mut [i32; LANES]) {
        instruction!(_mm512_storeu_si512(to.as_mut_ptr().cast(), instruction!(_mm512_cvtps_epi32(self.0))));
    }

    #[inline(always)]
    fn split<const SHIFT: i32>(self, high: &mut [u8; LANES], low: &mut [u8; LANES]) {
        let ints = instruction!(_mm512_cvtps_epi32(self.0));
        let upper = instruction!(_mm512_srlv_epi32(ints, splat_int(SHIFT)));
        let lower = instruction!(_mm512_and_si512(ints, splat_int((1 << SHIFT) - 1)));
        instruction!(_mm_storeu_si128(high.as_mut_ptr().cast(), instruction!(_mm512_cvtepi32_epi8(upper))));
        instruction!(_mm_storeu_si128(low.as_mut_ptr().cast(), instruction!(_mm512_cvtepi32_epi8(lower))));
    }
}
