//! The device tensors that hold the blocks: one per layer.
//!
//! There is one per layer and not one for all, because candle keeps a lock per storage: a thread that writes one layer
//! must not wait for a thread that reads another.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Storage, Tensor};

use crate::pages::{Number, release};
use crate::pool::check_size;
use crate::{BlockId, BlockStorage, KvDtype, KvLayout, KvShape, Order, PoolError, StorageError};

/// Bytes in a page of memory on most machines. The first block begins at a page boundary: then no register load crosses
/// a cache line, and a kernel that prefetches page by page requests the pages from their start.
const PAGE: usize = 4096;

/// The keys and values of all blocks: per layer one tensor `(blocks, elements of a block)`. A clone shares the tensors.
/// They have been used on CPUs only, never on a GPU (CUDA, Metal).
#[derive(Debug, Clone)]
pub struct KvTensors {
    layers: Arc<[Tensor]>,
    layout: KvLayout,
    dtype: KvDtype,
    poison: bool,
}

impl KvTensors {
    /// Allocates zeroed tensors for `blocks` blocks of `block_size` tokens, whose numbers lie in `order`.
    ///
    /// # Errors
    ///
    /// [`PoolError`] when a number is zero or too large, when `dtype` cannot be stored in `order`, or when the memory
    /// cannot be allocated.
    pub fn zeros(
        shape: KvShape,
        blocks: usize,
        block_size: usize,
        order: Order,
        dtype: KvDtype,
        device: &Device,
    ) -> std::result::Result<Self, PoolError> {
        shape.check()?;
        check_size(blocks, block_size)?;
        if (order == Order::QuadPanels) != (dtype == KvDtype::Int8) {
            return Err(PoolError::UnsupportedDType(format!("{dtype} in the order {order:?}")));
        }
        let bytes_per_block = shape.bytes_per_block(block_size, dtype);
        let too_large = PoolError::OutOfMemory { blocks, bytes_per_block: bytes_per_block.unwrap_or(usize::MAX) };
        let Some(bytes) = bytes_per_block.and_then(|bytes| bytes.checked_mul(blocks)) else {
            return Err(too_large);
        };
        // An allocation that fails inside candle aborts the process; this attempt turns it into an error.
        if device.is_cpu() && Vec::<u8>::new().try_reserve_exact(bytes).is_err() {
            return Err(too_large);
        }
        let layout = KvLayout::new(&shape, block_size, order);
        let layers = (0..shape.layers)
            .map(|_| aligned_zeros(blocks, layout.block_elements(), dtype.tensor_dtype(), device))
            .collect::<Result<_>>()
            .map_err(|error| PoolError::Device(error.to_string()))?;
        Ok(Self { layers, layout, dtype, poison: false })
    }

    /// Whether blocks are filled with NaN when they become free, so that a read of a slot that is not the reader's own
    /// shows at once. Takes effect in pools that are made with these tensors from now on.
    #[must_use]
    pub fn poisoned(self, poison: bool) -> Self {
        Self { poison, ..self }
    }

    /// Gives the memory of all blocks back to the system, as far as that is possible on a CPU: where the allocator has
    /// reused memory for a new tensor, it is there already. No block may be in use.
    pub fn release_all(&self) {
        self.release_runs(std::iter::once(0..self.layers[0].dims()[0]).collect());
    }

    fn release_runs(&self, runs: Vec<Range<usize>>) {
        // Other devices reserve no addresses without memory.
        if !self.device().is_cpu() {
            return;
        }
        let release = ReleaseBlocks { runs, elements: self.layout.block_elements() };
        for layer in self.layers.iter() {
            if let Err(error) = layer.inplace_op1(&OnCpu(&release)) {
                tracing::warn!(%error, "the memory of free blocks could not be given back");
            }
        }
    }

    /// The tensor of one layer, `(blocks, elements of a block)`, contiguous.
    pub fn layer(&self, layer: usize) -> Option<&Tensor> {
        self.layers.get(layer)
    }

    /// The keys and the values of one layer whose blocks are in the order [`Nhd`](Order::Nhd), as views: `(blocks,
    /// block_size, kv_heads, head_dim)` and `(blocks, block_size, kv_heads, value_dim)`, for kernels of others. The
    /// last dimension is contiguous; the strides have the rest.
    ///
    /// # Errors
    ///
    /// When the layer does not exist, or its blocks are in another order.
    pub fn nhd_views(&self, layer: usize) -> Result<(Tensor, Tensor)> {
        let KvLayout { block_size, kv_heads, head_dim, value_dim, values_in_keys, order } = self.layout;
        let Some(tensor) = self.layer(layer).filter(|_| order == Order::Nhd) else {
            candle_core::bail!("layer {layer} of {} has no views as NHD: its blocks are {order:?}", self.layers());
        };
        let blocks = tensor.dim(0)?;
        if self.layout.planes() == 2 {
            let planes = tensor.reshape((blocks, 2, block_size, kv_heads, head_dim))?;
            return Ok((planes.narrow(1, 0, 1)?.squeeze(1)?, planes.narrow(1, 1, 1)?.squeeze(1)?));
        }
        let tokens = tensor.reshape((blocks, block_size, kv_heads, ()))?;
        let first = if values_in_keys { 0 } else { head_dim };
        Ok((tokens.narrow(3, 0, head_dim)?, tokens.narrow(3, first, value_dim)?))
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Where the numbers of a block lie.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The type in which keys and values are stored.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// The device of the tensors.
    pub fn device(&self) -> &Device {
        self.layers[0].device()
    }

    /// Bytes of one block over all layers.
    pub fn bytes_per_block(&self) -> usize {
        self.layers() * self.layout.block_elements() * self.dtype.size_in_bytes()
    }
}

impl BlockStorage for KvTensors {
    fn copy(&self, from: BlockId, to: BlockId) -> std::result::Result<(), StorageError> {
        let copy = CopyBlock { from: from.index(), to: to.index(), elements: self.layout.block_elements() };
        for layer in self.layers.iter() {
            copy.apply(layer).map_err(StorageError::new)?;
        }
        Ok(())
    }

    fn read(&self, id: BlockId, bytes: &mut Vec<u8>) -> std::result::Result<(), StorageError> {
        bytes.reserve(self.bytes_per_block());
        let read = |layer: &Tensor, bytes: &mut Vec<u8>| layer.narrow(0, id.index(), 1)?.write_bytes(bytes);
        self.layers.iter().try_for_each(|layer| read(layer, bytes)).map_err(StorageError::new)
    }

    fn write(&self, id: BlockId, bytes: &[u8]) -> std::result::Result<(), StorageError> {
        if bytes.len() != self.bytes_per_block() {
            let (got, expected) = (bytes.len(), self.bytes_per_block());
            return Err(StorageError::new(format!("a block has {expected} bytes, got {got}")));
        }
        let elements = self.layout.block_elements();
        let chunks = bytes.chunks_exact(elements * self.dtype.size_in_bytes());
        let write = |layer: &Tensor, bytes: &[u8]| {
            let row = Tensor::from_raw_buffer(bytes, layer.dtype(), &[1, elements], layer.device())?;
            layer.slice_set(&row, 0, id.index())
        };
        self.layers.iter().zip(chunks).try_for_each(|(layer, bytes)| write(layer, bytes)).map_err(StorageError::new)
    }

    fn bytes_per_block(&self) -> usize {
        KvTensors::bytes_per_block(self)
    }

    fn release(&self, ids: &[BlockId]) {
        // Poison must stay where it is.
        if self.poison {
            return;
        }
        let mut indices: Vec<usize> = ids.iter().map(|id| id.index()).collect();
        indices.sort_unstable();
        self.release_runs(indices.chunk_by(|a, b| a + 1 == *b).map(|run| run[0]..run[0] + run.len()).collect());
    }

    fn poisons(&self) -> bool {
        self.poison
    }

    fn poison(&self, ids: &[BlockId]) -> std::result::Result<(), StorageError> {
        let elements = (1, self.layout.block_elements());
        let fill = |layer: &Tensor| {
            let nan = match self.dtype {
                // With all bits set, a scale is NaN.
                KvDtype::Int8 => Tensor::full(u8::MAX, elements, layer.device())?,
                _ => Tensor::full(f32::NAN, elements, layer.device())?.to_dtype(layer.dtype())?,
            };
            ids.iter().try_for_each(|id| layer.slice_set(&nan, 0, id.index()))
        };
        self.layers.iter().try_for_each(fill).map_err(StorageError::new)
    }
}

/// Makes zeros `(blocks, elements)` that begin at a page boundary, on a CPU. Allocators guarantee an alignment of only
/// a few bytes, so the allocation is up to a page longer and the tensor begins inside it.
fn aligned_zeros(blocks: usize, elements: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    if !device.is_cpu() {
        return Tensor::zeros((blocks, elements), dtype, device);
    }
    let page = PAGE / dtype.size_in_bytes();
    let longer = Tensor::zeros(blocks * elements + page - 1, dtype, device)?;
    let past = address(&longer) % PAGE / dtype.size_in_bytes();
    longer.narrow(0, (page - past) % page, blocks * elements)?.reshape((blocks, elements))
}

/// The address of a tensor's storage in host memory; 0 if it is not there.
fn address(tensor: &Tensor) -> usize {
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F32(data)) => data.as_ptr().addr(),
        Storage::Cpu(CpuStorage::F16(data)) => data.as_ptr().addr(),
        Storage::Cpu(CpuStorage::BF16(data)) => data.as_ptr().addr(),
        Storage::Cpu(CpuStorage::U8(data)) => data.as_ptr().addr(),
        _ => 0,
    }
}

/// Copies a row of a tensor to another row of the same tensor.
///
/// candle refuses an in-place operation whose source is a view of its destination. So on a CPU the operation has the
/// numbers of both rows; on other devices the row is copied through a temporary tensor, which has never been run on a
/// GPU (CUDA, Metal).
struct CopyBlock {
    from: usize,
    to: usize,
    elements: usize,
}

impl CopyBlock {
    fn apply(&self, layer: &Tensor) -> Result<()> {
        if layer.device().is_cpu() {
            return layer.inplace_op1(&OnCpu(self));
        }
        let row = layer.narrow(0, self.from, 1)?.copy()?;
        layer.slice_set(&row, 0, self.to)
    }
}

impl ChangeRows for CopyBlock {
    fn change<T: Number>(&self, data: &mut [T], start: usize) {
        let from = start + self.from * self.elements;
        data.copy_within(from..from + self.elements, start + self.to * self.elements);
    }
}

/// Gives the memory of rows of a tensor back to the system.
struct ReleaseBlocks {
    runs: Vec<Range<usize>>,
    elements: usize,
}

impl ChangeRows for ReleaseBlocks {
    fn change<T: Number>(&self, data: &mut [T], start: usize) {
        for run in &self.runs {
            release(data, start + run.start * self.elements..start + run.end * self.elements);
        }
    }
}

/// A change of a tensor's rows in place, whatever its numbers are. Row 0 begins at index `start` of the data.
trait ChangeRows {
    fn change<T: Number>(&self, data: &mut [T], start: usize);
}

struct OnCpu<'a, C>(&'a C);

impl<C: ChangeRows> InplaceOp1 for OnCpu<'_, C> {
    fn name(&self) -> &'static str {
        "change-rows"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let start = layout.start_offset();
        match storage {
            CpuStorage::F32(data) => self.0.change(data, start),
            CpuStorage::F16(data) => self.0.change(data, start),
            CpuStorage::BF16(data) => self.0.change(data, start),
            CpuStorage::U8(data) => self.0.change(data, start),
            _ => candle_core::bail!("blocks of this dtype cannot be changed in place"),
        }
        Ok(())
    }
}
