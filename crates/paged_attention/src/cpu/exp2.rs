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

/// Below this `tanh x` is computed as a polynomial: `1 - t` has too few digits where `t` is close to 1.
const SMALL: f32 = 0.625;
/// The polynomial of degree five in `x²` that stays closest to `log2 e tanh(x) / x`, relative to it, for `x` up to `SMALL`:
/// within 4e-9 before rounding. (Remez' exchange, in fifty digits.)
const TANH_TERMS: [f32; 6] =
    [-8.165_634e-3, 2.970_651_3e-2, -7.750_312e-2, 0.192_327_52, -0.480_897_3, std::f32::consts::LOG2_E];

/// A soft cap of scores, `cap tanh(score / cap)`, times `log2 e`. Of the largest scores and the smallest, and for every finite
/// cap, within 1e-6 relative of the true value, or half of the smallest number.
#[derive(Clone, Copy)]
pub(super) struct SoftCap {
    cap: f32,
    /// The inverse of the cap, as a product: it can lie beyond f32, and where it has few bits left.
    inverse: [f32; 2],
}

impl SoftCap {
    /// A cap greater than 0, and finite.
    pub(super) fn new(cap: f32) -> Self {
        let inverse = 1.0 / f64::from(cap);
        let root = inverse.sqrt() as f32;
        Self { cap, inverse: [root, (inverse / f64::from(root)) as f32] }
    }

    /// Capped scores, in powers of two.
    ///
    /// With `x = score / cap`: `score (tanh(x) / x)` where `x` is small, `cap (1 - t) / (1 + t)` with `t = e^(-2 |x|)` and the
    /// sign of `x` elsewhere. An infinite score, which may be one that f32 cannot hold, becomes NaN and not the cap, so that
    /// its row is computed again.
    #[inline(always)]
    pub(super) fn of<V: Wide>(&self, scores: V) -> V {
        let [zero, one, log2_e] = [0.0, 1.0, std::f32::consts::LOG2_E].map(V::splat);
        let x = scores.mul(V::splat(self.inverse[0])).mul(V::splat(self.inverse[1]));
        let size = x.larger(zero.sub(x));

        let square = x.mul(x);
        let mut polynomial = V::splat(TANH_TERMS[0]);
        for term in &TANH_TERMS[1..] {
            polynomial = polynomial.multiply_add(square, V::splat(*term));
        }

        let t = exp2_wide(size.mul(V::splat(-2.0 * std::f32::consts::LOG2_E)));
        let ratio = log2_e.sub(log2_e.mul(t)).div(one.add(t));
        let large = V::splat(self.cap).mul(ratio);
        let large = x.if_less(zero, zero.sub(large), large);

        scores.multiply_add(zero, size.if_less(V::splat(SMALL), scores.mul(polynomial), large))
    }
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

    /// The largest relative error of a cap over scores of every size.
    struct WorstCap(f32);

    impl Run for WorstCap {
        type Output = (f64, f32);

        #[inline(always)]
        fn run<V: Wide>(self) -> (f64, f32) {
            let cap = SoftCap::new(self.0);
            let mut worst = (0f64, 0f32);
            let mut check = |scores: [f32; LANES]| {
                let mut y = [0f32; LANES];
                cap.of(V::load(&scores)).store(&mut y);
                for (score, y) in scores.into_iter().zip(y) {
                    let cap = f64::from(self.0);
                    let truth = std::f64::consts::LOG2_E * cap * (f64::from(score) / cap).tanh();
                    // Numbers below the normal ones have fewer digits, and some are beyond f32.
                    let error = ((f64::from(y) - truth).abs() - f64::from(f32::from_bits(1))) / truth.abs();
                    let beyond = truth.abs() > f64::from(f32::MAX) && y.abs() == f32::INFINITY;
                    if score != 0.0 && !beyond && (error > worst.0 || error.is_nan()) {
                        worst = (error, score);
                    }
                }
            };
            for exponent in -45..=38 {
                for step in 0..10 {
                    let size = |lane: usize| (1.0 + (step * LANES + lane) as f64 / 160.0 * 9.0) * 10f64.powi(exponent);
                    let scores = std::array::from_fn(|lane| (size(lane).min(3e38) * [1.0, -1.0][lane % 2]) as f32);
                    check(scores);
                }
            }
            // About the size of the cap, where one formula follows the other.
            for step in 0..400 {
                let x = |lane: usize| (step * LANES + lane) as f64 / 640.0;
                check(std::array::from_fn(|lane| (x(lane) * f64::from(self.0)).min(3e38) as f32));
            }
            worst
        }
    }

    #[test]
    fn capped_scores_are_right_for_every_cap() {
        let caps = (-45..=38).map(|exponent| 10f64.powi(exponent) as f32);
        for cap in caps.chain([30.0, 50.0, 2.5, 3e38, f32::MAX, f32::MIN_POSITIVE]).filter(|cap| *cap > 0.0) {
            for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
                let (worst, score) = kernel.run(WorstCap(cap));
                assert!(worst < 1e-6, "{}, cap {cap:e}, score {score:e}: {worst:e}", kernel.name());
            }
        }
    }

    #[test]
    fn capped_scores_keep_their_sign_and_what_is_not_finite_stays_visible() {
        for cap in [1e-40, 50.0, 3e38] {
            let capped = |x: f32| {
                let mut y = [0f32; LANES];
                SoftCap::new(cap).of(Portable::splat(x)).store(&mut y);
                y[0]
            };
            assert_eq!(capped(0.0), 0.0);
            assert!([f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().all(|x| capped(x).is_nan()));
            assert!(capped(1e-30) > 0.0 && capped(-1e-30) < 0.0 && capped(-1e30) == -capped(1e30));
        }
    }
}
