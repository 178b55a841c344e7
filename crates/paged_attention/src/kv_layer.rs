//! Keys and values of one layer for engines that have a block manager of their own.

use block_pool::{KvDtype, KvLayout, KvShape, KvTensors, Order};
use candle_core::{Device, Result, Tensor};

use crate::backend::Layer;
use crate::{CacheError, Kernel, KvCache, cpu};

/// The blocks of one layer, without a pool that says which are free: for engines that have a block manager of their
/// own. [`paged_attention`](crate::paged_attention) reads them, [`reshape_and_cache`](crate::reshape_and_cache) writes
/// them. A clone shares the blocks.
#[derive(Debug, Clone)]
pub struct KvLayer {
    /// `(blocks, elements of a block)`
    tensor: Tensor,
    layout: KvLayout,
    kernel: Kernel,
}

impl KvLayer {
    /// Allocates the layers of a model: each has `blocks` zeroed blocks of `block_size` tokens. On a CPU the fastest
    /// kernel that this machine can run reads them in place; on other devices tensor operations do (never run there).
    ///
    /// # Errors
    ///
    /// [`CacheError`] when a number is zero or too large, the memory cannot be allocated, or `dtype` cannot be stored
    /// on this device.
    pub fn zeros(
        shape: KvShape,
        blocks: usize,
        block_size: usize,
        dtype: KvDtype,
        device: &Device,
    ) -> std::result::Result<Vec<Self>, CacheError> {
        cpu::check_dims(dtype, shape.head_dim)?;
        let order = if device.is_cpu() { Order::of_panels(dtype) } else { Order::Nhd };
        let tensors = KvTensors::zeros(shape, blocks, block_size, order, dtype, device)?;
        let layers = (0..shape.layers).filter_map(|layer| tensors.layer(layer));
        let of = |tensor: &Tensor| Self { tensor: tensor.clone(), layout: *tensors.layout(), kernel: Kernel::best() };
        Ok(layers.map(of).collect())
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.tensor.dims()[0]
    }

    /// Where the numbers of a block lie: the tokens per block, heads and dimensions among others.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// All blocks, `(blocks, elements of a block)`: to copy or swap blocks.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub(crate) fn layer(&self) -> Layer<'_> {
        Layer { tensor: &self.tensor, layout: &self.layout, kernel: self.kernel, group: 0 }
    }
}

impl KvCache {
    /// The blocks of one layer of this cache, for tables that are kept elsewhere. The pool knows nothing of what is
    /// done with them: write only to blocks that tables of yours use.
    ///
    /// # Errors
    ///
    /// [`AttendError::NoLayer`](crate::AttendError::NoLayer), wrapped, when the layer does not exist.
    pub fn kv_layer(&self, layer: usize) -> Result<KvLayer> {
        let Layer { tensor, layout, kernel, .. } = self.layer(layer)?;
        Ok(KvLayer { tensor: tensor.clone(), layout: *layout, kernel })
    }
}
