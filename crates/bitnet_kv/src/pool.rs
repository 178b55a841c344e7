//! The pool that the caches of many requests share.

use std::sync::{Arc, OnceLock};

use candle_core::Device;
use paged_attention::{KvCache, KvDtype, KvShape, TableOptions};

use crate::below::Below;
use crate::error::Result;
use crate::rows::Taken;
use crate::stats::Counters;
use crate::stores::Stores;
use crate::{CacheOptions, CacheStats, KvError, Overflow, PagedKVCache};

/// A pool of blocks for the keys and values of many requests. A clone is another handle to the same pool, and threads
/// can share it.
///
/// ```
/// use bitnet_kv::{KvShape, PagedKVPool};
/// use candle_core::{Device, Tensor};
///
/// let shape = KvShape::new(30, 5, 128);
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
    /// The storage of new tokens.
    pub(crate) recent: Stores,
    /// The 8-bit storage of tokens that are older than the last `older_than` tokens.
    pub(crate) old: Option<Stores>,
    pub(crate) counters: Counters,
    /// The tier below the storage of new tokens.
    pub(crate) below: OnceLock<Below>,
}

/// Builds a [`PagedKVPool`].
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
    /// A builder for a pool. `shape` is the number of layers, of heads of keys and values, and of dimensions per head.
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

    /// A cache for a new request. It allocates blocks as it grows, and frees them when it is dropped.
    pub fn cache(&self) -> PagedKVCache {
        self.cache_with(&CacheOptions::default())
    }

    /// A cache for a new request with these options: several sequences, or a salt.
    pub fn cache_with(&self, options: &CacheOptions) -> PagedKVCache {
        PagedKVCache::over(self, options)
    }

    /// The options of a request's first table.
    pub(crate) fn table_options(&self, options: &CacheOptions) -> TableOptions {
        let table = TableOptions::default().salt(options.salt.clone());
        let table = if options.batch == 1 { table } else { table.private() };
        match self.0.overflow.kept_window(self.0.max_seq_len) {
            Some(window) => table.window(window),
            None => table,
        }
    }

    /// The number of layers, of heads of keys and values, and of dimensions per head.
    pub fn shape(&self) -> KvShape {
        self.0.taken.shape
    }

    /// The longest length that a cache may have; in a circular cache, how many tokens a token sees.
    pub fn max_seq_len(&self) -> usize {
        self.0.max_seq_len
    }

    /// The length past which a cache returns [`KvError::Overflow`]; `None` if caches are circular or grow.
    pub fn length_limit(&self) -> Option<usize> {
        (self.0.overflow == Overflow::Error).then_some(self.0.max_seq_len)
    }

    /// How many blocks are in use in the storage of new tokens. A block that several requests share counts once.
    pub fn blocks_in_use(&self) -> usize {
        self.0.recent.sum(|cache| cache.pool().in_use())
    }

    /// How many blocks are in use in 8-bit storage.
    pub fn compressed_blocks_in_use(&self) -> usize {
        self.0.old.as_ref().map_or(0, |old| old.sum(|cache| cache.pool().in_use()))
    }

    /// How many blocks for new tokens can be allocated without growth.
    pub fn blocks_available(&self) -> usize {
        self.0.recent.sum(|cache| cache.pool().available())
    }

    /// Uncaches all prefixes, for example after the weights have changed. Blocks in use stay in use.
    pub fn reset_prefix_cache(&self) {
        self.0.recent.all().iter().for_each(|cache| cache.pool().reset_prefix_cache());
    }

    /// Statistics of the pool and of all its caches.
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
        let in_use = |stores| bytes(stores, |cache| cache.pool().in_use());
        let allocated = |stores| bytes(stores, |cache| cache.pool().blocks());
        let old = self.old.as_ref();
        let bytes_compressed = old.map_or(0, in_use);
        let recent_bytes_per_block = self.recent.sum(KvCache::bytes_per_block) / self.recent.all().len().max(1);
        let uncompressed = old.map_or(0, |old| old.sum(|cache| cache.pool().in_use() * recent_bytes_per_block));
        let evicted = self.recent.sum(|cache| cache.pool().stats().evictions as usize) as u64;
        CacheStats {
            evictions: counted.evictions + evicted,
            bytes_in_use: in_use(&self.recent) + bytes_compressed,
            bytes_allocated: allocated(&self.recent) + old.map_or(0, allocated),
            growth_events: self.recent.growths() + old.map_or(0, Stores::growths),
            bytes_compressed,
            bytes_saved: uncompressed.saturating_sub(bytes_compressed),
            ..counted
        }
    }
}

impl PagedKVPoolBuilder {
    /// Sets the number of blocks for new tokens, all requests together: 1024 by default.
    pub fn blocks(self, blocks: usize) -> Self {
        Self { blocks, ..self }
    }

    /// Limits the blocks for new tokens to those that fit into this many bytes, all layers together.
    pub fn memory_limit(self, bytes: usize) -> Self {
        Self { memory_limit: Some(bytes), ..self }
    }

    /// Sets the number of tokens per block: 16 by default.
    pub fn block_size(self, block_size: usize) -> Self {
        Self { block_size, ..self }
    }

    /// Sets the longest length of a cache, in tokens: 4096 by default.
    pub fn max_seq_len(self, max_seq_len: usize) -> Self {
        Self { max_seq_len, ..self }
    }

    /// Sets the type in which keys and values are stored: f32 by default. Callers pass and get tensors of the same
    /// type; for 8-bit types, of f32.
    pub fn dtype(self, dtype: KvDtype) -> Self {
        Self { dtype, ..self }
    }

    /// Sets the device of the pool: the CPU by default.
    pub fn device(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// Sets what happens past `max_seq_len`: an error by default.
    pub fn overflow(self, overflow: Overflow) -> Self {
        Self { overflow, ..self }
    }

    /// Keeps tokens that are older than the last `n` tokens in 8-bit storage, a quarter of the size of f32. Whole
    /// blocks are moved, when the next pass begins. Only on a CPU.
    pub fn compress_older_than(self, n: usize) -> Self {
        Self { older_than: Some(n), ..self }
    }

    /// Sets the number of blocks in 8-bit storage: by default that of the blocks for new tokens. Tokens that 8-bit
    /// storage has no room for stay where they are.
    pub fn compressed_blocks(self, blocks: usize) -> Self {
        Self { compressed_blocks: Some(blocks), ..self }
    }

    /// Sets the name of the pool in metrics: `bitnet_kv` by default.
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// Allocates the pool. On a CPU, memory is touched only when tokens are written to it.
    ///
    /// # Errors
    ///
    /// [`KvError`] when a number is 0, some options exclude each other, or the memory cannot be allocated.
    pub fn build(self) -> Result<PagedKVPool> {
        if self.max_seq_len == 0 {
            return Err(KvError::Zero("max_seq_len"));
        }
        let KvShape { head_dim, value_dim, values_in_keys, .. } = self.shape;
        if values_in_keys || value_dim != head_dim {
            return Err(KvError::Options(
                "the host's values have as many dimensions as its keys, and are no part of them".into(),
            ));
        }
        if let Overflow::Circular { sink_tokens } = self.overflow {
            if sink_tokens >= self.max_seq_len {
                let max_seq_len = self.max_seq_len;
                return Err(KvError::Options(format!(
                    "{sink_tokens} sink tokens leave no window: max_seq_len is {max_seq_len}"
                )));
            }
            if self.older_than.is_some() {
                return Err(KvError::Options("a circular cache frees old tokens, so it cannot compress them".into()));
            }
        }
        if self.older_than.is_some() && !self.device.is_cpu() {
            return Err(KvError::Options("only a cache on a CPU can compress old tokens".into()));
        }
        let grows = self.overflow == Overflow::Grow;
        let builder =
            KvCache::builder(self.shape).block_size(self.block_size).device(&self.device).name(self.name.clone());
        let recent = builder.clone().dtype(self.dtype);
        let blocks = match self.memory_limit {
            Some(bytes) => recent.clone().memory(bytes).block_count()?.min(self.blocks),
            None => self.blocks,
        };
        let recent = Stores::new(recent.blocks(blocks), grows)?;
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
            below: OnceLock::new(),
        })))
    }
}
