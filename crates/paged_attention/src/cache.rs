//! The cache: a pool, the tensors behind it, and a way to attend over them.

use std::sync::Arc;

use block_pool::{BlockPool, KvDtype, KvLayout, KvShape, KvTensors, Order, PoolMetrics};
use block_table::{BlockTable, TableOptions};
use candle_core::{Device, Result, Tensor};

use crate::{CacheError, Kernel, KvCacheBuilder, Step, cpu, gather, validate};

/// A paged KV cache. Cloning gives another handle to the same one; threads share it freely.
#[derive(Debug, Clone)]
pub struct KvCache {
    pool: BlockPool,
    tensors: KvTensors,
    shape: KvShape,
    kernel: Kernel,
    metrics: Arc<PoolMetrics>,
}

impl KvCache {
    /// A cache of `blocks` blocks of `block_size` tokens each, stored as `dtype` on `device`.
    ///
    /// # Errors
    ///
    /// As [`KvCacheBuilder::build`].
    pub fn new(
        shape: KvShape,
        blocks: usize,
        block_size: usize,
        dtype: KvDtype,
        device: &Device,
    ) -> std::result::Result<Self, CacheError> {
        Self::builder(shape).blocks(blocks).block_size(block_size).dtype(dtype).device(device).build()
    }

    /// A cache with more to choose: its size in bytes, the backend, the kernel.
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

    /// The table of a new sequence. Before it computes its prompt, [`BlockTable::reuse`] gives it what others have
    /// computed of the same.
    pub fn table(&self) -> BlockTable {
        BlockTable::new(&self.pool)
    }

    /// The table of a new sequence with a window, or a salt without which its prefixes are not shared.
    pub fn table_with(&self, options: &TableOptions) -> BlockTable {
        BlockTable::with_options(&self.pool, options)
    }

    /// A new step: one forward pass over any number of sequences.
    pub fn step<'t>(&self) -> Step<'t> {
        Step::new(self)
    }

    /// The blocks: how many there are, how many are free.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Layers, heads and dimensions of the keys and values.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The type in which keys and values are stored.
    pub fn dtype(&self) -> KvDtype {
        self.tensors.dtype()
    }

    /// Where they are stored.
    pub fn device(&self) -> &Device {
        self.tensors.device()
    }

    /// Bytes of one block over all layers.
    pub fn bytes_per_block(&self) -> usize {
        self.tensors.bytes_per_block()
    }

    /// Copies the keys and values of `table`'s committed tokens out of one layer, each `(tokens, kv_heads, head_dim)`, in
    /// the type in which they are stored, or f32 if that is 8-bit: for inspection and for attention of another kind. [`Step::attend`] does not need it. A table with a window gives
    /// what it still holds: the blocks of its sinks, then those of its window.
    ///
    /// # Errors
    ///
    /// When the layer does not exist, the table is of another pool, or the device refuses.
    pub fn keys_and_values(&self, table: &BlockTable, layer: usize) -> Result<(Tensor, Tensor)> {
        let tensor = validate::layer(&self.tensors, layer)?;
        validate::table(&self.pool, table)?;
        let blocks: Vec<u32> = table.blocks().iter().map(|id| id.index() as u32).collect();
        let given_back = table.gap().1 * self.pool.block_size();
        let held = table.len() - given_back;
        match self.layout().order {
            Order::HeadMajor | Order::Int8 => cpu::read(tensor, self.layout(), &blocks, held),
            Order::TokenMajor => gather::gather(tensor, self.layout(), &blocks, held),
        }
    }

    /// The tensor behind one layer, `(blocks, numbers of a block)`, for kernels of your own; `docs/layout.md` says where
    /// each number lies. Reading it needs no care. Who writes to it must hold the blocks.
    ///
    /// # Errors
    ///
    /// When the layer does not exist.
    pub fn tensor(&self, layer: usize) -> Result<&Tensor> {
        validate::layer(&self.tensors, layer)
    }

    pub(crate) fn layout(&self) -> &KvLayout {
        self.tensors.layout()
    }

    pub(crate) fn tensors(&self) -> &KvTensors {
        &self.tensors
    }

    pub(crate) fn record_metrics(&self) {
        self.metrics.record(&self.pool);
    }

    pub(crate) fn kernel(&self) -> Kernel {
        self.kernel
    }
}
