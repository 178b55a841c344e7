//! The reference without blocks: contiguous keys and values, and attention in f64 over the positions that are seen.

use candle_core::{Device, Tensor};

use crate::decoder::Decoder;
use crate::reference::Model;

/// The decoder with dense attention. Layer `i` sees the last `windows[i]` tokens, or all of them. The windows of the
/// decoder's own shape are not used.
pub(crate) fn model(decoder: &Decoder, windows: &[Option<usize>]) -> Model {
    let (decoder, windows) = (decoder.clone(), windows.to_vec());
    let mut layers = vec![(Vec::<f32>::new(), Vec::<f32>::new()); windows.len()];
    let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    Box::new(move |tokens| {
        let position = tokens.len() - 1;
        let ids = Tensor::new(&tokens[position..], &Device::Cpu)?;
        let positions = Tensor::new(&[position as u32], &Device::Cpu)?;
        let logits = decoder.forward(&ids, &positions, |layer, q, k, v| {
            let (keys, values) = &mut layers[layer];
            keys.extend(numbers(k)?);
            values.extend(numbers(v)?);
            let first = windows[layer].map_or(0, |window| (position + 1).saturating_sub(window));
            let seen: Vec<usize> = (first..=position).collect();
            let (_, kv_heads, head_dim) = k.dims3()?;
            let score = |_, _, score: f64| match decoder.shape.attention_cap {
                Some(cap) => cap * (score / cap).tanh(),
                None => score,
            };
            let scale = 1.0 / (head_dim as f64).sqrt();
            let attended = test_support::dense(&numbers(q)?, keys, values, &seen, kv_heads, head_dim, scale, score);
            Tensor::from_iter(attended.into_iter().map(|x| x as f32), &Device::Cpu)?.reshape(q.dims())
        })?;
        numbers(&logits)
    })
}
