//! A model for the examples, with random weights: what it says means nothing, but it says the same to the same text.

use candle_core::{D, DType, Device, Result, Tensor};
use paged_attention::{Attention, Step};

pub(crate) const VOCABULARY: usize = 96;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const HEAD_DIM: usize = 16;
const HEADS: usize = 4;
const WIDTH: usize = HEADS * HEAD_DIM;

pub(crate) struct ToyModel {
    embedding: Tensor,
    /// For each layer: the matrices of q, k, v and the output.
    layers: Vec<[Tensor; 4]>,
}

impl ToyModel {
    pub(crate) fn new(layers: usize) -> Result<Self> {
        let mut seed = 0;
        let mut matrix = |rows: usize| {
            seed += 1;
            let number = |i: usize| ((i * 7919 + seed * 104_729) as f32 * 0.618).sin() * 0.4;
            Tensor::from_iter((0..rows * WIDTH).map(number), &Device::Cpu)?.reshape((rows, WIDTH))
        };
        let embedding = matrix(VOCABULARY)?;
        let kv = KV_HEADS * HEAD_DIM;
        let mut layer = || Ok([matrix(WIDTH)?, matrix(kv)?, matrix(kv)?, matrix(WIDTH)?]);
        Ok(Self { embedding, layers: (0..layers).map(|_| layer()).collect::<Result<_>>()? })
    }

    /// One forward pass: the most likely next token after each row whose logits the step wants.
    pub(crate) fn forward(&self, step: &Step<'_>) -> Result<Vec<u32>> {
        let rows = step.tokens();
        let mut x = self.embedding.index_select(&step.token_ids()?, 0)?; // (tokens, width)
        for (i, [q, k, v, o]) in self.layers.iter().enumerate() {
            let heads = |matrix: &Tensor, heads| x.matmul(&matrix.t()?)?.reshape((rows, heads, HEAD_DIM));
            let (q, k, v) = (heads(q, HEADS)?, heads(k, KV_HEADS)?, heads(v, KV_HEADS)?);
            let y = step.attend(i, &q, &k, &v, &Attention::scaled_by(HEAD_DIM))?; // (tokens, heads, head_dim)
            x = (y.flatten_from(1)?.matmul(&o.t()?)?.tanh()? + x)?;
        }
        let wanted = x.index_select(&step.logits_rows()?, 0)?;
        wanted.matmul(&self.embedding.t()?)?.argmax(D::Minus1)?.to_dtype(DType::U32)?.to_vec1()
    }
}
