//! The contenders of one case of attention: a peer takes part only if its result is that of ours.

use harness::Contender;

use crate::child::Case;
use crate::environment::{Environment, Script};

/// The contenders of a case, all with the same result as the first.
#[derive(Debug)]
pub struct Field<'a> {
    /// Those that can be measured; the first is ours.
    pub contenders: Vec<Contender<'a>>,
    expected: Vec<f32>,
    tolerance: f32,
}

impl<'a> Field<'a> {
    /// Starts with our contender and its result.
    pub fn new(case: &Case, (ours, expected): (Contender<'a>, Vec<f32>)) -> Self {
        // As a share of the largest number of the result. Some contenders round scores and sums to 16 bits; a wrong
        // result differs by about the whole number.
        let tolerance = if case.dtype == "f32" { 1e-3 } else { 1e-1 };
        Self { contenders: vec![ours], expected, tolerance }
    }

    /// Adds a floor, which has no result.
    pub fn add_floor(&mut self, floor: Contender<'a>) {
        self.contenders.push(floor);
    }

    /// Adds a contender if its result is near to ours.
    pub fn add(&mut self, (contender, output): (Contender<'a>, Vec<f32>)) {
        match difference(&self.expected, &output) {
            difference if difference <= self.tolerance => self.contenders.push(contender),
            difference => eprintln!(
                "  skipped {}: its result differs from ours by {difference:.1e} of the largest number",
                contender.name
            ),
        }
    }

    /// Adds those variants of a peer that compute the case.
    pub fn add_python(&mut self, python: &Environment, script: Script, variants: &[&str], case: &Case) {
        // Only ggml has 8-bit keys and values.
        if case.dtype == "int8" && script != Script::Ggml {
            return;
        }
        for variant in variants {
            if let Some(contender) = python.contender(script, case, variant) {
                self.add(contender);
            }
        }
    }
}

/// The largest difference, as a share of the largest number; NaN if the lengths differ.
fn difference(expected: &[f32], found: &[f32]) -> f32 {
    if expected.len() != found.len() {
        return f32::NAN;
    }
    let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    // `max` would ignore NaN.
    let worst = expected
        .iter()
        .zip(found)
        .map(|(a, b)| (a - b).abs())
        .fold(0f32, |worst, x| if worst.is_nan() || x <= worst { worst } else { x });
    worst / largest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differing_results_are_detected() {
        assert_eq!(difference(&[1.0, -2.0], &[1.0, -2.0]), 0.0);
        assert_eq!(difference(&[1.0, -2.0], &[1.0, -1.0]), 0.5);
        assert!(difference(&[1.0], &[1.0, 2.0]).is_nan());
        assert!(difference(&[1.0, 1.0], &[f32::NAN, 1.0]).is_nan());
    }
}
