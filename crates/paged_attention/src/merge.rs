//! Merges attention over different tokens: "Flash-Decoding", Dao et al. 2023.

use candle_core::{DType, Result, Tensor};

use crate::{AttendError, wrap_error};

/// Merges the results of attention of the same queries over different tokens, for example over a prefix that sequences
/// share and over the rest of each, or over the tokens of several machines.
///
/// Each part is a result `(tokens, heads, value_dim)` and the natural logarithm of its sum of weights, `(tokens,
/// heads)` in f32, as [`Step::attend_with_lse`](crate::Step::attend_with_lse) returns them, or kernels of others
/// (FlashInfer's are to base two: multiply them by ln 2). The merged result, in the type of the first part, and its
/// logarithm are returned. A row that sees no token in any part is zero, and its logarithm -inf.
///
/// A sink logit counts once: give it to one of the parts only ([`Attention::without_sink_logits`]).
///
/// [`Attention::without_sink_logits`]: crate::Attention::without_sink_logits
///
/// # Errors
///
/// [`AttendError::Shape`], wrapped, when there are no parts, or their shapes do not fit. Otherwise the error of the
/// device.
pub fn merge_states(parts: &[(Tensor, Tensor)]) -> Result<(Tensor, Tensor)> {
    let wrong = |tensor, got: &Tensor, expected: String| {
        Err(wrap_error(AttendError::Shape { tensor, got: got.dims().to_vec(), expected }))
    };
    let Some((first, _)) = parts.first() else {
        return Err(wrap_error(AttendError::NoRows));
    };
    let &[rows, heads, _] = first.dims() else {
        return wrong("a result", first, "(tokens, heads, value_dim)".into());
    };
    for (out, lse) in parts {
        if out.dims() != first.dims() {
            return wrong("a result", out, format!("{:?}, as the first part", first.dims()));
        }
        if lse.dims() != [rows, heads] {
            return wrong("a logarithm", lse, format!("({rows} tokens, {heads} heads)"));
        }
    }
    let logs = parts.iter().map(|(_, lse)| lse.to_dtype(DType::F32)).collect::<Result<Vec<_>>>()?;
    let logs = Tensor::stack(&logs, 0)?;
    // A row without tokens has only logarithms of -inf. -inf minus -inf would be NaN.
    let max = logs.max_keepdim(0)?;
    let reference = max.maximum(f32::MIN)?;
    let weights = logs.broadcast_sub(&reference)?.exp()?;
    let sum = weights.sum_keepdim(0)?;
    let shares = weights.broadcast_div(&sum.maximum(f32::MIN_POSITIVE)?)?;
    let lse = (reference + sum.log()?)?.squeeze(0)?;
    let mut merged: Option<Tensor> = None;
    for (part, (out, _)) in parts.iter().enumerate() {
        let share = shares.narrow(0, part, 1)?.squeeze(0)?.unsqueeze(2)?;
        let weighted = out.to_dtype(DType::F32)?.broadcast_mul(&share)?;
        merged = Some(match merged {
            Some(merged) => (merged + weighted)?,
            None => weighted,
        });
    }
    let merged = merged.map_or_else(|| first.clone().to_dtype(DType::F32), Ok)?;
    Ok((merged.to_dtype(first.dtype())?, lse))
}
