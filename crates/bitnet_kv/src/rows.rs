//! New keys and values from the caller, checked and brought into one shape.

use candle_core::{D, DType, Device, Tensor};
use paged_attention::{KvDtype, KvShape};

use crate::KvError;
use crate::error::Result;

/// How far a value may differ through rounding, relative to the largest value of its row. 8-bit storage changes a value
/// by up to 1/254 of that.
const ROUNDING: f64 = 0.01;

/// The shape, type and device of the tensors that a cache accepts.
#[derive(Debug, Clone)]
pub(crate) struct Taken {
    pub(crate) shape: KvShape,
    pub(crate) dtype: DType,
    pub(crate) device: Device,
}

/// New keys and values, each `(batch, tokens, kv_heads, head_dim)`.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    k: Tensor,
    v: Tensor,
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
}

impl Taken {
    pub(crate) fn new(shape: KvShape, dtype: KvDtype, device: &Device) -> Self {
        // 8-bit storage is computed from f32 tensors.
        let dtype = if dtype == KvDtype::Int8 { DType::F32 } else { dtype.tensor_dtype() };
        Self { shape, dtype, device: device.clone() }
    }

    /// Checks `k` and `v`: `[batch, kv_heads, tokens, head_dim]` or, if `flat`, also `[tokens, kv_heads, head_dim]`.
    pub(crate) fn rows(&self, k: &Tensor, v: &Tensor, flat: bool) -> Result<Rows> {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let (batch, heads, tokens, dims) = match *k.dims() {
            [batch, heads, tokens, dims] => (batch, heads, tokens, dims),
            [tokens, heads, dims] if flat => (1, heads, tokens, dims),
            _ => return self.shape_error(k, v, flat),
        };
        let (k_dims, v_dims) = (k.dims().to_vec(), v.dims().to_vec());
        if k_dims == v_dims && dims == head_dim && heads != kv_heads {
            return Err(KvError::Heads { expected: kv_heads, got: heads, k: k_dims, v: v_dims });
        }
        if k_dims != v_dims || dims != head_dim || heads != kv_heads || batch == 0 {
            return self.shape_error(k, v, flat);
        }
        self.number(k, "k")?;
        self.number(v, "v")?;
        let by_token = |t: &Tensor| match t.rank() {
            3 => t.unsqueeze(0),
            _ => t.transpose(1, 2),
        };
        Ok(Rows { k: by_token(k)?, v: by_token(v)?, batch, tokens })
    }

    /// Checks the type and the device of a tensor.
    pub(crate) fn number(&self, tensor: &Tensor, name: &'static str) -> Result<()> {
        if tensor.dtype() != self.dtype {
            let (got, expected) = (tensor.dtype().as_str(), self.dtype.as_str());
            return Err(KvError::DType { tensor: name, got, expected });
        }
        if !tensor.device().same_device(&self.device) {
            let (got, expected) = (format!("{:?}", tensor.device()), format!("{:?}", self.device));
            return Err(KvError::Device { tensor: name, got, expected });
        }
        Ok(())
    }

    fn shape_error<T>(&self, k: &Tensor, v: &Tensor, flat: bool) -> Result<T> {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let or = if flat { format!("[T, {kv_heads}, {head_dim}] or ") } else { String::new() };
        let expected = format!("{or}[B, {kv_heads}, T, {head_dim}]");
        Err(KvError::Shape { k: k.dims().to_vec(), v: v.dims().to_vec(), expected })
    }
}

impl Rows {
    /// The first token that differs from `k` or `v`, each `(batch, tokens, kv_heads, head_dim)`, by more than rounding
    /// explains: rounding to 8 bits, or of sums in another order.
    pub(crate) fn differs(&self, k: &Tensor, v: &Tensor) -> Result<Option<usize>> {
        let mut first = None;
        for (own, other) in [(&self.k, k), (&self.v, v)] {
            let (own, other) = (own.to_dtype(DType::F32)?, other.to_dtype(DType::F32)?);
            let largest = other.abs()?.max_keepdim(D::Minus1)?;
            let apart = (own - other)?.abs()?.max_keepdim(D::Minus1)?;
            let apart = apart.gt(&(largest * ROUNDING)?)?.squeeze(D::Minus1)?; // (batch, tokens, kv_heads)
            for sequence in apart.to_vec3::<u8>()? {
                let at = sequence.iter().position(|heads| heads.contains(&1));
                first = at.into_iter().chain(first).min();
            }
        }
        Ok(first)
    }

    /// The last `tokens` tokens.
    pub(crate) fn last(&self, tokens: usize) -> Result<Self> {
        self.slice(self.tokens - tokens, tokens)
    }

    /// `tokens` tokens from `first` on.
    pub(crate) fn slice(&self, first: usize, tokens: usize) -> Result<Self> {
        Ok(Self { k: self.k.narrow(1, first, tokens)?, v: self.v.narrow(1, first, tokens)?, batch: self.batch, tokens })
    }

    /// `tokens` tokens from `first` on, packed: `(batch * tokens, kv_heads, head_dim)`.
    pub(crate) fn packed(&self, first: usize, tokens: usize) -> Result<(Tensor, Tensor)> {
        let pack = |t: &Tensor| -> Result<Tensor> {
            let (_, _, heads, dims) = t.dims4()?;
            Ok(t.narrow(1, first, tokens)?.reshape((self.batch * tokens, heads, dims))?)
        };
        Ok((pack(&self.k)?, pack(&self.v)?))
    }
}
