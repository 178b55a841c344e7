//! The builder of a cache.

use std::sync::atomic::{AtomicU64, Ordering};

use block_pool::{BlockPool, KvDtype, KvShape, KvTensors, Order, PoolMetrics};
use candle_core::Device;

use crate::{CacheError, Kernel, KvCache, cpu};

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Backend {
    /// [`Fused`](Self::Fused) on a CPU, [`Gather`](Self::Gather) on any other device.
    #[default]
    Auto,
    /// Plain tensor operations: the blocks of a sequence are copied into one contiguous tensor, which is then
    /// multiplied. It should run on every device that candle supports; it has been run on CPUs only, never on a GPU
    /// (CUDA, Metal).
    Gather,
    /// Kernels that read the blocks in place. On a CPU only.
    Fused,
}

#[derive(Debug, Clone, Copy)]
enum Size {
    Blocks(usize),
    Bytes(usize),
}

/// Builds a [`KvCache`]; see [`KvCache::builder`].
#[derive(Debug, Clone)]
#[must_use]
pub struct KvCacheBuilder {
    shape: KvShape,
    size: Size,
    block_size: usize,
    dtype: KvDtype,
    device: Device,
    backend: Backend,
    kernel: Kernel,
    poison: bool,
    name: Option<String>,
}

impl KvCacheBuilder {
    pub(crate) fn new(shape: KvShape) -> Self {
        Self {
            shape,
            size: Size::Blocks(1024),
            block_size: 16,
            dtype: KvDtype::F32,
            device: Device::Cpu,
            backend: Backend::Auto,
            kernel: Kernel::best(),
            poison: cfg!(debug_assertions),
            name: None,
        }
    }

    /// Sets the number of blocks: 1024 by default.
    pub fn blocks(self, blocks: usize) -> Self {
        Self { size: Size::Blocks(blocks), ..self }
    }

    /// Sets the number of blocks to as many as fit into `bytes`, over all layers together.
    pub fn memory(self, bytes: usize) -> Self {
        Self { size: Size::Bytes(bytes), ..self }
    }

    /// Sets the number of tokens per block: 16 by default.
    pub fn block_size(self, block_size: usize) -> Self {
        Self { block_size, ..self }
    }

    /// Sets the type in which keys and values are stored: f32 by default.
    pub fn dtype(self, dtype: KvDtype) -> Self {
        Self { dtype, ..self }
    }

    /// Sets the device that holds the blocks: the CPU by default. Other devices have never been tried
    /// (see [`Backend::Gather`]).
    pub fn device(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// Sets how attention is computed: [`Backend::Auto`] by default.
    pub fn backend(self, backend: Backend) -> Self {
        Self { backend, ..self }
    }

    /// Sets the kernel of the fused backend: the fastest one that this machine can run by default.
    pub fn kernel(self, kernel: Kernel) -> Self {
        Self { kernel, ..self }
    }

    /// Sets whether blocks are filled with NaN when they become free, so that a read of a slot that was not written
    /// shows at once. By default on in debug builds, off in others.
    pub fn poison(self, poison: bool) -> Self {
        Self { poison, ..self }
    }

    /// Sets the name of the cache in metrics, the label `cache`. Two caches of the same name overwrite each other's
    /// numbers.
    ///
    /// By default the first cache that the process builds without a name is `kv`, and the next ones are `kv-2`, `kv-3`
    /// and so on. A number is never used again, so that no counter decreases.
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Allocates the pool.
    ///
    /// # Errors
    ///
    /// [`CacheError`] when a number is zero or too large, the memory cannot be allocated, the backend or the kernel
    /// cannot run on this machine or device, or 8-bit storage is requested without the fused backend.
    pub fn build(self) -> Result<KvCache, CacheError> {
        let fused = match self.backend {
            Backend::Auto => self.device.is_cpu(),
            Backend::Gather => false,
            Backend::Fused if self.device.is_cpu() => true,
            Backend::Fused => return Err(CacheError::FusedNeedsCpu),
        };
        if !self.kernel.is_available() {
            return Err(CacheError::KernelUnavailable(self.kernel.name()));
        }
        let head_dim = self.shape.head_dim;
        if self.dtype == KvDtype::Int8 && head_dim > cpu::MOST_INT8_DIMS {
            return Err(CacheError::TooManyDimensions { head_dim, most: cpu::MOST_INT8_DIMS });
        }
        let blocks = self.block_count()?;
        let order = if fused { Order::of_panels(self.dtype) } else { Order::Nhd };
        let tensors = KvTensors::zeros(self.shape, blocks, self.block_size, order, self.dtype, &self.device)?
            .poisoned(self.poison);
        let pool = BlockPool::with_storage(blocks, self.block_size, tensors.clone())?;
        let metrics = PoolMetrics::new(&self.name.unwrap_or_else(next_name));
        Ok(KvCache::from_parts(pool, tensors, self.shape, self.kernel, metrics))
    }

    /// How many blocks [`build`](Self::build) allocates.
    ///
    /// # Errors
    ///
    /// [`CacheError::TooLittleMemory`] if the given memory does not hold one block.
    pub fn block_count(&self) -> Result<usize, CacheError> {
        let bytes = match self.size {
            Size::Blocks(blocks) => return Ok(blocks),
            Size::Bytes(bytes) => bytes,
        };
        let bytes_per_block = self.shape.bytes_per_block(self.block_size, self.dtype).unwrap_or(usize::MAX);
        match bytes.checked_div(bytes_per_block) {
            // The shape has a zero: the pool reports which one.
            None => Ok(1),
            Some(0) => Err(CacheError::TooLittleMemory { bytes, bytes_per_block }),
            Some(blocks) => Ok(blocks),
        }
    }
}

/// The name of the next cache that was built without one.
fn next_name() -> String {
    static UNNAMED: AtomicU64 = AtomicU64::new(0);
    match UNNAMED.fetch_add(1, Ordering::Relaxed) {
        0 => "kv".into(),
        before => format!("kv-{}", before + 1),
    }
}
