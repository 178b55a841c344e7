//! The median.

/// The middle one of `xs`; of an even number, the higher of the two in the middle. NaN if there are none.
pub fn median(mut xs: Vec<f64>) -> f64 {
    xs.sort_by(f64::total_cmp);
    xs.get(xs.len() / 2).copied().unwrap_or(f64::NAN)
}
