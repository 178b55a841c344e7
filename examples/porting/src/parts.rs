//! What does not change: weights, norms, the feed-forward, and tables of the rotary embedding.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops;

pub(crate) const VOCABULARY: usize = 96;
pub(crate) const LAYERS: usize = 3;
pub(crate) const HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const HEAD_DIM: usize = 16;
const WIDTH: usize = HEADS * HEAD_DIM;
const FEED_FORWARD: usize = 128;
/// The maximum number of tokens in a sequence.
pub(crate) const CONTEXT: usize = 256;

pub(crate) struct Parts {
    pub(crate) embedding: Tensor,
    pub(crate) layers: Vec<Layer>,
    /// Cosines and sines of the rotary embedding, `(context, head_dim / 2)`.
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
}

pub(crate) struct Layer {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) o: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Parts {
    pub(crate) fn random() -> Result<Self> {
        let mut seed = 0;
        let mut matrix = |rows: usize, columns: usize| {
            seed += 1;
            let scale = 1.7 / (columns as f32).sqrt();
            let number = |i: usize| ((i * 7919 + seed * 104_729) as f32 * 0.618).sin() * scale;
            Tensor::from_iter((0..rows * columns).map(number), &Device::Cpu)?.reshape((rows, columns))
        };
        let embedding = matrix(VOCABULARY, WIDTH)?;
        let kv = KV_HEADS * HEAD_DIM;
        let layers = (0..LAYERS).map(|_| {
            Ok(Layer {
                q: matrix(WIDTH, WIDTH)?,
                k: matrix(kv, WIDTH)?,
                v: matrix(kv, WIDTH)?,
                o: matrix(WIDTH, WIDTH)?,
                gate: matrix(FEED_FORWARD, WIDTH)?,
                up: matrix(FEED_FORWARD, WIDTH)?,
                down: matrix(WIDTH, FEED_FORWARD)?,
            })
        });
        let layers = layers.collect::<Result<_>>()?;
        let speeds = (0..HEAD_DIM / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / HEAD_DIM as f32));
        let speeds = Tensor::from_iter(speeds, &Device::Cpu)?.unsqueeze(0)?;
        let positions = Tensor::arange(0, CONTEXT as u32, &Device::Cpu)?.to_dtype(DType::F32)?.unsqueeze(1)?;
        let angles = positions.matmul(&speeds)?;
        Ok(Self { embedding, layers, cos: angles.cos()?, sin: angles.sin()? })
    }
}

impl Layer {
    pub(crate) fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(&(ops::silu(&linear(x, &self.gate)?)? * linear(x, &self.up)?)?, &self.down)
    }
}

/// `x` is `(.., columns)`, the matrix `(rows, columns)`.
pub(crate) fn linear(x: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    x.broadcast_matmul(&matrix.t()?)
}

/// The norm by the root of the mean square, without weights.
pub(crate) fn norm(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?)
}
