//! Attention in plain tensor operations, for every device that candle has.
//!
//! Blocks are copied together, and the rest is `softmax(q kᵀ) v` as one would write it for a contiguous cache. On a GPU
//! this is a fallback; on a CPU it is the independent neighbour that the fused kernels are compared with.

use block_pool::KvLayout;
use block_table::Window;
use candle_core::{D, DType, Device, Result, Tensor};

use crate::Attention;
use crate::plan::{Plan, Sight, Span};

/// Writes k and v `(tokens, kv_heads, head_dim)` into the slots of the plan, in place.
pub(crate) fn write(layer: &Tensor, layout: &KvLayout, plan: &Plan, k: &Tensor, v: &Tensor) -> Result<()> {
    let width = layout.kv_heads * layout.head_dim;
    let rows = layer.reshape((layer.elem_count() / width, width))?;
    let keys: Vec<u32> = plan
        .slots
        .iter()
        .map(|&slot| layout.token_row(slot as usize / layout.block_size, slot as usize % layout.block_size) as u32)
        .collect();
    let values: Vec<u32> = keys.iter().map(|row| row + layout.block_size as u32).collect();
    for (index, source) in [(keys, k), (values, v)] {
        let index = Tensor::new(index, layer.device())?.unsqueeze(1)?.broadcast_as((plan.rows(), width))?;
        let source = source.reshape((plan.rows(), width))?.to_dtype(layer.dtype())?.contiguous()?;
        rows.scatter_set(&index.contiguous()?, &source, 0)?;
    }
    Ok(())
}

/// Copies the first `len` tokens of these blocks together: k and v, each `(len, kv_heads, head_dim)`.
pub(crate) fn gather(layer: &Tensor, layout: &KvLayout, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
    let KvLayout { block_size, kv_heads, head_dim, .. } = *layout;
    if len == 0 {
        let empty = Tensor::zeros((0, kv_heads, head_dim), layer.dtype(), layer.device())?;
        return Ok((empty.clone(), empty));
    }
    let index = Tensor::new(blocks, layer.device())?;
    let blocks = layer.index_select(&index, 0)?;
    let n = blocks.dim(0)?;
    let half = blocks.dim(1)? / 2;
    let (k, v) = (blocks.narrow(1, 0, half)?, blocks.narrow(1, half, half)?);
    let tokens = (n * block_size, kv_heads, head_dim);
    Ok((k.reshape(tokens)?.narrow(0, 0, len)?, v.reshape(tokens)?.narrow(0, 0, len)?))
}

/// Attends with q `(tokens, heads, head_dim)` to all tokens of each sequence.
pub(crate) fn attend(
    layer: &Tensor,
    layout: &KvLayout,
    plan: &Plan,
    q: &Tensor,
    attention: &Attention,
) -> Result<Tensor> {
    let outputs = plan
        .spans
        .iter()
        .map(|span| {
            let positions: Vec<usize> = span.held(layout.block_size).collect();
            let (k, v) = gather(layer, layout, &plan.blocks[span.blocks.clone()], positions.len())?;
            let q = q.narrow(0, span.rows.start, span.rows.len())?;
            let mask = mask(span, &positions, attention, q.device())?;
            one(&q, &k, &v, mask.as_ref(), attention)
        })
        .collect::<Result<Vec<_>>>()?;
    Tensor::cat(&outputs, 0)?.to_dtype(q.dtype())
}

/// One sequence without a step: q `(rows, heads, head_dim)` are its tokens from position `at` on, k and v
/// `(positions, kv_heads, head_dim)` those at `positions`, all before `end`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attend_to(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    positions: &[usize],
    at: usize,
    end: usize,
    window: Option<Window>,
    attention: &Attention,
) -> Result<Tensor> {
    let span = Span::of_queries(0..q.dim(0)?, at, end, window);
    let mask = mask(&span, positions, attention, q.device())?;
    one(q, k, v, mask.as_ref(), attention)
}

/// One sequence: q `(rows, heads, head_dim)`, k and v `(len, kv_heads, head_dim)`, mask `(rows, len)` or
/// `(heads, rows, len)`.
fn one(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, attention: &Attention) -> Result<Tensor> {
    let (rows, heads, head_dim) = q.dims3()?;
    let (len, kv_heads, _) = k.dims3()?;
    let group = heads / kv_heads;
    let to_heads = |t: &Tensor| t.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous();
    let (k, v) = (to_heads(k)?, to_heads(v)?);
    // The query heads of one key head become rows of one product: keys are not repeated.
    let q = (q.to_dtype(DType::F32)? * f64::from(attention.scale))?
        .reshape((rows, kv_heads, group, head_dim))?
        .permute((1, 2, 0, 3))?
        .reshape((kv_heads, group * rows, head_dim))?;
    let mut scores = q.matmul(&k.t()?)?;
    if let Some(cap) = attention.soft_cap.map(f64::from) {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    if let Some(mask) = mask {
        scores = scores.reshape((kv_heads * group, rows, len))?.broadcast_add(mask)?.reshape((
            kv_heads,
            group * rows,
            len,
        ))?;
    }
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights
        .matmul(&v)?
        .reshape((kv_heads, group, rows, head_dim))?
        .permute((2, 0, 1, 3))?
        .reshape((rows, heads, head_dim))
}

/// `(rows, len)`: 0 where a new token sees one of `positions`, -inf where it does not; `(heads, rows, len)` if a bias by
/// distance differs from head to head. None if all see everything as it is.
fn mask(span: &Span, positions: &[usize], attention: &Attention, device: &Device) -> Result<Option<Tensor>> {
    let rows = span.rows.len();
    let windowed = span.window.is_some() || attention.window.is_some();
    if attention.slopes.is_none() && !windowed && (!attention.causal || (rows == 1 && span.start + 1 >= span.len())) {
        return Ok(None);
    }
    let slopes = attention.slopes.as_deref().unwrap_or(&[0.0]);
    let mut mask = Vec::with_capacity(slopes.len() * rows * positions.len());
    for slope in slopes {
        for row in 0..rows {
            let Sight { sinks, recent } = span.sight(row, attention);
            let sees = |at: usize| at < sinks || recent.contains(&at);
            let bias = |at: usize| slope * (at as f32 - (span.start + row) as f32);
            mask.extend(positions.iter().map(|&at| if sees(at) { bias(at) } else { f32::NEG_INFINITY }));
        }
    }
    let mask = Tensor::from_vec(mask, (slopes.len(), rows, positions.len()), device)?;
    if attention.slopes.is_none() { mask.squeeze(0).map(Some) } else { Ok(Some(mask)) }
}
