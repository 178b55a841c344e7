//! For every machine: sixteen lanes in an array, with loops that the compiler vectorises for the target.

use half::{bf16, f16};

use crate::cpu::wide::{LANES, Run, Wide};

/// Sixteen lanes in an array.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip_with(mut self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        for (x, y) in self.0.iter_mut().zip(other.0) {
            *x = f(*x, y);
        }
        self
    }
}

impl Wide for Portable {
    const COLUMNS: usize = 1;
    const INT_ROWS: usize = 2;
    const INT_COLUMNS: usize = 1;

    #[inline(never)]
    fn outlined<R: Run>(run: R) -> R::Output {
        run.run::<Self>()
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

    #[inline(always)]
    fn load_f16(from: &[f16; LANES]) -> Self {
        Self(from.map(widen_f16))
    }

    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        Self(from.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16)))
    }

    /// Rounded twice: without an FMA instruction, a fused multiply-add is a call of a software implementation.
    #[inline(always)]
    fn multiply_add(self, by: Self, plus: Self) -> Self {
        self.mul(by).add(plus)
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip_with(other, |x, y| x + y)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip_with(other, |x, y| x - y)
    }

    #[inline(always)]
    fn mul(self, by: Self) -> Self {
        self.zip_with(by, |x, y| x * y)
    }

    #[inline(always)]
    fn div(self, by: Self) -> Self {
        self.zip_with(by, |x, y| x / y)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip_with(other, |x, y| if x > y { x } else { y })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip_with(other, |x, y| if x < y { x } else { y })
    }

    #[inline(always)]
    fn max_or_nan(self, other: Self) -> Self {
        self.zip_with(other, |x, y| f32::from_bits(x.to_bits().max(y.to_bits())))
    }

    #[inline(always)]
    fn select_less(self, limit: Self, then: Self, otherwise: Self) -> Self {
        let mut out = otherwise;
        for lane in 0..LANES {
            if self.0[lane] < limit.0[lane] {
                out.0[lane] = then.0[lane];
            }
        }
        out
    }

    #[inline(always)]
    fn interleave(self, other: Self) -> [Self; 2] {
        let lane = |i: usize| if i.is_multiple_of(2) { self.0[i / 2] } else { other.0[i / 2] };
        [0, LANES].map(|first| Self(std::array::from_fn(|i| lane(first + i))))
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        Self(self.0.map(|x| f32::from_bits(x.to_bits() << 23)))
    }

    type Ints = [i32; LANES];
    type Quads = [[u8; 4]; LANES];

    #[inline(always)]
    fn zero_ints() -> Self::Ints {
        [0; LANES]
    }

    #[inline(always)]
    fn load_quads(from: &[u8; 4 * LANES]) -> Self::Quads {
        let mut quads = [[0; 4]; LANES];
        quads.as_flattened_mut().copy_from_slice(from);
        quads
    }

    #[inline(always)]
    fn dot_unsigned(mut sums: Self::Ints, quads: Self::Quads, by: [i8; 4]) -> Self::Ints {
        for (sum, quad) in sums.iter_mut().zip(quads) {
            for (x, y) in quad.into_iter().zip(by) {
                *sum += i32::from(x) * i32::from(y);
            }
        }
        sums
    }

    #[inline(always)]
    fn dot_signed(mut sums: Self::Ints, quads: Self::Quads, by: [u8; 4]) -> Self::Ints {
        for (sum, quad) in sums.iter_mut().zip(quads) {
            for (x, y) in quad.into_iter().zip(by) {
                *sum += i32::from(x as i8) * i32::from(y);
            }
        }
        sums
    }

    #[inline(always)]
    fn combine<const SHIFT: i32>(mut high: Self::Ints, low: Self::Ints, subtract: i32) -> Self::Ints {
        for (high, low) in high.iter_mut().zip(low) {
            *high = (*high << SHIFT) + low - subtract;
        }
        high
    }

    #[inline(always)]
    fn from_ints(ints: Self::Ints) -> Self {
        Self(ints.map(|x| x as f32))
    }

    #[inline(always)]
    fn round_to_ints(self, to: &mut [i32; LANES]) {
        for (to, x) in to.iter_mut().zip(self.0) {
            *to = x.round_ties_even() as i32;
        }
    }
}

/// Converts an f16 to f32 exactly: shifts its bits to their places in an f32, and multiplies to correct the exponent
/// and to normalise subnormal numbers.
#[inline(always)]
fn widen_f16(x: f16) -> f32 {
    const EXPONENT: u32 = 0x7c00;
    let bits = u32::from(x.to_bits());
    let size = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    // Infinities and NaN keep the largest exponent.
    let special = if bits & EXPONENT == EXPONENT { 0x7f80_0000 } else { 0 };
    f32::from_bits(size.to_bits() | special | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            let wide = widen_f16(x);
            assert!(wide.to_bits() == x.to_f32().to_bits() || (wide.is_nan() && x.is_nan()), "{bits:#x}: {wide}");
        }
    }
}
