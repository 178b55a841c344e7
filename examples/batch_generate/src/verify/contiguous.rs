//! Attention as candle's own models compute it: keys and values of one sequence in one tensor, to which new ones are
//! concatenated, repeated for each query head, with a mask.

use anyhow::Result;
use candle_core::{D, Device, Tensor};

use inference::config::Config;
use inference::model::Model;

/// A model with a contiguous cache, for one sequence.
pub(crate) struct Contiguous<'m> {
    model: &'m Model,
    /// Keys and values of each layer, `(tokens, heads, head_dim)`.
    layers: Vec<Option<(Tensor, Tensor)>>,
}

impl<'m> Contiguous<'m> {
    pub(crate) fn new(model: &'m Model) -> Self {
        Self { model, layers: vec![None; model.config().layers()] }
    }

    pub(crate) fn clear(&mut self) {
        self.layers.fill(None);
    }

    /// Computes `tokens`, the first of which has the position `position`. Returns the logits of the last one.
    pub(crate) fn forward(&mut self, tokens: &[u32], position: usize) -> Result<Vec<f32>> {
        let (n, config) = (tokens.len(), self.model.config());
        let positions = Tensor::arange(position as u32, (position + n) as u32, &Device::Cpu)?;
        let last = Tensor::new(&[n as u32 - 1], &Device::Cpu)?;
        let layers = &mut self.layers;
        let attend = |layer: usize, q: &Tensor, k: &Tensor, v: &Tensor| {
            let (k, v) = match &layers[layer] {
                None => (k.clone(), v.clone()),
                Some((keys, values)) => (Tensor::cat(&[keys, k], 0)?, Tensor::cat(&[values, v], 0)?),
            };
            let window = config.windows[layer].unwrap_or(usize::MAX);
            let attended = dense(q, &k, &v, config, |at, position| at <= position && position - at < window);
            layers[layer] = Some((k, v));
            attended
        };
        let logits = self.model.logits(&Tensor::new(tokens, &Device::Cpu)?, &positions, &last, attend)?;
        Ok(logits.squeeze(0)?.to_vec1()?)
    }
}

/// Attention of the last tokens of a sequence over all of them, all `(tokens, heads, head_dim)`. `sees` gets the
/// position of a key and that of a query.
pub(crate) fn dense(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    config: &Config,
    sees: impl Fn(usize, usize) -> bool,
) -> candle_core::Result<Tensor> {
    let (rows, heads, _) = q.dims3()?;
    let (all, kv_heads, _) = k.dims3()?;
    let mask: Vec<f32> = (all - rows..all)
        .flat_map(|position| (0..all).map(move |at| (at, position)))
        .map(|(at, position)| if sees(at, position) { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    let mask = Tensor::from_vec(mask, (rows, all), &Device::Cpu)?;
    let index: Vec<u32> = (0..heads).map(|head| (head / (heads / kv_heads)) as u32).collect();
    let index = Tensor::new(index, &Device::Cpu)?;
    let by_head = |x: &Tensor| x.transpose(0, 1)?.contiguous(); // (heads, tokens, head_dim)
    let repeated = |x: &Tensor| by_head(x)?.index_select(&index, 0);
    let mut scores = (by_head(q)?.matmul(&repeated(k)?.t()?)? * f64::from(config.score_scale))?;
    if let Some(cap) = config.score_cap {
        scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
    }
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    by_head(&weights.matmul(&repeated(v)?)?)
}
