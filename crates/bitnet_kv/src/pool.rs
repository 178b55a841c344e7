//! The memory that many requests' caches share.

use std::sync::Arc;

use candle_core::Device;
use paged_attention::{CacheError, KvCache, KvDtype, KvShape, TableOptions};

use crate::error::Result;
use crate::rows::Taken;
use crate::stats::Counters;
use crate::stores::Stores;
use crate::{CacheOptions, CacheStats, KvError, Overflow, PagedKVCache};

/// Blocks for the keys and values of many requests. Cloning gives another handle to the same ones; threads share it freely.
///
/// ```
/// use bitnet_kv::{KvShape, PagedKVPool};
/// use candle_core::{Device, Tensor};
///
/// let shape = KvShape { layers: 30, kv_heads: 5, head_dim: 128 };
/// let pool = PagedKVPool::builder(shape).blocks(64).build()?;
/// let mut cache = pool.cache(); // one for each request
///
/// let kv = Tensor::zeros((1, 5, 7, 128), candle_core::DType::F32, &Device::Cpu)?; // [B, H_kv, T, D]
/// for layer in cache.layers_mut() {
///     layer.append(&kv, &kv)?;
/// }
/// assert_eq!((cache.seq_len(), pool.blocks_in_use()), (7, 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct PagedKVPool(pub(crate) Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) taken: Taken,
    pub(crate) max_seq_len: usize,
    pub(crate) overflow: Overflow,
    pub(crate) older_than: Option<usize>,
    /// Where new tokens go.
    pub(crate) recent: Stores,
    /// Where tokens go that are older than so many.
    pub(crate) old: Option<Stores>,
    pub(crate) counters: Counters,
}

/// Collects what a [`PagedKVPool`] is made of.
#[derive(Debug, Clone)]
#[must_use]
pub struct PagedKVPoolBuilder {
    shape: KvShape,
    blocks: usize,
    memory_limit: Option<usize>,
    compressed_blocks: Option<usize>,
    block_size: usize,
    max_seq_len: usize,
    dtype: KvDtype,
    device: Device,
    overflow: Overflow,
    older_than: Option<usize>,
    name: String,
}

impl PagedKVPool {
    /// Chooses what the pool is made of. `shape` has the layers, the heads of keys and values, and their dimensions.
    pub fn builder(shape: KvShape) -> PagedKVPoolBuilder {
        PagedKVPoolBuilder {
            shape,
            blocks: 1024,
            memory_limit: None,
            compressed_blocks: None,
            block_size: 16,
            max_seq_len: 4096,
            dtype: KvDtype::F32,
            device: Device::Cpu,
            overflow: Overflow::Error,
            older_than: None,
            name: "bitnet_kv".into(),
        }
    }

    /// The cache of a new request. It takes blocks as it grows, and gives them back when it is dropped.
    pub fn cache(&self) -> PagedKVCache {
        self.cache_with(&CacheOptions::default())
    }

    /// The cache of a new request, for several sequences side by side, or with a salt.
    pub fn cache_with(&self, options: &CacheOptions) -> PagedKVCache {
        PagedKVCache::over(self, options)
    }

    /// How a request's first table is made.
    pub(crate) fn table_options(&self, options: &CacheOptions) -> TableOptions {
        let table = TableOptions::default().salt(options.salt.clone());
        let table = if options.batch == 1 { table } else { table.private() };
        match self.0.overflow.held(self.0.max_seq_len) {
            Some(window) => table.window(window),
            None => table,
        }
    }

    /// Layers, heads and dimensions.
    pub fn shape(&self) -> KvShape {
        self.0.taken.shape
    }

    /// The length that a cache may have, or sees if it is circular.
    pub fn max_seq_len(&self) -> usize {
        self.0.max_seq_len
    }

    /// The length beyond which a cache is refused more tokens; `None` if it goes on as a ring, or grows.
    pub fn length_limit(&self) -> Option<usize> {
        (self.0.overflow == Overflow::Error).then_some(self.0.max_seq_len)
    }

    /// Blocks of new tokens that somebody holds. One that several requests share counts once.
    pub fn blocks_in_use(&self) -> usize {
        self.0.recent.sum(|cache| cache.pool().in_use())
    }

    /// Blocks in 8-bit storage that somebody holds.
    pub fn compressed_blocks_in_use(&self) -> usize {
        self.0.old.as_ref().map_or(0, |old| old.sum(|cache| cache.pool().in_use()))
    }

    /// Blocks of new tokens that a request could get without growth.
    pub fn blocks_available(&self) -> usize {
        self.0.recent.sum(|cache| cache.pool().available())
    }

    /// Forgets all remembered prefixes: after the weights have changed, say.
    pub fn reset_prefix_cache(&self) {
        self.0.recent.all().iter().for_each(|cache| cache.pool().reset_prefix_cache());
    }

    /// What the pool has done, and what it holds.
    pub fn stats(&self) -> CacheStats {
        self.0.stats()
    }
}

impl Inner {
    pub(crate) fn stats(&self) -> CacheStats {
        let counted = self.counters.stats();
        let bytes = |stores: &Stores, blocks: fn(&KvCache) -> usize| {
            stores.sum(|cache| blocks(cache) * cache.bytes_per_block())
        };
        let held = |stores| bytes(stores, |cache| cache.pool().in_use());
        let reserved = |stores| bytes(stores, |cache| cache.pool().blocks());
        let old = self.old.as_ref();
        let bytes_compressed = old.map_or(0, held);
        let recent_bytes_per_block = self.recent.sum(KvCache::bytes_per_block) / self.recent.all().len().max(1);
        let uncompressed = old.map_or(0, |old| old.sum(|cache| cache.pool().in_use() * recent_bytes_per_block));
        let evicted = self.recent.sum(|cache| cache.pool().stats().evictions as usize) as u64;
        CacheStats {
            evictions: counted.evictions + evicted,
            bytes_in_use: held(&self.recent) + bytes_compressed,
            bytes_allocated: reserved(&self.recent) + old.map_or(0, reserved),
            growth_events: self.recent.growths() + old.map_or(0, Stores::growths),
            bytes_compressed,
            bytes_saved: uncompressed.saturating_sub(bytes_compressed),
            ..counted
        }
    }
}

impl PagedKVPoolBuilder {
    /// Blocks for new tokens, all requests together; 1024 unless told.
    pub fn blocks(self, blocks: usize) -> Self {
        Self { blocks, ..self }
    }

    /// No more blocks for new tokens than fit into this many bytes, all layers together.
    pub fn memory_limit(self, bytes: usize) -> Self {
        Self { memory_limit: Some(bytes), ..self }
    }

    /// Tokens per block; 16 unless told.
    pub fn block_size(self, block_size: usize) -> Self {
        Self { block_size, ..self }
    }

    /// How long a cache may become; 4096 tokens unless told.
    pub fn max_seq_len(self, max_seq_len: usize) -> Self {
        Self { max_seq_len, ..self }
    }

    /// How keys and values are stored; as f32 unless told. They are given, and come back, as the same type, or as f32 if that
    /// is 8-bit.
    pub fn dtype(self, dtype: KvDtype) -> Self {
        Self { dtype, ..self }
    }

    /// Where they are stored; on the CPU unless told.
    pub fn device(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// What happens past `max_seq_len`; an error unless told.
    pub fn overflow(self, overflow: Overflow) -> Self {
        Self { overflow, ..self }
    }

    /// Keeps tokens that are older than the last `n` in 8-bit storage, a quarter of the size of f32: whole blocks, moved when
    /// the next pass begins. On a CPU.
    pub fn compress_older_than(self, n: usize) -> Self {
        Self { older_than: Some(n), ..self }
    }

    /// Blocks in 8-bit storage; as many as for new tokens unless told. What finds no room there stays as it is.
    pub fn compressed_blocks(self, blocks: usize) -> Self {
        Self { compressed_blocks: Some(blocks), ..self }
    }

    /// What the pool is called in metrics; `bitnet_kv` unless told.
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// Allocates the pool. On a CPU memory is touched only when tokens come.
    ///
    /// # Errors
    ///
    /// [`KvError`] when a number is 0, the choices do not go together, or the memory cannot be had.
    pub fn build(self) -> Result<PagedKVPool> {
        if self.max_seq_len == 0 {
            return Err(KvError::Zero("max_seq_len"));
        }
        if let Overflow::Circular { sink_tokens } = self.overflow {
            if sink_tokens >= self.max_seq_len {
                let max_seq_len = self.max_seq_len;
                return Err(KvError::Options(format!(
                    "{sink_tokens} sink tokens leave nothing of a ring of {max_seq_len} tokens"
                )));
            }
            if self.older_than.is_some() {
                return Err(KvError::Options("a circular cache gives old tokens back: it has none to compress".into()));
            }
        }
        if self.older_than.is_some() && !self.device.is_cpu() {
            return Err(KvError::Options("8-bit storage is read on CPUs only".into()));
        }
        let blocks = self.block_count()?;
        let grows = self.overflow == Overflow::Grow;
        let builder =
            KvCache::builder(self.shape).block_size(self.block_size).device(&self.device).name(self.name.clone());
        let recent = Stores::new(builder.clone().blocks(blocks).dtype(self.dtype), grows)?;
        let old = builder.dtype(KvDtype::Int8).blocks(self.compressed_blocks.unwrap_or(blocks));
        let old = self.older_than.map(|_| Stores::new(old.name(format!("{} old", self.name)), grows)).transpose()?;
        Ok(PagedKVPool(Arc::new(Inner {
            taken: Taken::new(self.shape, self.dtype, &self.device),
            max_seq_len: self.max_seq_len,
            overflow: self.overflow,
            older_than: self.older_than,
            recent,
            old,
            counters: Counters::default(),
        })))
    }

    fn block_count(&self) -> Result<usize> {
        let Some(bytes) = self.memory_limit else { return Ok(self.blocks) };
        let bytes_per_block = self.shape.bytes_per_block(self.block_size, self.dtype).unwrap_or(usize::MAX);
        match bytes.checked_div(bytes_per_block) {
            Some(0) => Err(CacheError::TooLittleMemory { bytes, bytes_per_block }.into()),
            fitting => Ok(fitting.map_or(self.blocks, |fitting| fitting.min(self.blocks))),
        }
    }
}
