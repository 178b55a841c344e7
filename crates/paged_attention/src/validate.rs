//! Checks of the arguments of attention, made before anything is written.

use block_pool::{BlockPool, KvLayout};
use block_table::BlockTable;
use candle_core::{DType, Device, Result, Tensor};

use crate::backend::Layer;
use crate::{Attention, wrap_error};

/// The arguments of [`Step::attend`](crate::Step::attend), or of another function that reads or writes a layer, are
/// invalid. The error is wrapped in a `candle_core::Error`, so that `?` works in a model;
/// [`find_error`](crate::find_error) finds it there.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttendError {
    /// The layer does not exist.
    #[error("there is no layer {layer}: the cache has {layers} layers")]
    NoLayer {
        /// The requested layer.
        layer: usize,
        /// How many layers the cache has.
        layers: usize,
    },
    /// A tensor has the wrong shape.
    #[error("{tensor} has shape {got:?}, expected {expected}")]
    Shape {
        /// `q`, `k` or `v`.
        tensor: &'static str,
        /// The shape it has.
        got: Vec<usize>,
        /// The shape it should have.
        expected: String,
    },
    /// The number of query heads is not a multiple of the number of key heads.
    #[error("{heads} query heads are not a multiple of {kv_heads} key heads")]
    Groups {
        /// The number of query heads.
        heads: usize,
        /// The number of key and value heads.
        kv_heads: usize,
    },
    /// The number of ALiBi slopes differs from the number of query heads.
    #[error("{slopes} ALiBi slopes were given for {heads} query heads")]
    Slopes {
        /// How many slopes were given.
        slopes: usize,
        /// The number of query heads.
        heads: usize,
    },
    /// The number of sink logits differs from the number of query heads.
    #[error("{logits} sink logits were given for {heads} query heads")]
    SinkLogits {
        /// How many sink logits were given.
        logits: usize,
        /// The number of query heads.
        heads: usize,
    },
    /// A sink logit is NaN or +inf.
    #[error("a sink logit of {0} is not a number below infinity")]
    SinkLogit(f32),
    /// Values were given for a layer whose values are in its keys, or none for a layer that has values of its own.
    #[error("{0}")]
    Values(&'static str),
    /// The layer was not written in this step, so the new tokens have no keys and values in it.
    #[error("layer {layer} was not written in this step: attend to it after the layer that writes it")]
    NotWritten {
        /// The layer.
        layer: usize,
    },
    /// The soft cap is zero, negative or NaN.
    #[error("a soft cap of {0} is not greater than 0")]
    SoftCap(f32),
    /// A tensor has a type that attention does not read, or `k` or `v` differs in type from the others.
    #[error("{tensor} is {got}, expected {expected}")]
    DType {
        /// `q`, `k` or `v`.
        tensor: &'static str,
        /// The type it has.
        got: &'static str,
        /// The type it should have.
        expected: &'static str,
    },
    /// A tensor is on another device than the cache.
    #[error("{tensor} is on {got}, the cache is on {expected}")]
    Device {
        /// `q`, `k` or `v`.
        tensor: &'static str,
        /// The tensor's device.
        got: String,
        /// The cache's device.
        expected: String,
    },
    /// The step has no sequences.
    #[error("no sequence was pushed to the step")]
    EmptyStep,
    /// A segment, or the tables of a write, have no new tokens.
    #[error("no rows were given: there is no new token to compute")]
    NoRows,
    /// The table's blocks belong to another cache's pool.
    #[error("the table belongs to another pool")]
    ForeignTable,
    /// A block table, a slot mapping, or the lengths of sequences, given to
    /// [`paged_attention`](crate::paged_attention), [`reshape_and_cache`](crate::reshape_and_cache) or
    /// [`KvCache::attend_cached`](crate::KvCache::attend_cached), are invalid. The text says why.
    #[error("{0}")]
    Tables(String),
    /// The segments of [`attend_segments`](crate::attend_segments), or the positions of
    /// [`KvCache::write`](crate::KvCache::write) or [`KvCache::read`](crate::KvCache::read), are invalid. The text says
    /// why.
    #[error("{0}")]
    Segments(String),
}

/// An error about block tables, slots or lengths.
pub(crate) fn tables_error<T>(what: String) -> Result<T> {
    Err(wrap_error(AttendError::Tables(what)))
}

pub(crate) fn table(pool: &BlockPool, table: &BlockTable) -> Result<()> {
    if table.pool().is_same(pool) { Ok(()) } else { Err(wrap_error(AttendError::ForeignTable)) }
}

/// Checks k and v. There is no v if the values are in the keys.
pub(crate) fn keys_and_values(layer: Layer<'_>, rows: usize, k: &Tensor, v: Option<&Tensor>) -> Result<()> {
    check_keys_and_values(layer, rows, k, v).map_err(wrap_error)
}

/// Checks q, its type against that of k, and the attention parameters. Returns the number of query heads.
pub(crate) fn queries(layer: Layer<'_>, rows: usize, q: &Tensor, k: &Tensor, attention: &Attention) -> Result<usize> {
    let heads = queries_alone(layer, rows, q, attention)?;
    same_dtype(k, "k", q).map_err(wrap_error)?;
    Ok(heads)
}

/// Checks q and the attention parameters. Returns the number of query heads.
pub(crate) fn queries_alone(layer: Layer<'_>, rows: usize, q: &Tensor, attention: &Attention) -> Result<usize> {
    check_queries(layer, rows, q)
        .and_then(|heads| check_attention(attention, heads).map(|()| heads))
        .map_err(wrap_error)
}

fn check_attention(attention: &Attention, heads: usize) -> std::result::Result<(), AttendError> {
    if let Some(slopes) = attention.slopes.as_ref().map(|slopes| slopes.len()).filter(|slopes| *slopes != heads) {
        return Err(AttendError::Slopes { slopes, heads });
    }
    if let Some(logits) = &attention.sink_logits {
        if logits.len() != heads {
            return Err(AttendError::SinkLogits { logits: logits.len(), heads });
        }
        if let Some(&logit) = logits.iter().find(|logit| logit.is_nan() || **logit == f32::INFINITY) {
            return Err(AttendError::SinkLogit(logit));
        }
    }
    match attention.soft_cap {
        Some(cap) if cap.is_nan() || cap <= 0.0 => Err(AttendError::SoftCap(cap)),
        _ => Ok(()),
    }
}

fn check_keys_and_values(
    layer: Layer<'_>,
    rows: usize,
    k: &Tensor,
    v: Option<&Tensor>,
) -> std::result::Result<(), AttendError> {
    if rows == 0 {
        return Err(AttendError::NoRows);
    }
    let KvLayout { kv_heads, head_dim, value_dim, values_in_keys, .. } = *layer.layout;
    let check = |tensor: &Tensor, name: &'static str, dim: &'static str, dims: usize| {
        if tensor.dims() != [rows, kv_heads, dims] {
            let expected = format!("({rows} tokens, {kv_heads} kv_heads, {dims} {dim})");
            return Err(AttendError::Shape { tensor: name, got: tensor.dims().to_vec(), expected });
        }
        check_dtype_and_device(layer.tensor.device(), tensor, name)
    };
    check(k, "k", "head_dim", head_dim)?;
    match v {
        Some(_) if values_in_keys => Err(AttendError::Values("the values of this layer are in its keys: pass no v")),
        None if !values_in_keys => Err(AttendError::Values("this layer has values of its own: v is missing")),
        Some(v) => check(v, "v", "value_dim", value_dim).and_then(|()| same_dtype(v, "v", k)),
        None => Ok(()),
    }
}

fn check_queries(layer: Layer<'_>, rows: usize, q: &Tensor) -> std::result::Result<usize, AttendError> {
    if rows == 0 {
        return Err(AttendError::NoRows);
    }
    let KvLayout { kv_heads, head_dim, .. } = *layer.layout;
    let heads = match *q.dims() {
        [r, heads, dim] if r == rows && dim == head_dim && heads > 0 => heads,
        ref dims => {
            let expected = format!("({rows} tokens, heads, {head_dim} head_dim)");
            return Err(AttendError::Shape { tensor: "q", got: dims.to_vec(), expected });
        }
    };
    if heads % kv_heads != 0 {
        return Err(AttendError::Groups { heads, kv_heads });
    }
    check_dtype_and_device(layer.tensor.device(), q, "q")?;
    Ok(heads)
}

/// Checks that a tensor has a type that attention reads, and is on the cache's device.
fn check_dtype_and_device(
    device: &Device,
    tensor: &Tensor,
    name: &'static str,
) -> std::result::Result<(), AttendError> {
    if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(AttendError::DType { tensor: name, got: tensor.dtype().as_str(), expected: "f32, f16 or bf16" });
    }
    if !tensor.device().same_device(device) {
        let (got, expected) = (format!("{:?}", tensor.device()), format!("{device:?}"));
        return Err(AttendError::Device { tensor: name, got, expected });
    }
    Ok(())
}

fn same_dtype(tensor: &Tensor, name: &'static str, as_: &Tensor) -> std::result::Result<(), AttendError> {
    if tensor.dtype() == as_.dtype() {
        return Ok(());
    }
    Err(AttendError::DType { tensor: name, got: tensor.dtype().as_str(), expected: as_.dtype().as_str() })
}
