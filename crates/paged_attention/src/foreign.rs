//! Attention over the block tables of another block manager.

use candle_core::{DType, Result, Tensor};

use crate::backend::Queries;
use crate::plan::Plan;
use crate::{AttendError, Attention, KvLayer, validate, wrap_error};

/// Writes keys and values to the slots `slot_mapping`, `block * block_size + offset` for each token.
///
/// | tensor | shape |
/// |---|---|
/// | `k` | `(tokens, kv_heads, head_dim)`: f32, f16 or bf16 |
/// | `v` | `(tokens, kv_heads, value_dim)`, or `None` if the [values are in the keys](crate::KvShape::values_in_keys) |
/// | `slot_mapping` | `(tokens)` of u32, i32 or i64; a token with a negative slot is not written |
///
/// The name and the arguments are vLLM's.
///
/// # Errors
///
/// [`AttendError`], wrapped, when a shape, dtype or device is wrong, or a slot does not exist; nothing was written
/// then. Otherwise the error of the device.
pub fn reshape_and_cache<'v>(
    k: &Tensor,
    v: impl Into<Option<&'v Tensor>>,
    kv: &KvLayer,
    slot_mapping: &Tensor,
) -> Result<()> {
    let (v, layer) = (v.into(), kv.layer());
    let rows = k.dims().first().copied().unwrap_or(0);
    validate::keys_and_values(layer, rows, k, v)?;
    let slots = integers(slot_mapping, "slot_mapping", &[rows])?;
    let all = kv.blocks() * kv.layout().block_size;
    if let Some(slot) = slots.iter().find(|slot| **slot >= all as i64) {
        return validate::tables_error(format!("slot_mapping has slot {slot}, but the layer has {all} slots"));
    }
    let written: Vec<u32> = (0..).zip(&slots).filter_map(|(row, slot)| (*slot >= 0).then_some(row)).collect();
    let plan = Plan::of_slots(slots.iter().filter(|slot| **slot >= 0).map(|slot| *slot as u32).collect());
    if written.is_empty() {
        return Ok(());
    }
    if written.len() == rows {
        return layer.write(&plan, k, v);
    }
    let index = Tensor::new(written, k.device())?;
    let select = |t: &Tensor| t.contiguous()?.index_select(&index, 0);
    layer.write(&plan, &select(k)?, v.map(select).transpose()?.as_ref())
}

/// Attention over blocks that another block manager hands out: `q (tokens, heads, head_dim)` are the last tokens of
/// some sequences, packed one sequence after the other, each attending to its tokens in the blocks of `kv`. Returns
/// `(tokens, heads, value_dim)`.
///
/// | tensor | shape |
/// |---|---|
/// | `q` | `(tokens, heads, head_dim)`: f32, f16 or bf16 |
/// | `block_tables` | `(sequences, most blocks)` of u32, i32 or i64: the blocks of each, by position; the rest is not read |
/// | `context_lens` | `(sequences)`: how many tokens each has, those of `q` included |
/// | `query_lens` | `(sequences)`: how many of them are in `q` |
///
/// With one row for each sequence it is decode, with more prefill or its chunks; both can be mixed. Keys and values of
/// the tokens in `q` have to be written before ([`reshape_and_cache`]). Attention over the same tokens is the same as
/// in [`Step::attend`](crate::Step::attend), to the last bit.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use paged_attention::{Attention, KvDtype, KvLayer, KvShape, paged_attention, reshape_and_cache};
///
/// let device = &Device::Cpu;
/// let kv = KvLayer::zeros(KvShape::new(1, 2, 64), /* blocks */ 8, /* tokens each */ 16, KvDtype::F32, device)?;
/// // Two sequences: one of 18 tokens in the blocks 3 and 5, of which 2 are new, and a new one of 1 token in block 0.
/// let block_tables = Tensor::new(&[[3u32, 5], [0, 0]], device)?;
/// let (context_lens, query_lens) = (Tensor::new(&[18u32, 1], device)?, Tensor::new(&[2u32, 1], device)?);
/// let slot_mapping = Tensor::new(&[5 * 16 + 0i64, 5 * 16 + 1, 0], device)?;
/// let rows = |heads| Tensor::zeros((3, heads, 64), DType::F32, device);
/// reshape_and_cache(&rows(2)?, &rows(2)?, &kv[0], &slot_mapping)?;
/// let attention = Attention::scaled_by(64);
/// let y = paged_attention(&rows(6)?, &kv[0], &block_tables, &context_lens, &query_lens, &attention)?;
/// assert_eq!(y.dims(), [3, 6, 64]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`AttendError`], wrapped, when a shape, dtype or device is wrong, a block does not exist, a table is too short for
/// its context, a sequence has more queries than tokens, or the queries are not as many as the rows of `q`. Otherwise
/// the error of the device.
pub fn paged_attention(
    q: &Tensor,
    kv: &KvLayer,
    block_tables: &Tensor,
    context_lens: &Tensor,
    query_lens: &Tensor,
    attention: &Attention,
) -> Result<Tensor> {
    let (plan, heads) = plan(q, kv, block_tables, context_lens, query_lens, attention)?;
    kv.layer().attend(Queries { plan: &plan, q, heads, attention })
}

/// As [`paged_attention`]. Returns also the natural logarithm of the sum of weights of each row and head, as
/// [`Step::attend_with_lse`](crate::Step::attend_with_lse) does.
///
/// # Errors
///
/// As [`paged_attention`].
pub fn paged_attention_with_lse(
    q: &Tensor,
    kv: &KvLayer,
    block_tables: &Tensor,
    context_lens: &Tensor,
    query_lens: &Tensor,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    let (plan, heads) = plan(q, kv, block_tables, context_lens, query_lens, attention)?;
    kv.layer().attend_with_lse(Queries { plan: &plan, q, heads, attention })
}

/// Checks all arguments. Returns the plan of the sequences, and the number of query heads.
fn plan(
    q: &Tensor,
    kv: &KvLayer,
    block_tables: &Tensor,
    context_lens: &Tensor,
    query_lens: &Tensor,
    attention: &Attention,
) -> Result<(Plan, usize)> {
    let rows = q.dims().first().copied().unwrap_or(0);
    let heads = validate::queries_alone(kv.layer(), rows, q, attention)?;
    let sequences = context_lens.dims().first().copied().unwrap_or(0);
    let width = block_tables.dims().get(1).copied().unwrap_or(0);
    let tables = integers(block_tables, "block_tables", &[sequences, width])?;
    let contexts = integers(context_lens, "context_lens", &[sequences])?;
    let queries = integers(query_lens, "query_lens", &[sequences])?;
    let (block_size, all) = (kv.layout().block_size, kv.blocks());
    let mut plan = Plan::default();
    let mut planned = 0;
    for (sequence, (&context, &query)) in contexts.iter().zip(&queries).enumerate() {
        let (Ok(context), Ok(query)) = (usize::try_from(context), usize::try_from(query)) else {
            return validate::tables_error(format!(
                "sequence {sequence} has a context of {context} and {query} queries"
            ));
        };
        if query > context {
            return validate::tables_error(format!(
                "sequence {sequence} has {query} queries, but a context of {context} tokens"
            ));
        }
        let needed = context.div_ceil(block_size);
        if needed > width {
            let has = format!("its table has room for {width} blocks of {block_size}");
            return validate::tables_error(format!("sequence {sequence} has a context of {context} tokens, but {has}"));
        }
        let blocks = &tables[sequence * width..][..needed];
        if let Some(block) = blocks.iter().find(|block| !(0..all as i64).contains(*block)) {
            return validate::tables_error(format!(
                "sequence {sequence} has block {block}, but the layer has {all} blocks"
            ));
        }
        planned += query;
        // A sequence that is not computed has no rows, so it needs no plan.
        if query > 0 {
            plan.push_last(query, context, blocks.iter().map(|block| *block as u32));
        }
    }
    if planned != rows {
        return validate::tables_error(format!("the sequences have {planned} queries, but q has {rows} rows"));
    }
    Ok((plan, heads))
}

/// The numbers of an integer tensor of this shape, one row after another.
fn integers(tensor: &Tensor, name: &'static str, shape: &[usize]) -> Result<Vec<i64>> {
    if tensor.dims() != shape {
        let (got, expected) = (tensor.dims().to_vec(), format!("{shape:?}"));
        return Err(wrap_error(AttendError::Shape { tensor: name, got, expected }));
    }
    if !matches!(tensor.dtype().as_str(), "u32" | "i32" | "i64") {
        let got = tensor.dtype().as_str();
        return Err(wrap_error(AttendError::DType { tensor: name, got, expected: "u32, i32 or i64" }));
    }
    tensor.flatten_all()?.to_dtype(DType::I64)?.to_vec1()
}
