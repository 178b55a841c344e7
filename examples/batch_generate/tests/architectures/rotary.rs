//! The rotary embedding in plain f64, with the scalings that files have.

use std::f64::consts::PI;

#[derive(Debug, Clone)]
pub(crate) struct Rotary {
    /// The angle of each pair per position.
    speeds: Vec<f64>,
    magnitude: f64,
}

impl Rotary {
    /// Su et al. 2021, equation 15.
    pub(crate) fn plain(dims: usize, base: f64) -> Self {
        let speeds = (0..dims / 2).map(|pair| base.powf(-2.0 * pair as f64 / dims as f64)).collect();
        Self { speeds, magnitude: 1.0 }
    }

    /// All positions divided by a factor.
    pub(crate) fn linear(self, factor: f64) -> Self {
        Self { speeds: self.speeds.into_iter().map(|speed| speed / factor).collect(), ..self }
    }

    /// Frequencies divided by factors, and rotated pairs multiplied by `magnitude`.
    pub(crate) fn divided(self, factors: &[f32], magnitude: f64) -> Self {
        let speeds = self.speeds.iter().zip(factors).map(|(speed, factor)| speed / f64::from(*factor)).collect();
        Self { speeds, magnitude }
    }

    /// YaRN (Peng et al. 2023): wavelengths shorter than `original / 32` are kept, those longer than `original` are
    /// interpolated, and between them the pairs are mixed by their number.
    pub(crate) fn yarn(self, base: f64, factor: f64, original: f64) -> Self {
        let dims = 2.0 * self.speeds.len() as f64;
        let pair_of = |turns: f64| dims / 2.0 * (original / (2.0 * PI * turns)).ln() / base.ln();
        let low = pair_of(32.0).floor().max(0.0);
        let high = pair_of(1.0).ceil().min(dims - 1.0);
        let mixed = |(pair, speed): (usize, &f64)| {
            let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            speed / factor * interpolated + speed * (1.0 - interpolated)
        };
        Self { speeds: self.speeds.iter().enumerate().map(mixed).collect(), magnitude: 0.1 * factor.ln() + 1.0 }
    }

    /// Rotates the pairs of a head.
    pub(crate) fn apply(&self, head: &mut [f64], position: usize, halves: bool) {
        let pairs = head.len() / 2;
        for (pair, speed) in self.speeds.iter().enumerate() {
            let (i, j) = if halves { (pair, pair + pairs) } else { (2 * pair, 2 * pair + 1) };
            let angle = position as f64 * speed;
            let (sin, cos) = (angle.sin() * self.magnitude, angle.cos() * self.magnitude);
            (head[i], head[j]) = (head[i] * cos - head[j] * sin, head[j] * cos + head[i] * sin);
        }
    }
}
