//! Powers of two and soft caps, in operations that every instruction set has.

use super::wide::Wide;

/// Below this, `2^x` is returned as 0: the results would be subnormal, with fewer bits.
const MIN_EXPONENT: f32 = -126.0;
/// Adding `1.5 * 2^23` rounds to an integer and leaves it in the lowest bits. Adding 127 as well puts the exponent's
/// bias into these bits.
const ROUND: f32 = 12_582_912.0 + 127.0;
/// The polynomial of degree six with the smallest relative error to `2^r` for `|r| <= 1/2`, among those with value 1 at
/// `r = 0`. The error is below 2e-9 before rounding. (Lawson's algorithm: iterated least squares with weights that grow
/// where the error is largest.)
const TERMS: [f32; 7] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_4e-2, 0.240_226_48, std::f32::consts::LN_2, 1.0];

/// `2^x` for `x <= 0`, with a relative error below 2e-7; 0 below -126.
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
    // Below the range the power of two is meaningless, and the result is 0 instead.
    x.select_less(V::splat(MIN_EXPONENT), V::splat(0.0), sum.mul(rounded.power_of_two()))
}

/// The same for one number. Multiply and add are always rounded separately here, so that the result does not depend on
/// the instruction set that the caller is compiled for.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    let rounded = x + ROUND;
    let r = x - (rounded - ROUND);
    let mut sum = TERMS[0];
    for term in &TERMS[1..] {
        sum = sum * r + term;
    }
    if x < MIN_EXPONENT { 0.0 } else { sum * f32::from_bits(rounded.to_bits() << 23) }
}

/// Below this, `tanh x` is computed as a polynomial: `1 - t` loses too many digits where `t` is close to 1.
const SMALL: f32 = 0.625;
/// The polynomial of degree five in `x²` with the smallest relative error to `log2 e tanh(x) / x` for `x` up to
/// `SMALL`. The error is below 4e-9 before rounding. (Remez' exchange algorithm, in fifty digits.)
const TANH_TERMS: [f32; 6] =
    [-8.165_634e-3, 2.970_651_3e-2, -7.750_312e-2, 0.192_327_52, -0.480_897_3, std::f32::consts::LOG2_E];

/// A soft cap of scores, `cap tanh(score / cap)`, times `log2 e`. For every finite score and every finite cap, the
/// error is below 1e-6 relative to the true value, or half of the smallest f32.
#[derive(Clone, Copy)]
pub(super) struct SoftCap {
    cap: f32,
    /// `1 / cap` as a product of two factors: it can be too large for f32, or subnormal, with few bits.
    inverse: [f32; 2],
}

impl SoftCap {
    /// `cap` must be greater than 0 and finite.
    pub(super) fn new(cap: f32) -> Self {
        let inverse = 1.0 / f64::from(cap);
        let root = inverse.sqrt() as f32;
        Self { cap, inverse: [root, (inverse / f64::from(root)) as f32] }
    }

    /// Capped scores, as exponents of two.
    ///
    /// With `x = score / cap` and `t = e^(-2 |x|)`: `score (tanh(x) / x)` where `|x|` is small, elsewhere
    /// `cap (1 - t) / (1 + t)` with the sign of `x`. An infinite score becomes NaN and not the cap, so that its row is
    /// recomputed: it may be a finite score that is too large for f32.
    #[inline(always)]
    pub(super) fn of<V: Wide>(&self, scores: V) -> V {
        let [zero, one, log2_e] = [0.0, 1.0, std::f32::consts::LOG2_E].map(V::splat);
        let x = scores.mul(V::splat(self.inverse[0])).mul(V::splat(self.inverse[1]));
        let size = x.max(zero.sub(x));

        let square = x.mul(x);
        let mut polynomial = V::splat(TANH_TERMS[0]);
        for term in &TANH_TERMS[1..] {
            polynomial = polynomial.multiply_add(square, V::splat(*term));
        }

        let t = exp2_wide(size.mul(V::splat(-2.0 * std::f32::consts::LOG2_E)));
        let ratio = log2_e.sub(log2_e.mul(t)).div(one.add(t));
        let large = V::splat(self.cap).mul(ratio);
        let large = x.select_less(zero, zero.sub(large), large);

        scores.multiply_add(zero, size.select_less(V::splat(SMALL), scores.mul(polynomial), large))
    }
}

#[cfg(test)]
mod tests {
    use super::super::arch::portable::Portable;
    use super::super::kernel::Kernel;
    use super::super::wide::LANES;
    use super::super::wide::Run;
    use super::*;

    /// The largest relative error of `2^x` over the whole range.
    struct WorstError;

    impl Run for WorstError {
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
    fn the_error_of_exp2_is_within_its_bound() {
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
            let worst = kernel.run(WorstError);
            assert!(worst < 2e-7, "{}: {worst:e}", kernel.name());
        }
    }

    #[test]
    fn exp2_is_zero_below_the_range_of_f32() {
        for exp2 in [exp2, |x| super::super::wide::reduce_max(exp2_wide(Portable::splat(x)))] {
            assert_eq!(exp2(0.0), 1.0);
            assert_eq!(exp2(-126.5), 0.0);
            assert_eq!(exp2(-1e30), 0.0);
            assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
            assert!(exp2(f32::NAN).is_nan());
        }
    }

    /// The largest relative error of a cap over scores of every size.
    struct WorstCapError(f32);

    impl Run for WorstCapError {
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
                    // Subnormal results have fewer digits, and some results are too large for f32.
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
            // Scores of about the size of the cap, where the formula changes.
            for step in 0..400 {
                let x = |lane: usize| (step * LANES + lane) as f64 / 640.0;
                check(std::array::from_fn(|lane| (x(lane) * f64::from(self.0)).min(3e38) as f32));
            }
            worst
        }
    }

    #[test]
    fn capped_scores_are_accurate_for_every_cap() {
        let caps = (-45..=38).map(|exponent| 10f64.powi(exponent) as f32);
        for cap in caps.chain([30.0, 50.0, 2.5, 3e38, f32::MAX, f32::MIN_POSITIVE]).filter(|cap| *cap > 0.0) {
            for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
                let (worst, score) = kernel.run(WorstCapError(cap));
                assert!(worst < 1e-6, "{}, cap {cap:e}, score {score:e}: {worst:e}", kernel.name());
            }
        }
    }

    #[test]
    fn capped_scores_keep_their_sign_and_scores_that_are_not_finite_become_nan() {
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
