//! The cache: a pool, the tensors that hold its blocks, and the kernel that attention uses.

use std::sync::Arc;

use block_pool::{BlockPool, KvDtype, KvLayout, KvShape, KvTensors, Order, PoolMetrics};
use block_table::{BlockTable, TableOptions};
use candle_core::{Device, Result, Tensor};

use crate::backend::Layer;
use crate::{Kernel, KvCacheBuilder, Step, validate};

/// A paged KV cache. A clone is another handle to the same cache, and threads can share it.
#[derive(Debug, Clone)]
pub struct KvCache {
    pool: BlockPool,
    tensors: KvTensors,
    shape: KvShape,
    kernel: Kernel,
    metrics: Arc<PoolMetrics>,
}

impl KvCache {
    /// A builder for a cache. `shape` has the number of layers, the heads of keys and values, and their dimensions.
    pub fn builder(shape: KvShape) -> KvCacheBuilder {
        KvCacheBuilder::new(shape)
    }

    pub(crate) fn from_parts(
        pool: BlockPool,
        tensors: KvTensors,
        shape: KvShape,
        kernel: Kernel,
        metrics: PoolMetrics,
    ) -> Self {
        Self { pool, tensors, shape, kernel, metrics: Arc::new(metrics) }
    }

    /// The table of a new, empty sequence. Call [`BlockTable::match_prefix`] before the prompt is computed, to start
    /// with the cached blocks of its longest prefix.
    pub fn table(&self) -> BlockTable {
        BlockTable::new(&self.pool)
    }

    /// The table of a new, empty sequence with options: a window, a salt that must match for prefixes to be shared, or
    /// private prefixes.
    pub fn table_with(&self, options: &TableOptions) -> BlockTable {
        BlockTable::with_options(&self.pool, options)
    }

    /// A new step: one forward pass over any number of sequences.
    pub fn step<'t>(&self) -> Step<'t> {
        Step::new(self)
    }

    /// The pool of blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The number of layers, and the heads and dimensions of keys and values.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The type in which keys and values are stored.
    pub fn dtype(&self) -> KvDtype {
        self.tensors.dtype()
    }

    /// The device that holds the keys and values.
    pub fn device(&self) -> &Device {
        self.tensors.device()
    }

    /// The size of one block in bytes, over all layers.
    pub fn bytes_per_block(&self) -> usize {
        self.tensors.bytes_per_block()
    }

    /// The tensor of one layer, `(blocks, elements of a block)`, for your own kernels. `docs/layout.md` has the order
    /// of the elements. Reading is always safe; write only to blocks that your own tables use.
    ///
    /// # Errors
    ///
    /// When the layer does not exist.
    pub fn tensor(&self, layer: usize) -> Result<&Tensor> {
        validate::layer(&self.tensors, layer)
    }

    pub(crate) fn layer(&self, layer: usize) -> Result<Layer<'_>> {
        let tensor = validate::layer(&self.tensors, layer)?;
        Ok(Layer { tensor, layout: self.layout(), kernel: self.kernel })
    }

    /// Whether the CPU's kernels read the blocks.
    pub(crate) fn is_fused(&self) -> bool {
        self.layout().order != Order::Nhd
    }

    pub(crate) fn layout(&self) -> &KvLayout {
        self.tensors.layout()
    }

    pub(crate) fn record_metrics(&self) {
        self.metrics.record(&self.pool);
    }

    pub(crate) fn kernel(&self) -> Kernel {
        self.kernel
    }
}
