//! Powers of two, in operations that every instruction set has.

use super::wide::Wide;

/// Below this, `2^x` counts as 0: there f32 ends to have all its bits.
const LEAST: f32 = -126.0;
/// Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits; here with 127, the exponent's bias, in them.
const ROUND: f32 = 12_582_912.0 + 127.0;
/// The polynomial of degree six that stays closest to `2^r`, relative to it, for `|r| <= 1/2`, among those that are 1 at 0:
/// within 2e-9 before rounding. (Least squares, with weights that grow where it is worst: Lawson's.)
const TERMS: [f32; 7] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_4e-2, 0.240_226_48, std::f32::consts::LN_2, 1.0];

/// `2^x` for `x <= 0`, within 2e-7 relative of the true value; 0 below -126.
///
/// `2^x = 2^n 2^r` with `n` the integer nearest to `x`.
#[inline(always)]
pub(super) fn exp2_wide<V: Wide>(x: V) -> V {
    let round = V::splat(ROUND);
    let rounded = x.add(round);
    let r = x.sub(rounded.sub(round));
    let mut sum = V::splat(TERMS[0]);
    for term in &TERMS[1..] {
        sum = sum.multiply_add(r, V::splat(*term));
    }
    // Out of range the power is nonsense, and so is unused.
    x.if_less(V::splat(LEAST), V::splat(0.0), sum.mul(rounded.power_of_two()))
}

/// The same for one number. Here multiplying and adding is always two roundings: what a kernel computes does not depend on
/// where its caller was compiled.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    let rounded = x + ROUND;
    let r = x - (rounded - ROUND);
    let mut sum = TERMS[0];
    for term in &TERMS[1..] {
        sum = sum * r + term;
    }
    if x < LEAST { 0.0 } else { sum * f32::from_bits(rounded.to_bits() << 23) }
}

/// `cap * tanh(x)`, from which follows the rest of a soft cap: `tanh x = (1 - t) / (1 + t)` with `t = e^(-2 |x|)`, and the
/// sign of `x`.
#[inline(always)]
pub(super) fn tanh_times<V: Wide>(x: V, cap: V) -> V {
    let zero = V::splat(0.0);
    let negative = zero.sub(x);
    let size = x.larger(negative);
    let t = exp2_wide(size.mul(V::splat(-2.0 * std::f32::consts::LOG2_E)));
    let one = V::splat(1.0);
    let y = cap.mul(one.sub(t)).div(one.add(t));
    x.if_less(zero, zero.sub(y), y)
}

#[cfg(test)]
mod tests {
    use super::super::arch::portable::Portable;
    use super::super::kernel::{Kernel, Run};
    use super::super::wide::LANES;
    use super::*;

    /// The largest relative error of `2^x` over the whole range.
    struct Worst;

    impl Run for Worst {
        type Output = f64;

        #[inline(always)]
        fn run<V: Wide>(self) -> f64 {
            let mut worst = 0f64;
            for i in 0..126 * 1000 / LANES {
                let mut x = [0f32; LANES];
                for (lane, x) in x.iter_mut().enumerate() {
                    *x = -((i * LANES + lane) as f32) / 1000.0;
                }
                let mut y = [0f32; LANES];
                exp2_wide(V::load(&x)).store(&mut y);
                for (x, y) in x.into_iter().zip(y).chain(x.map(|x| (x, exp2(x)))) {
                    let truth = f64::from(x).exp2();
                    worst = worst.max((f64::from(y) - truth).abs() / truth);
                }
            }
            worst
        }
    }

    #[test]
    fn stays_within_its_bound() {
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
            let worst = kernel.run(Worst);
            assert!(worst < 2e-7, "{}: {worst:e}", kernel.name());
        }
    }

    #[test]
    fn ends_where_f32_ends() {
        for exp2 in [exp2, |x| super::super::wide::largest(exp2_wide(Portable::splat(x)))] {
            assert_eq!(exp2(0.0), 1.0);
            assert_eq!(exp2(-126.5), 0.0);
            assert_eq!(exp2(-1e30), 0.0);
            assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
            assert!(exp2(f32::NAN).is_nan());
        }
    }

    #[test]
    fn the_hyperbolic_tangent_keeps_its_sign_and_its_ends() {
        for x in [-80.0, -3.0, -0.5, -1e-6, 0.0, 1e-6, 0.25, 2.0, 100.0, f32::INFINITY, f32::NEG_INFINITY] {
            let mut y = [0f32; LANES];
            tanh_times(Portable::splat(x), Portable::splat(50.0)).store(&mut y);
            let truth = 50.0 * f64::from(x).tanh();
            assert!((f64::from(y[0]) - truth).abs() < 1e-5, "{x}: {} instead of {truth}", y[0]);
        }
    }
}
