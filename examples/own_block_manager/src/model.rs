//! A small decoder with random weights. Its attention is two calls over tables that the engine keeps.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{ops, rotary_emb};
use paged_attention::{Attention, KvDtype, KvLayer, KvShape, paged_attention, reshape_and_cache};

/// Tokens of the vocabulary.
pub(crate) const VOCABULARY: usize = 500;
const LAYERS: usize = 4;
const WIDTH: usize = 192;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;

/// What the tables of one step look like to the model.
#[derive(Debug)]
pub(crate) struct Batch {
    /// `(tokens)`, as are the next two.
    pub(crate) token_ids: Tensor,
    /// The position of each token in its sequence.
    pub(crate) positions: Tensor,
    /// Where each token's key and value are stored.
    pub(crate) slot_mapping: Tensor,
    /// `(sequences, most blocks)`.
    pub(crate) block_tables: Tensor,
    /// `(sequences)`: tokens of each, and how many of them are in this step.
    pub(crate) context_lens: Tensor,
    /// `(sequences)`.
    pub(crate) query_lens: Tensor,
    /// `(sequences)`: the row of each last token.
    pub(crate) last_rows: Tensor,
}

/// The weights of a layer.
#[derive(Debug)]
struct Layer {
    qkv: Tensor,
    output: Tensor,
    up: Tensor,
    down: Tensor,
}

/// The model.
#[derive(Debug)]
pub(crate) struct Model {
    embedding: Tensor,
    layers: Vec<Layer>,
}

impl Model {
    /// Random weights, the same each time.
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub(crate) fn random() -> Result<Self> {
        let mut state = 1u64;
        let mut matrix = |inputs: usize, outputs: usize| {
            let mut number = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            };
            let numbers: Vec<f32> = (0..inputs * outputs).map(|_| number() * (3.0 / inputs as f32).sqrt()).collect();
            Tensor::from_vec(numbers, (inputs, outputs), &Device::Cpu)
        };
        let embedding = matrix(VOCABULARY, WIDTH)?;
        let mut layer = || {
            Ok(Layer {
                qkv: matrix(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)?,
                output: matrix(HEADS * HEAD_DIM, WIDTH)?,
                up: matrix(WIDTH, 2 * WIDTH)?,
                down: matrix(2 * WIDTH, WIDTH)?,
            })
        };
        let layers = (0..LAYERS).map(|_| layer()).collect::<Result<_>>()?;
        Ok(Self { embedding, layers })
    }

    /// The blocks of all layers.
    ///
    /// # Errors
    ///
    /// If their memory cannot be allocated.
    pub(crate) fn blocks(&self, blocks: usize, block_size: usize) -> anyhow::Result<Vec<KvLayer>> {
        let shape = KvShape::new(LAYERS, KV_HEADS, HEAD_DIM);
        Ok(KvLayer::zeros(shape, blocks, block_size, KvDtype::Bf16, &Device::Cpu)?)
    }

    /// The logits of each sequence's last token, `(sequences, vocabulary)`.
    ///
    /// # Errors
    ///
    /// If a table does not fit the blocks, or a tensor operation fails.
    pub(crate) fn forward(&self, kv: &[KvLayer], batch: &Batch) -> Result<Tensor> {
        let rows = batch.token_ids.elem_count();
        let (cos, sin) = rotations(&batch.positions)?;
        let rotate = |x: &Tensor, heads: usize| {
            rotary_emb::rope(&x.reshape((rows, heads, 1, HEAD_DIM))?, &cos, &sin)?.reshape((rows, heads, HEAD_DIM))
        };
        let mut x = self.embedding.index_select(&batch.token_ids, 0)?;
        for (layer, kv) in self.layers.iter().zip(kv) {
            let qkv = norm(&x)?.matmul(&layer.qkv)?.reshape((rows, HEADS + 2 * KV_HEADS, HEAD_DIM))?;
            let part = |first, heads| qkv.narrow(1, first, heads)?.contiguous();
            let (q, k) = (rotate(&part(0, HEADS)?, HEADS)?, rotate(&part(HEADS, KV_HEADS)?, KV_HEADS)?);
            let v = part(HEADS + KV_HEADS, KV_HEADS)?;

            reshape_and_cache(&k, &v, kv, &batch.slot_mapping)?;
            let attention = Attention::scaled_by(HEAD_DIM);
            let Batch { block_tables, context_lens, query_lens, .. } = batch;
            let y = paged_attention(&q, kv, block_tables, context_lens, query_lens, &attention)?;

            x = (x + y.flatten_from(1)?.matmul(&layer.output)?)?;
            x = (&x + ops::silu(&norm(&x)?.matmul(&layer.up)?)?.matmul(&layer.down)?)?;
        }
        norm(&x.index_select(&batch.last_rows, 0)?)?.matmul(&self.embedding.t()?)
    }
}

fn norm(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?)
}

/// The cosines and sines of the rotary embedding, `(tokens, 1, head_dim / 2)`.
fn rotations(positions: &Tensor) -> Result<(Tensor, Tensor)> {
    let half = HEAD_DIM / 2;
    let frequencies: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), &Device::Cpu)?;
    let angles = positions.to_dtype(DType::F32)?.unsqueeze(1)?.matmul(&frequencies)?.unsqueeze(1)?;
    Ok((angles.cos()?, angles.sin()?))
}
