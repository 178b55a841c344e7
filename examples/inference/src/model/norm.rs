//! The norm by the root of the mean square (Zhang and Sennrich 2019).

use anyhow::Result;
use candle_core::Tensor;
use candle_nn::ops;

use crate::gguf::Gguf;

#[derive(Debug)]
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub(super) fn load(gguf: &mut Gguf, name: &str) -> Result<Self> {
        Ok(Self { weight: gguf.f32(name)?, eps: gguf.config().eps })
    }

    /// Norms each row of the last dimension.
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }
}
