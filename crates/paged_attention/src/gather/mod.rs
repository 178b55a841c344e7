//! Attention in plain tensor operations, for every device that candle supports.
//!
//! The blocks of a sequence are copied into one tensor. The rest is `softmax(q kᵀ) v`, as for a contiguous cache. On a
//! GPU this is a fallback; it has never been run there. On a CPU it is an independent implementation that the fused
//! kernels are compared with.

mod sequence;

use block_pool::KvLayout;
use candle_core::{Result, Tensor};

use crate::Attention;
use crate::plan::{Plan, Planned};

pub(crate) use sequence::Sequence;

/// Writes k `(tokens, kv_heads, head_dim)` and v `(tokens, kv_heads, value_dim)` into the slots of the plan, in place.
/// There is no v if the values are in the keys.
pub(crate) fn write(layer: &Tensor, layout: &KvLayout, plan: &Plan, k: &Tensor, v: Option<&Tensor>) -> Result<()> {
    let KvLayout { block_size, kv_heads, .. } = *layout;
    let rows: Vec<u32> = plan
        .slot_mapping
        .iter()
        .map(|&slot| layout.token_row(slot as usize / block_size, slot as usize % block_size) as u32)
        .collect();
    let put = |rows: Vec<u32>, source: &Tensor| {
        let width = kv_heads * source.dim(2)?;
        let all = layer.reshape((layer.elem_count() / width, width))?;
        let index = Tensor::new(rows, layer.device())?.unsqueeze(1)?.broadcast_as((plan.rows(), width))?;
        let source = source.reshape((plan.rows(), width))?.to_dtype(layer.dtype())?.contiguous()?;
        all.scatter_set(&index.contiguous()?, &source, 0)
    };
    match v {
        Some(v) if layout.planes() == 2 => {
            let value_rows = rows.iter().map(|row| row + block_size as u32).collect();
            put(rows, k)?;
            put(value_rows, v)
        }
        Some(v) => put(rows, &Tensor::cat(&[k, v], 2)?),
        None => put(rows, k),
    }
}

/// Copies the first `len` tokens of `blocks` into contiguous tensors: k `(len, kv_heads, head_dim)` and v `(len,
/// kv_heads, value_dim)`.
pub(crate) fn gather(layer: &Tensor, layout: &KvLayout, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
    let KvLayout { block_size, kv_heads, head_dim, value_dim, values_in_keys, .. } = *layout;
    if len == 0 {
        let empty = |dims| Tensor::zeros((0, kv_heads, dims), layer.dtype(), layer.device());
        return Ok((empty(head_dim)?, empty(value_dim)?));
    }
    let index = Tensor::new(blocks, layer.device())?;
    let blocks = layer.index_select(&index, 0)?;
    let (n, elements) = blocks.dims2()?;
    let tokens = |numbers: &Tensor| numbers.reshape((n * block_size, kv_heads, ()))?.narrow(0, 0, len);
    if layout.planes() == 2 {
        let plane = |plane| tokens(&blocks.narrow(1, plane * elements / 2, elements / 2)?);
        return Ok((plane(0)?, plane(1)?));
    }
    let tokens = tokens(&blocks)?;
    let first = if values_in_keys { 0 } else { head_dim };
    Ok((tokens.narrow(2, 0, head_dim)?, tokens.narrow(2, first, value_dim)?))
}

/// Attention of q `(tokens, heads, head_dim)` over all tokens of each sequence, `(tokens, heads, value_dim)`, and the
/// natural logarithm of the sum of weights of each row and head, `(tokens, heads)` in f32.
pub(crate) fn attend(
    layer: &Tensor,
    layout: &KvLayout,
    plan: &Plan,
    q: &Tensor,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    let each = |compute: fn(&Sequence<'_>) -> Result<(Tensor, Tensor)>| {
        let one = |planned: &Planned| {
            let positions: Vec<usize> = planned.positions(layout.block_size).collect();
            let (k, v) = gather(layer, layout, &plan.blocks[planned.blocks.clone()], positions.len())?;
            let q = q.narrow(0, planned.rows.start, planned.rows.len())?;
            compute(&Sequence::new(planned.clone(), attention, positions, &q, &k, &v)?)
        };
        let parts = plan.sequences.iter().filter(|planned| !planned.rows.is_empty()).map(one);
        let (outs, lses): (Vec<_>, Vec<_>) = parts.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        Ok::<_, candle_core::Error>((Tensor::cat(&outs, 0)?, Tensor::cat(&lses, 0)?))
    };
    let (mut out, mut lse) = each(|sequence| sequence.in_f32())?;
    // One number is copied from the device, whatever the number of sequences.
    if !sequence::is_finite(&out)? {
        (out, lse) = each(|sequence| sequence.recompute())?;
    }
    Ok((out.to_dtype(q.dtype())?, lse))
}
