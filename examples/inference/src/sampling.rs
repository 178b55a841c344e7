//! Sampling of the next token.

use anyhow::{Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// How the next token is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    temperature: f32,
    top_p: f32,
}

impl Sampling {
    /// Draws from `softmax(logits / temperature)`, restricted to the most likely tokens that together have the
    /// probability `top_p` (Holtzman et al. 2020, section 3.1). Temperature 0 always takes the most likely token.
    ///
    /// # Errors
    ///
    /// If `temperature` is negative or not finite, or if `top_p` is not above 0 and at most 1.
    pub fn new(temperature: f32, top_p: f32) -> Result<Self> {
        ensure!(temperature >= 0.0 && temperature.is_finite(), "the temperature {temperature} is not 0 or more");
        ensure!(top_p > 0.0 && top_p <= 1.0, "top-p {top_p} is not above 0 and at most 1");
        Ok(Self { temperature, top_p })
    }

    /// Always takes the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0 }
    }

    /// Draws one token.
    ///
    /// # Errors
    ///
    /// If there are no logits or one is NaN: then the model or its cache is broken.
    pub fn draw(&self, logits: &[f32], random: &mut Random) -> Result<u32> {
        ensure!(logits.iter().all(|x| !x.is_nan()) && !logits.is_empty(), "the model's logits are not numbers");
        let best = best(logits);
        if self.temperature == 0.0 {
            return Ok(best as u32);
        }
        let highest = logits[best];
        let mut likely: Vec<(u32, f32)> =
            (0..).zip(logits).map(|(id, x)| (id, ((x - highest) / self.temperature).exp())).collect();
        let total: f32 = likely.iter().map(|(_, p)| p).sum();
        likely.sort_by(|a, b| b.1.total_cmp(&a.1));
        let kept = 1 + crossing(&likely, self.top_p * total);
        likely.truncate(kept);
        let kept: f32 = likely.iter().map(|(_, p)| p).sum();
        let drawn = likely.get(crossing(&likely, random.0.random::<f32>() * kept));
        Ok(drawn.map_or(best as u32, |(id, _)| *id))
    }
}

/// The index at which the running sum of the probabilities exceeds `sum`; the last index if it never does.
fn crossing(likely: &[(u32, f32)], sum: f32) -> usize {
    let mut running = 0.0;
    let beyond = likely.iter().position(|(_, p)| {
        running += p;
        running > sum
    });
    beyond.unwrap_or(likely.len().saturating_sub(1))
}

/// The index of the largest logit; among equals, the first.
fn best(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// The random numbers of one sequence.
#[derive(Debug, Clone)]
pub struct Random(StdRng);

impl Random {
    /// The random numbers for an answer to prompt number `prompt`, drawn with `seed`. They do not depend on other
    /// sequences.
    pub fn new(seed: u64, prompt: usize) -> Self {
        Self(StdRng::seed_from_u64(seed.wrapping_add((prompt as u64) << 32)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_best() {
        let token = Sampling::greedy().draw(&[0.0, 2.0, 2.0, 1.0], &mut Random::new(0, 0)).unwrap();
        assert_eq!(token, 1);
    }

    #[test]
    fn frequencies_follow_the_probabilities_and_top_p_cuts_the_tail() {
        let logits = [0.5f32.ln(), 0.2f32.ln(), 0.3f32.ln()];
        let mut random = Random::new(1, 0);
        let mut count = |sampling: Sampling| {
            let mut counts = [0; 3];
            (0..20_000).for_each(|_| counts[sampling.draw(&logits, &mut random).unwrap() as usize] += 1);
            counts.map(|n| (n as f32 / 2_000.0).round() / 10.0)
        };
        assert_eq!(count(Sampling::new(1.0, 1.0).unwrap()), [0.5, 0.2, 0.3]);
        assert_eq!(count(Sampling::new(1.0, 0.75).unwrap())[1], 0.0);
        assert_eq!(count(Sampling::new(1.0, 0.4).unwrap()), [1.0, 0.0, 0.0]);
        assert_eq!(count(Sampling::new(0.01, 1.0).unwrap()), [1.0, 0.0, 0.0]);
    }

    #[test]
    fn invalid_parameters_and_logits_are_refused() {
        assert!(Sampling::new(-1.0, 1.0).is_err());
        assert!(Sampling::new(f32::NAN, 1.0).is_err());
        assert!(Sampling::new(1.0, 0.0).is_err());
        assert!(Sampling::greedy().draw(&[f32::NAN], &mut Random::new(0, 0)).is_err());
    }
}
