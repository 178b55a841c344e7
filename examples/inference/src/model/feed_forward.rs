//! A layer's feed-forward: one, or many experts of which each token uses a few.

use anyhow::Result;
use candle_core::{Device, Module, Tensor};
use candle_nn::ops;

use crate::architecture::Activation;
use crate::config::Experts;
use crate::gguf::Gguf;
use crate::weights::{Joined, Linear, Weights};

#[derive(Debug)]
pub(super) enum FeedForward {
    One(Gated),
    Mixture {
        /// A score for each expert.
        router: Linear,
        experts: Vec<Gated>,
        used: usize,
    },
}

/// A feed-forward with a gate (Shazeer 2020).
#[derive(Debug)]
pub(super) struct Gated {
    gate_up: Joined,
    down: Linear,
    activation: Activation,
}

impl FeedForward {
    pub(super) fn load(gguf: &mut Gguf, i: usize, weights: Weights) -> Result<Self> {
        let config = gguf.config().clone();
        let activation = config.architecture.activation;
        let part = |part: &str| format!("blk.{i}.{part}");
        if let Some(Experts { count, used }) = config.experts {
            // Rounding could send a token to another expert.
            let (router, _) = gguf.part(&part("ffn_gate_inp"))?;
            let router = Linear::new(router, None, Weights::F32)?;
            let mut slices = |name: &str| gguf.slices(&format!("{}.weight", part(name)), count);
            let (gates, ups, downs) = (slices("ffn_gate_exps")?, slices("ffn_up_exps")?, slices("ffn_down_exps")?);
            let expert = |((gate, up), down)| {
                let gate_up = Joined::new(vec![(gate, None), (up, None)], weights)?;
                Ok(Gated { gate_up, down: Linear::new(down, None, weights)?, activation })
            };
            let experts = gates.into_iter().zip(ups).zip(downs).map(expert).collect::<Result<_>>()?;
            return Ok(Self::Mixture { router, experts, used });
        }
        let gate_up = if config.architecture.fused {
            Joined::cut(gguf.part(&part("ffn_up"))?, &[config.feed_forward; 2], weights)?
        } else {
            let parts = ["ffn_gate", "ffn_up"].map(part);
            Joined::new(parts.iter().map(|name| gguf.part(name)).collect::<Result<_>>()?, weights)?
        };
        let (down, bias) = gguf.part(&part("ffn_down"))?;
        Ok(Self::One(Gated { gate_up, down: Linear::new(down, bias, weights)?, activation }))
    }

    /// `x` is `(tokens, width)`, and so is the result.
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::One(mlp) => mlp.forward(x),
            Self::Mixture { router, experts, used } => mixture(router, experts, *used, x),
        }
    }
}

impl Gated {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let gate_up = self.gate_up.forward(x)?;
        let gate = match self.activation {
            Activation::Silu => ops::silu(&gate_up[0])?,
            // candle's `gelu` is the approximation with a hyperbolic tangent.
            Activation::Gelu => gate_up[0].gelu()?,
        };
        self.down.forward(&(gate * &gate_up[1])?)
    }
}

/// Each token's sum over the experts with the highest scores, weighted by the softmax of these scores. Experts are
/// added in their order, whatever other tokens are computed.
fn mixture(router: &Linear, experts: &[Gated], used: usize, x: &Tensor) -> candle_core::Result<Tensor> {
    let scores = router.forward(x)?.to_vec2::<f32>()?;
    // For each expert: the rows that use it, and their weights.
    let mut work = vec![(Vec::new(), Vec::new()); experts.len()];
    for (row, scores) in scores.iter().enumerate() {
        for (expert, weight) in top(scores, used) {
            work[expert].0.push(row as u32);
            work[expert].1.push(weight);
        }
    }
    let mut sum = x.zeros_like()?;
    for (expert, (rows, weights)) in experts.iter().zip(work) {
        if rows.is_empty() {
            continue;
        }
        let n = rows.len();
        let rows = Tensor::from_vec(rows, n, &Device::Cpu)?;
        let weights = Tensor::from_vec(weights, (n, 1), &Device::Cpu)?;
        let y = expert.forward(&x.index_select(&rows, 0)?)?.broadcast_mul(&weights)?;
        sum = sum.index_add(&rows, &y, 0)?;
    }
    Ok(sum)
}

/// The experts with the highest scores, and their weights, which add up to 1.
fn top(scores: &[f32], used: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(used);
    let highest = order.first().map_or(0.0, |&best| scores[best]);
    let weights: Vec<f32> = order.iter().map(|&expert| (scores[expert] - highest).exp()).collect();
    let sum: f32 = weights.iter().sum();
    order.into_iter().zip(weights).map(|(expert, weight)| (expert, weight / sum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_of_the_best_experts_add_up_to_one() {
        let best = top(&[0.0, 3.0, -1.0, 3.0f32 - 2f32.ln()], 2);
        assert_eq!(best.iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), [1, 3]);
        assert!((best[0].1 - 2.0 / 3.0).abs() < 1e-6 && (best[1].1 - 1.0 / 3.0).abs() < 1e-6);
    }
}
