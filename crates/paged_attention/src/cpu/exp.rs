//! The exponential, in a form that a compiler turns into vector instructions.

/// `e^x` for `x <= 0`, within 2e-7 relative of the true value; 0 below -87, where f32 has no normal number left.
///
/// `e^x = 2^n e^r` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`; `ln 2` in two parts, so that `r` is exact; `e^r`
/// by its Taylor polynomial of degree 7, whose remainder is below 6e-9.
#[inline(always)]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer without a call, and leaves it in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    // 2^n: the shift drops all bits but those of n + 127. Out of range that is nonsense, and so is unused.
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::exp_nonpositive;

    #[test]
    fn stays_within_its_bound() {
        let mut worst = 0f64;
        for i in 0..=870_000 {
            let x = -(i as f32) / 10_000.0;
            let truth = f64::from(x).exp();
            worst = worst.max((f64::from(exp_nonpositive(x)) - truth).abs() / truth);
        }
        assert!(worst < 2e-7, "{worst:e}");
    }

    #[test]
    fn ends_where_f32_ends() {
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-100.0), 0.0);
        assert_eq!(exp_nonpositive(-1e30), 0.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert!(exp_nonpositive(f32::NAN).is_nan());
    }
}
