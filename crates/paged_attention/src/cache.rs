//! The cache: a pool, the tensors behind it, and a way to attend over them.

use block_pool::{BlockPool, KvLayout, KvShape, KvTensors};
use block_table::BlockTable;
use candle_core::{DType, Device, Result, Tensor};

use crate::{CacheError, Kernel, KvCacheBuilder, Step, gather, validate};

/// A paged KV cache. Cloning gives another handle to the same one; threads share it freely.
#[derive(Debug, Clone)]
pub struct KvCache {
    pool: BlockPool,
    tensors: KvTensors,
    shape: KvShape,
    kernel: Kernel,
}

impl KvCache {
    /// A cache of `blocks` blocks of `block_size` tokens each, stored as `dtype` (f32, f16 or bf16) on `device`.
    ///
    /// # Errors
    ///
    /// As [`KvCacheBuilder::build`].
    pub fn new(
        shape: KvShape,
        blocks: usize,
        block_size: usize,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, CacheError> {
        Self::builder(shape).blocks(blocks).block_size(block_size).dtype(dtype).device(device).build()
    }

    /// A cache with more to choose: its size in bytes, the backend, the kernel.
    pub fn builder(shape: KvShape) -> KvCacheBuilder {
        KvCacheBuilder::new(shape)
    }

    pub(crate) fn from_parts(pool: BlockPool, tensors: KvTensors, shape: KvShape, kernel: Kernel) -> Self {
        Self { pool, tensors, shape, kernel }
    }

    /// The table of a new sequence.
    pub fn table(&self) -> BlockTable {
        BlockTable::new(&self.pool)
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
    pub fn dtype(&self) -> DType {
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

    /// Copies the keys and values of `table`'s committed tokens out of one layer, each `(tokens, kv_heads, head_dim)`:
    /// for inspection and for attention of another kind. [`Step::attend`] does not need it.
    ///
    /// # Errors
    ///
    /// When the layer does not exist, the table is of another pool, or the device refuses.
    pub fn keys_and_values(&self, table: &BlockTable, layer: usize) -> Result<(Tensor, Tensor)> {
        let tensor = validate::layer(&self.tensors, layer)?;
        validate::table(&self.pool, table)?;
        let blocks: Vec<u32> = table.blocks().iter().map(|id| id.index() as u32).collect();
        gather::gather(tensor, self.layout(), &blocks, table.len())
    }

    pub(crate) fn layout(&self) -> &KvLayout {
        self.tensors.layout()
    }

    pub(crate) fn tensors(&self) -> &KvTensors {
        &self.tensors
    }

    pub(crate) fn kernel(&self) -> Kernel {
        self.kernel
    }
}
