//! NEON: four registers of four lanes. Every 64-bit Arm CPU has it, so it is not detected at run time.
#![allow(unsafe_code)]

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::portable::Portable;
use crate::cpu::wide::{LANES, Run, Wide};

/// Sixteen lanes in four registers.
#[derive(Clone, Copy)]
struct Neon([float32x4_t; 4]);

/// Runs `run` with NEON.
#[inline(never)]
#[target_feature(enable = "neon")]
pub(in crate::cpu) fn run<R: Run>(run: R) -> R::Output {
    run.run::<Neon>()
}

/// The same instruction on all four registers.
macro_rules! all {
    ($f:ident, $($x:expr),+) => {
        Self([
            instruction!($f($($x.0[0]),+)),
            instruction!($f($($x.0[1]),+)),
            instruction!($f($($x.0[2]),+)),
            instruction!($f($($x.0[3]),+)),
        ])
    };
}

impl Neon {
    #[inline(always)]
    fn from_portable(x: Portable) -> Self {
        let mut lanes = [0.0; LANES];
        x.store(&mut lanes);
        Self::load(&lanes)
    }
}

#[inline(always)]
fn choose(x: float32x4_t, limit: float32x4_t, then: float32x4_t, otherwise: float32x4_t) -> float32x4_t {
    instruction!(vbslq_f32(instruction!(vcltq_f32(x, limit)), then, otherwise))
}

#[inline(always)]
fn max_bits(x: float32x4_t, y: float32x4_t) -> float32x4_t {
    let (x, y) = (instruction!(vreinterpretq_u32_f32(x)), instruction!(vreinterpretq_u32_f32(y)));
    instruction!(vreinterpretq_f32_u32(instruction!(vmaxq_u32(x, y))))
}

#[inline(always)]
fn shift_to_exponent(x: float32x4_t) -> float32x4_t {
    let bits = instruction!(vreinterpretq_u32_f32(x));
    instruction!(vreinterpretq_f32_u32(instruction!(vshlq_n_u32::<23>(bits))))
}

impl Wide for Neon {
    const COLUMNS: usize = 1;
    const INT_ROWS: usize = 2;
    const INT_COLUMNS: usize = 1;

    #[inline(always)]
    fn outlined<R: Run>(call: R) -> R::Output {
        instruction!(run(call))
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([instruction!(vdupq_n_f32(x)); 4])
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        let (parts, _) = from.as_chunks::<4>();
        Self([
            instruction!(vld1q_f32(parts[0].as_ptr())),
            instruction!(vld1q_f32(parts[1].as_ptr())),
            instruction!(vld1q_f32(parts[2].as_ptr())),
            instruction!(vld1q_f32(parts[3].as_ptr())),
        ])
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        let (parts, _) = to.as_chunks_mut::<4>();
        for (part, x) in parts.iter_mut().zip(self.0) {
            instruction!(vst1q_f32(part.as_mut_ptr(), x));
        }
    }

    // The compiler vectorises the portable conversions.
    #[inline(always)]
    fn load_f16(from: &[f16; LANES]) -> Self {
        Self::from_portable(Portable::load_f16(from))
    }

    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        Self::from_portable(Portable::load_bf16(from))
    }

    #[inline(always)]
    fn multiply_add(self, by: Self, plus: Self) -> Self {
        all!(vfmaq_f32, plus, self, by)
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        all!(vaddq_f32, self, other)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        all!(vsubq_f32, self, other)
    }

    #[inline(always)]
    fn mul(self, by: Self) -> Self {
        all!(vmulq_f32, self, by)
    }

    #[inline(always)]
    fn div(self, by: Self) -> Self {
        all!(vdivq_f32, self, by)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        other.select_less(self, self, other)
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.select_less(other, self, other)
    }

    #[inline(always)]
    fn max_or_nan(self, other: Self) -> Self {
        Self([
            max_bits(self.0[0], other.0[0]),
            max_bits(self.0[1], other.0[1]),
            max_bits(self.0[2], other.0[2]),
            max_bits(self.0[3], other.0[3]),
        ])
    }

    #[inline(always)]
    fn select_less(self, limit: Self, then: Self, otherwise: Self) -> Self {
        Self([
            choose(self.0[0], limit.0[0], then.0[0], otherwise.0[0]),
            choose(self.0[1], limit.0[1], then.0[1], otherwise.0[1]),
            choose(self.0[2], limit.0[2], then.0[2], otherwise.0[2]),
            choose(self.0[3], limit.0[3], then.0[3], otherwise.0[3]),
        ])
    }

    #[inline(always)]
    fn interleave(self, other: Self) -> [Self; 2] {
        let (a, b) = (self.0, other.0);
        let zip = |i: usize| [instruction!(vzip1q_f32(a[i], b[i])), instruction!(vzip2q_f32(a[i], b[i]))];
        let halves = |i| {
            let ([x, y], [z, w]) = (zip(i), zip(i + 1));
            Self([x, y, z, w])
        };
        [halves(0), halves(2)]
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        Self([
            shift_to_exponent(self.0[0]),
            shift_to_exponent(self.0[1]),
            shift_to_exponent(self.0[2]),
            shift_to_exponent(self.0[3]),
        ])
    }

    // The compiler vectorises the portable products of integers, too.
    type Ints = <Portable as Wide>::Ints;
    type Quads = <Portable as Wide>::Quads;

    #[inline(always)]
    fn zero_ints() -> Self::Ints {
        Portable::zero_ints()
    }

    #[inline(always)]
    fn load_quads(from: &[u8; 4 * LANES]) -> Self::Quads {
        Portable::load_quads(from)
    }

    #[inline(always)]
    fn dot_unsigned(sums: Self::Ints, quads: Self::Quads, by: [i8; 4]) -> Self::Ints {
        Portable::dot_unsigned(sums, quads, by)
    }

    #[inline(always)]
    fn dot_signed(sums: Self::Ints, quads: Self::Quads, by: [u8; 4]) -> Self::Ints {
        Portable::dot_signed(sums, quads, by)
    }

    #[inline(always)]
    fn combine<const SHIFT: i32>(high: Self::Ints, low: Self::Ints, subtract: i32) -> Self::Ints {
        Portable::combine::<SHIFT>(high, low, subtract)
    }

    #[inline(always)]
    fn from_ints(ints: Self::Ints) -> Self {
        Self::from_portable(Portable::from_ints(ints))
    }

    #[inline(always)]
    fn round_to_ints(self, to: &mut [i32; LANES]) {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        Portable::load(&lanes).round_to_ints(to);
    }
}
