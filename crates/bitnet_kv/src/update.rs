//! What takes the place of `bitnet_inference`'s `layers::attention::KVCache`.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use paged_attention::{KvDtype, KvShape};

use crate::error::Result;
use crate::rows::Rows;
use crate::sequence::Sequence;
use crate::stats::Counters;
use crate::{CacheOptions, CacheStats, KvError, Overflow, PagedKVPool};

/// Keys and values of all layers, updated in place: a layer grows by its new tokens, and nothing else is touched.
///
/// ```
/// use bitnet_kv::KVCache;
/// use candle_core::{DType, Device, Tensor};
///
/// let device = Device::Cpu;
/// let mut cache = KVCache::new(/* max_seq_len */ 64, /* layers */ 2, /* heads */ 4, /* head_dim */ 8, &device)?;
/// let tokens = |n| Tensor::ones((n, 4, 8), DType::F32, &device); // [T, H, D]
///
/// for layer in 0..2 {
///     cache.update(layer, tokens(5)?, tokens(5)?, 5)?; // a prompt
///     cache.update(layer, tokens(1)?, tokens(1)?, 6)?; // and a token behind it
/// }
/// assert_eq!(cache.get(1)?.0.dims(), [6, 4, 8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct KVCache {
    /// None until the first tokens say how many sequences they belong to.
    sequence: Option<Sequence>,
    pool: PagedKVPool,
    overflow: Overflow,
}

/// What a [`KVCache`] differs in from one made by [`KVCache::new`].
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct KVCacheOptions {
    /// What happens past `max_seq_len`.
    pub overflow: Overflow,
    /// Tokens older than the last so many are kept in 8-bit storage.
    pub compress_older_than: Option<usize>,
    /// How new tokens are stored, and given.
    pub dtype: KvDtype,
}

impl KVCacheOptions {
    /// What happens past `max_seq_len`; an error unless told.
    #[must_use]
    pub fn overflow(self, overflow: Overflow) -> Self {
        Self { overflow, ..self }
    }

    /// Keeps tokens that are older than the last `n` in 8-bit storage.
    #[must_use]
    pub fn compress_older_than(self, n: usize) -> Self {
        Self { compress_older_than: Some(n), ..self }
    }

    /// How new tokens are stored, and given; as f32 unless told.
    #[must_use]
    pub fn dtype(self, dtype: KvDtype) -> Self {
        Self { dtype, ..self }
    }
}

impl KVCache {
    /// A cache for sequences of up to `max_seq_len` tokens of f32, which refuses more.
    ///
    /// # Errors
    ///
    /// [`KvError`] when a number is 0, `head_dim` is not divisible by 4, or the memory cannot be had.
    pub fn new(
        max_seq_len: usize,
        num_layers: usize,
        num_heads: usize,
        head_dim: usize,
        device: &Device,
    ) -> Result<Self> {
        Self::with_options(max_seq_len, num_layers, num_heads, head_dim, device, &KVCacheOptions::default())
    }

    /// The same with more to choose.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and when the options do not go together.
    pub fn with_options(
        max_seq_len: usize,
        num_layers: usize,
        num_heads: usize,
        head_dim: usize,
        device: &Device,
        options: &KVCacheOptions,
    ) -> Result<Self> {
        for (number, name) in [(num_layers, "num_layers"), (num_heads, "num_heads")] {
            if number == 0 {
                return Err(KvError::Zero(name));
            }
        }
        if head_dim == 0 || !head_dim.is_multiple_of(4) {
            return Err(KvError::HeadDim(head_dim));
        }
        let KVCacheOptions { overflow, compress_older_than, dtype } = *options;
        let shape = KvShape { layers: num_layers, kv_heads: num_heads, head_dim };
        // A ring holds what it sees, and what comes until all layers have it: as much again.
        let tokens =
            if matches!(overflow, Overflow::Circular { .. }) { max_seq_len.saturating_mul(2) } else { max_seq_len };
        let blocks = tokens.div_ceil(16) + if tokens > max_seq_len { 2 } else { 0 };
        let builder = PagedKVPool::builder(shape).max_seq_len(max_seq_len).blocks(blocks.max(1)).dtype(dtype);
        let builder = builder.device(device).overflow(overflow).name("bitnet_kv update");
        let pool = compress_older_than.map_or(builder.clone(), |n| builder.compress_older_than(n)).build()?;
        Ok(Self { sequence: None, pool, overflow })
    }

    /// Brings a layer to `seq_len` tokens. `k` and `v` are `[T, H, D]` or `[B, H, T, D]`, and hold either the new tokens or the
    /// whole sequence, of which only the new ones are taken.
    ///
    /// - `seq_len` grows: the new tokens are appended.
    /// - It shrinks: the layer keeps its first `seq_len` tokens; `T` is `seq_len`, or 0.
    /// - It stays: the last `T` tokens are overwritten in place.
    ///
    /// # Errors
    ///
    /// [`KvError`] when the layer does not exist, a shape, type or device is wrong, the batch is another than before, `T` does
    /// not lead to `seq_len`, there is no room, or a circular cache has given back what the last of `seq_len` tokens sees
    /// ([`KvError::BehindWindow`]). The cache is then as it was.
    pub fn update(&mut self, layer_idx: usize, k: Tensor, v: Tensor, seq_len: usize) -> Result<()> {
        self.layer(layer_idx)?;
        let rows = self.pool.0.taken.rows(&k, &v, true)?;
        let current = self.sequence.as_ref().map_or(0, |sequence| sequence.len(layer_idx));
        let new = seq_len.saturating_sub(current);
        let fits = match seq_len {
            _ if seq_len > current => rows.tokens == new || rows.tokens == seq_len,
            _ if seq_len < current => rows.tokens == seq_len || rows.tokens == 0,
            _ => rows.tokens <= current,
        };
        if !fits {
            let expected = match seq_len {
                _ if seq_len > current => format!("{new} new ones or all {seq_len}"),
                _ if seq_len < current => format!("all {seq_len} or none"),
                _ => format!("at most {current}"),
            };
            let (k, v) = (k.dims().to_vec(), v.dims().to_vec());
            return Err(KvError::Length { tokens: rows.tokens, current, seq_len, expected, k, v });
        }
        let sequence = self.sequence_for(&rows, &k, &v)?;
        match seq_len {
            _ if seq_len > current => sequence.append(layer_idx, &rows.last(new)?),
            _ if seq_len < current => sequence.truncate_layer(layer_idx, seq_len),
            _ => sequence.write(layer_idx, current - rows.tokens, &rows),
        }
    }

    /// A layer's keys and values, `[S, H, D]` each for its `S` tokens, or `[B, H, S, D]` if it holds a batch of several
    /// sequences. Of a circular cache, those that its last token sees.
    ///
    /// # Errors
    ///
    /// [`KvError::Layer`] when the layer does not exist; otherwise when the tensor library refuses.
    pub fn get(&self, layer_idx: usize) -> Result<(Tensor, Tensor)> {
        self.layer(layer_idx)?;
        let counters = &self.pool.0.counters;
        let found = self.sequence.as_ref().filter(|sequence| sequence.len(layer_idx) > 0);
        Counters::count(if found.is_some() { &counters.hits } else { &counters.misses }, 1);
        let Some(sequence) = found else {
            let (taken, KvShape { kv_heads, head_dim, .. }) = (&self.pool.0.taken, self.pool.shape());
            let empty = match self.sequence.as_ref().map_or(1, |sequence| sequence.batch) {
                1 => Tensor::zeros((0, kv_heads, head_dim), taken.dtype, &taken.device)?,
                batch => Tensor::zeros((batch, kv_heads, 0, head_dim), taken.dtype, &taken.device)?,
            };
            return Ok((empty.clone(), empty));
        };
        let (k, v) = sequence.view(layer_idx)?.keys_and_values()?;
        match sequence.batch {
            1 => Ok((k.squeeze(0)?, v.squeeze(0)?)),
            _ => Ok((k.transpose(1, 2)?.contiguous()?, v.transpose(1, 2)?.contiguous()?)),
        }
    }

    /// Attends with the last `T` tokens of a layer, `q [B, n * H, T, D]`, without copying keys and values together: see
    /// [`PagedLayerKVCache::attend`](crate::PagedLayerKVCache::attend).
    ///
    /// # Errors
    ///
    /// As there, and [`KvError::Layer`].
    pub fn attend(&self, layer_idx: usize, q: &Tensor, scale: f32, causal: bool) -> Result<Tensor> {
        self.layer(layer_idx)?;
        match &self.sequence {
            Some(sequence) => sequence.view(layer_idx)?.attend(q, scale, causal),
            None => {
                let expected = "tokens to attend to: the cache has none".into();
                Err(KvError::Queries { got: q.dims().to_vec(), expected })
            }
        }
    }

    /// How many tokens a layer has; 0 if there is no such layer.
    pub fn seq_len(&self, layer_idx: usize) -> usize {
        let sequence = self.sequence.as_ref().filter(|sequence| sequence.layer(layer_idx).is_ok());
        sequence.map_or(0, |sequence| sequence.len(layer_idx))
    }

    /// The host's numbers, as they are: `tensor_memory_bytes` of all blocks, `current_sequence_length` of the longest layer,
    /// `max_sequence_length`, which grows with a cache that grows; and `held_memory_bytes` of the blocks that hold tokens.
    pub fn memory_usage(&self) -> HashMap<String, usize> {
        let stats = self.pool.stats();
        let current = self.sequence.as_ref().map_or(0, Sequence::longest);
        let max = if self.overflow == Overflow::Grow {
            self.pool.max_seq_len().max(current)
        } else {
            self.pool.max_seq_len()
        };
        let numbers = [
            ("tensor_memory_bytes", stats.bytes_reserved),
            ("current_sequence_length", current),
            ("max_sequence_length", max),
            ("held_memory_bytes", stats.bytes_held),
        ];
        numbers.into_iter().map(|(key, number)| (key.into(), number)).collect()
    }

    /// What the cache has done, and what it holds. A hit is a [`get`](Self::get) that found tokens.
    pub fn stats(&self) -> CacheStats {
        self.pool.stats()
    }

    /// Blocks that the cache holds: for new tokens, and in 8-bit storage.
    pub fn blocks_held(&self) -> [usize; 2] {
        self.sequence.as_ref().map_or([0, 0], Sequence::blocks)
    }

    /// From now on the cache grows past `max_seq_len`, by as much as it has, and copies nothing.
    /// A circular one becomes one that grows when it is cleared.
    pub fn enable_dynamic_growth(&mut self) {
        self.overflow = Overflow::Grow;
        self.pool.0.recent.let_grow();
        if let Some(old) = &self.pool.0.old {
            old.let_grow();
        }
        let ring = |sequence: &Sequence| matches!(sequence.overflow, Overflow::Circular { .. });
        if let Some(sequence) = self.sequence.as_mut().filter(|sequence| !ring(sequence)) {
            sequence.overflow = Overflow::Grow;
        }
    }

    /// Forgets all tokens and gives all blocks back. The next tokens may be of another batch.
    ///
    /// # Errors
    ///
    /// [`KvError::Device`] when that is not the cache's device: its blocks stay where they are.
    pub fn clear(&mut self, device: &Device) -> Result<()> {
        let own = &self.pool.0.taken.device;
        if !device.same_device(own) {
            let (got, expected) = (format!("{device:?}"), format!("{own:?}"));
            return Err(KvError::Device { tensor: "clear", got, expected });
        }
        self.sequence = None;
        Ok(())
    }

    /// Does nothing but check the layer. Keys and values lie in memory already, and attention asks for the next block while it
    /// computes with the one before: asked for earlier, they would be gone from the caches when their turn comes.
    ///
    /// # Errors
    ///
    /// [`KvError::Layer`] when the layer does not exist.
    pub fn prefetch(&self, layer_idx: usize, seq_len: usize) -> Result<()> {
        let _ = seq_len;
        self.layer(layer_idx)
    }

    fn layer(&self, layer: usize) -> Result<()> {
        let layers = self.pool.shape().layers;
        if layer < layers { Ok(()) } else { Err(KvError::Layer { layer, layers }) }
    }

    /// The tokens of the batch that these belong to.
    fn sequence_for(&mut self, rows: &Rows, k: &Tensor, v: &Tensor) -> Result<&mut Sequence> {
        // An empty cache may begin anew with another batch.
        let other = |sequence: &Sequence| sequence.batch != rows.batch;
        if let Some(sequence) = self.sequence.as_ref().filter(|sequence| other(sequence) && sequence.longest() > 0) {
            let (expected, got) = (sequence.batch, rows.batch);
            return Err(KvError::Batch { expected, got, k: k.dims().to_vec(), v: v.dims().to_vec() });
        }
        if self.sequence.as_ref().is_some_and(other) {
            self.sequence = None;
        }
        let (pool, overflow) = (&self.pool, self.overflow);
        Ok(self.sequence.get_or_insert_with(|| {
            let mut table = pool.table_options(&CacheOptions::default().batch(rows.batch)).private();
            table.window = table.window.filter(|_| overflow != Overflow::Grow);
            let mut sequence = Sequence::new(&Arc::clone(&pool.0), rows.batch, table);
            sequence.overflow = overflow;
            sequence
        }))
    }
}
