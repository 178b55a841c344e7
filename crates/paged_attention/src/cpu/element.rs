//! The types in which keys and values are stored.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A stored number. Arithmetic is always in f32.
pub(super) trait Element: Copy + Send + Sync {
    fn widen(self) -> f32;

    fn narrow(x: f32) -> Self;

    /// A run of stored numbers as f32: itself if it is, otherwise converted into `scratch`.
    fn widened<'a>(run: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn widened<'a>(run: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        run
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }

    #[inline(always)]
    fn widened<'a>(run: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..run.len()];
        run.convert_to_f32_slice(scratch);
        scratch
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }

    #[inline(always)]
    fn widened<'a>(run: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..run.len()];
        // A bf16 is the upper half of an f32; unlike the library's conversion this keeps signalling NaNs as they are,
        // and in exchange the compiler turns it into one shift for many numbers.
        for (wide, x) in scratch.iter_mut().zip(run) {
            *wide = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
        scratch
    }
}
