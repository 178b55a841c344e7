//! The builder of a cache.

use std::sync::atomic::{AtomicU64, Ordering};

use block_pool::{BlockPool, BlockStorage, KvDtype, KvShape, KvTensors, Order, PoolGroup, PoolMetrics};
use candle_core::Device;

use crate::cache::CacheLayers;
use crate::{CacheError, Kernel, KvCache, LayerGroup, cpu};

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
    groups: Vec<LayerGroup>,
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
    pub(crate) fn new(groups: Vec<LayerGroup>) -> Self {
        Self {
            groups,
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

    /// Sets the number of blocks: 1024 by default. If there are several groups of layers, they get memory for as many
    /// blocks of each, which they share.
    pub fn blocks(self, blocks: usize) -> Self {
        Self { size: Size::Blocks(blocks), ..self }
    }

    /// Sets the number of blocks to as many as fit into `bytes`, over all layers together. If there are several groups
    /// of layers, they share this memory: at any time it can be used for blocks of any of them.
    pub fn memory(self, bytes: usize) -> Self {
        Self { size: Size::Bytes(bytes), ..self }
    }

    /// Sets the number of tokens per block: 16 by default.
    pub fn block_size(self, block_size: usize) -> Self {
        Self { block_size, ..self }
    }

    /// Sets the type in which keys and values are stored: f32 by default. A group of layers can have another one.
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
        if self.groups.is_empty() {
            return Err(CacheError::NoGroups);
        }
        let empty = self.groups.iter().position(|group| group.layers().is_empty());
        if let Some(group) = empty.filter(|_| self.groups.len() > 1) {
            return Err(CacheError::EmptyGroup { group });
        }
        let places = places(&self.groups)?;
        if self.groups.len() > 1 && !self.device.is_cpu() {
            return Err(CacheError::GroupsNeedCpu);
        }
        for group in &self.groups {
            cpu::check_dims(self.dtype_of(group), group.shape().head_dim)?;
        }
        let (bytes_per_unit, units) = self.units();
        let budget = self.budget(&units)?;
        let mut groups = Vec::new();
        for (group, units) in self.groups.iter().zip(&units) {
            let dtype = self.dtype_of(group);
            let order = if fused { Order::of_panels(dtype) } else { Order::Nhd };
            let tensors = KvTensors::zeros(group.shape(), budget / units, self.block_size, order, dtype, &self.device)?;
            if self.groups.len() > 1 {
                tensors.release_all();
            }
            groups.push((group.clone(), tensors.poisoned(self.poison)));
        }
        let storages = groups.iter().zip(&units).map(|((group, tensors), &units)| {
            (PoolGroup::new(units).span(group.span()), Box::new(tensors.clone()) as Box<dyn BlockStorage>)
        });
        let pool = BlockPool::with_groups(budget, self.block_size, storages)?;
        let metrics = PoolMetrics::new(&self.name.unwrap_or_else(next_name), groups.len());
        let layers = CacheLayers { groups, places, bytes_per_unit };
        Ok(KvCache::from_parts(pool, layers, self.kernel, metrics))
    }

    fn dtype_of(&self, group: &LayerGroup) -> KvDtype {
        group.own_dtype().unwrap_or(self.dtype)
    }

    /// The size of a unit in bytes, and how many units a block of each group takes. In a cache with one group, a unit
    /// is a block.
    fn units(&self) -> (usize, Vec<usize>) {
        let bytes = |group: &LayerGroup| {
            let bytes = group.shape().bytes_per_block(self.block_size, self.dtype_of(group));
            // A shape with a zero, or one that is too large, is refused when its tensors are made.
            bytes.unwrap_or(usize::MAX).max(1)
        };
        let bytes: Vec<usize> = self.groups.iter().map(bytes).collect();
        let unit = bytes.iter().copied().reduce(greatest_common_divisor).unwrap_or(1);
        (unit, bytes.into_iter().map(|bytes| bytes / unit).collect())
    }

    /// How many blocks [`build`](Self::build) allocates; with several groups of layers, how many units.
    ///
    /// # Errors
    ///
    /// [`CacheError::TooLittleMemory`] if the given memory does not hold one block of each group.
    pub fn block_count(&self) -> Result<usize, CacheError> {
        self.budget(&self.units().1)
    }

    fn budget(&self, units: &[usize]) -> Result<usize, CacheError> {
        let one_of_each = units.iter().copied().fold(0, usize::saturating_add);
        let bytes = match self.size {
            Size::Blocks(blocks) => return Ok(blocks.saturating_mul(one_of_each)),
            Size::Bytes(bytes) => bytes,
        };
        let (bytes_per_unit, _) = self.units();
        let bytes_per_block = bytes_per_unit.saturating_mul(one_of_each);
        let is_empty = |group: &LayerGroup| {
            let KvShape { kv_heads, head_dim, value_dim, .. } = group.shape();
            [kv_heads, head_dim, value_dim].contains(&0)
        };
        if self.groups.iter().any(|group| is_empty(group) || group.layers().is_empty()) {
            // The tensors report which number is zero.
            return Ok(one_of_each);
        }
        if bytes < bytes_per_block {
            return Err(CacheError::TooLittleMemory { bytes, bytes_per_block });
        }
        Ok(bytes / bytes_per_unit)
    }
}

/// For each layer, its group and its index there.
fn places(groups: &[LayerGroup]) -> Result<Vec<(usize, usize)>, CacheError> {
    let count = groups.iter().map(|group| group.layers().len()).sum();
    let mut places = vec![None; count];
    for (group, of) in groups.iter().enumerate() {
        for (index, &layer) in of.layers().iter().enumerate() {
            match places.get_mut(layer) {
                Some(place @ None) => *place = Some((group, index)),
                Some(_) => return Err(CacheError::Layers { layer, problem: "is there twice" }),
                None => return Err(CacheError::Layers { layer, problem: "leaves out layers before it" }),
            }
        }
    }
    // As many layers as places, each in a place of its own.
    Ok(places.into_iter().flatten().collect())
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// The name of the next cache that was built without one.
fn next_name() -> String {
    static UNNAMED: AtomicU64 = AtomicU64::new(0);
    match UNNAMED.fetch_add(1, Ordering::Relaxed) {
        0 => "kv".into(),
        before => format!("kv-{}", before + 1),
    }
}
