//! How a cache is made.

use std::sync::atomic::{AtomicU64, Ordering};

use block_pool::{BlockPool, KvDtype, KvShape, KvTensors, PoolMetrics};
use candle_core::Device;

use crate::{CacheError, Kernel, KvCache, cpu};

/// Which way attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// Fused on a CPU, gather elsewhere.
    #[default]
    Auto,
    /// Plain tensor operations: copies the blocks of a sequence together, then multiplies. Runs on every device that
    /// candle has.
    Gather,
    /// Reads the blocks where they lie, on a CPU.
    Fused,
}

#[derive(Debug, Clone, Copy)]
enum Size {
    Blocks(usize),
    Bytes(usize),
}

/// Collects what a [`KvCache`] is made of; see [`KvCache::builder`].
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

    /// The number of blocks; 1024 unless told.
    pub fn blocks(self, blocks: usize) -> Self {
        Self { size: Size::Blocks(blocks), ..self }
    }

    /// As many blocks as fit into this many bytes, all layers together.
    pub fn memory(self, bytes: usize) -> Self {
        Self { size: Size::Bytes(bytes), ..self }
    }

    /// Tokens per block; 16 unless told.
    pub fn block_size(self, block_size: usize) -> Self {
        Self { block_size, ..self }
    }

    /// How the numbers of keys and values are stored; as f32 unless told.
    pub fn dtype(self, dtype: KvDtype) -> Self {
        Self { dtype, ..self }
    }

    /// Where the blocks lie; the CPU unless told.
    pub fn device(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// Which way attention is computed.
    pub fn backend(self, backend: Backend) -> Self {
        Self { backend, ..self }
    }

    /// The kernel of the fused backend; the fastest this machine can run unless told.
    pub fn kernel(self, kernel: Kernel) -> Self {
        Self { kernel, ..self }
    }

    /// Whether blocks are filled with NaN when they become free, so that whoever reads a slot that is not theirs sees it
    /// at once; on in debug builds unless told.
    pub fn poison(self, poison: bool) -> Self {
        Self { poison, ..self }
    }

    /// What the cache is called in metrics, as the label `cache`. Two caches of one name overwrite each other's
    /// numbers.
    ///
    /// Unless told, the first cache that the process builds without a name is `kv`, the next ones are `kv-2`,
    /// `kv-3`...; a number is not given twice, so that no counter goes back.
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Allocates the pool.
    ///
    /// # Errors
    ///
    /// [`CacheError`] when a number is zero or too large, the memory cannot be had, or the backend or kernel cannot run
    /// here; so cannot 8-bit storage without the fused backend.
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
        let tensors = KvTensors::zeros(self.shape, blocks, self.block_size, fused, self.dtype, &self.device)?
            .poisoned(self.poison);
        let pool = BlockPool::with_storage(blocks, self.block_size, tensors.clone())?;
        let metrics = PoolMetrics::new(&self.name.unwrap_or_else(next_name));
        Ok(KvCache::from_parts(pool, tensors, self.shape, self.kernel, metrics))
    }

    fn block_count(&self) -> Result<usize, CacheError> {
        let bytes = match self.size {
            Size::Blocks(blocks) => return Ok(blocks),
            Size::Bytes(bytes) => bytes,
        };
        let bytes_per_block = self.shape.bytes_per_block(self.block_size, self.dtype).unwrap_or(usize::MAX);
        match bytes.checked_div(bytes_per_block) {
            // A zero somewhere in the shape: the pool says which.
            None => Ok(1),
            Some(0) => Err(CacheError::TooLittleMemory { bytes, bytes_per_block }),
            Some(blocks) => Ok(blocks),
        }
    }
}

/// The name of the next cache that has none.
fn next_name() -> String {
    static UNNAMED: AtomicU64 = AtomicU64::new(0);
    match UNNAMED.fetch_add(1, Ordering::Relaxed) {
        0 => "kv".into(),
        before => format!("kv-{}", before + 1),
    }
}
