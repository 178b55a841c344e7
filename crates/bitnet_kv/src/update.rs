//! The replacement for `bitnet_inference`'s `layers::attention::KVCache`.

use std::cmp::Ordering::{Equal, Greater, Less};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};
use paged_attention::KvShape;

use crate::contiguous::Contiguous;
use crate::error::Result;
use crate::rows::Rows;
use crate::sequence::Sequence;
use crate::stats::Counters;
use crate::{BlocksInUse, CacheOptions, CacheStats, KVCacheOptions, KvError, Overflow, PagedKVPool};

/// The keys and values of all layers, updated in place: adding tokens to a layer does not copy the tokens before.
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
///     cache.update(layer, tokens(1)?, tokens(1)?, 6)?; // and a token after it
/// }
/// assert_eq!(cache.get(1)?.0.dims(), [6, 4, 8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct KVCache {
    /// `None` until the first tokens, whose shape gives the number of sequences.
    sequence: Option<Sequence>,
    /// No other cache uses it.
    pool: PagedKVPool,
    /// How many blocks one sequence needs.
    blocks: usize,
    overflow: Overflow,
    /// The copy of each layer that [`get`](Self::get) has made.
    copies: Mutex<Vec<Option<Contiguous>>>,
}

impl KVCache {
    /// A cache for sequences of up to `max_seq_len` tokens, stored in f32. Past that length it returns
    /// [`KvError::Overflow`].
    ///
    /// # Errors
    ///
    /// [`KvError`] when a number is 0, `head_dim` is not divisible by 4, or the memory cannot be allocated.
    pub fn new(
        max_seq_len: usize,
        num_layers: usize,
        num_heads: usize,
        head_dim: usize,
        device: &Device,
    ) -> Result<Self> {
        Self::with_options(max_seq_len, num_layers, num_heads, head_dim, device, &KVCacheOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and when some options exclude each other.
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
        let shape = KvShape::new(num_layers, num_heads, head_dim);
        // A ring needs blocks for its window, and for the tokens of a pass until the next one begins: as much again.
        let tokens =
            if matches!(overflow, Overflow::Circular { .. }) { max_seq_len.saturating_mul(2) } else { max_seq_len };
        let blocks = (tokens.div_ceil(16) + if tokens > max_seq_len { 2 } else { 0 }).max(1);
        let builder = PagedKVPool::builder(shape).max_seq_len(max_seq_len).blocks(blocks).dtype(dtype);
        let builder = builder.device(device).overflow(overflow).name("bitnet_kv update");
        let pool = compress_older_than.map_or(builder.clone(), |n| builder.compress_older_than(n)).build()?;
        let copies = Mutex::new((0..num_layers).map(|_| None).collect());
        Ok(Self { sequence: None, pool, blocks, overflow, copies })
    }

    /// Brings a layer to `seq_len` tokens, which is the length of the sequence, not of the pass. The shape of `k` and
    /// `v` is `[T, H, D]` or `[B, H, T, D]`. They are either the new tokens or the whole sequence.
    ///
    /// - `seq_len` is larger than the layer's length: the `T` new tokens are appended. If `T` is `seq_len`, the tensors
    ///   are the whole sequence, and its new tokens are appended.
    /// - `seq_len` is smaller: the layer keeps its first `seq_len` tokens. `T` is `seq_len` or 0.
    /// - `seq_len` is equal: the last `T` tokens are overwritten in place. If `T` is `seq_len`, the tensors are the
    ///   whole sequence.
    ///
    /// A whole sequence must begin with the keys and values that the layer has, to within about a hundredth of the
    /// largest number of each row. So another prompt is an error, and so is a `seq_len` that counts only the pass. The
    /// comparison costs a copy of the layer. It cannot tell tokens apart whose keys and values are that close. When
    /// `seq_len` is equal and `T` is less, nothing is compared: the new tokens replace the last `T`.
    ///
    /// # Errors
    ///
    /// [`KvError`] when the layer does not exist, a shape, type or device is wrong, the batch is not that of the cache,
    /// `T` does not fit `seq_len` ([`KvError::Length`]), the whole sequence differs from the layer
    /// ([`KvError::OtherTokens`]), there is no room ([`KvError::Overflow`], [`KvError::OutOfBlocks`]), or a circular
    /// cache has freed blocks that the last of the `seq_len` tokens sees ([`KvError::OutOfWindow`]). The cache is then
    /// unchanged.
    pub fn update(&mut self, layer_idx: usize, k: Tensor, v: Tensor, seq_len: usize) -> Result<()> {
        self.layer(layer_idx)?;
        let rows = self.pool.0.taken.rows(&k, &v, true)?;
        let (current, tokens) = (self.seq_len(layer_idx), rows.tokens);
        let new = seq_len.saturating_sub(current);
        let (fits, expected) = match seq_len.cmp(&current) {
            Greater => (tokens == new || tokens == seq_len, format!("{new} new ones or all {seq_len}")),
            Less => (tokens == seq_len || tokens == 0, format!("all {seq_len} or none")),
            Equal => (tokens <= current, format!("at most {current}")),
        };
        if !fits {
            let (k, v) = (k.dims().to_vec(), v.dims().to_vec());
            return Err(KvError::Length { tokens, current, seq_len, expected, k, v });
        }
        self.fits(&rows, &k, &v)?;
        if let Some(sequence) = self.sequence.as_ref().filter(|_| tokens == seq_len && current > 0)
            && let Some(at) = sequence.view(layer_idx)?.differs(&rows)?
        {
            return Err(KvError::OtherTokens { at, tokens, current });
        }
        if seq_len < current || seq_len == current && tokens > 0 {
            self.copies()[layer_idx] = None;
        }
        let sequence = self.sequence_of(rows.batch)?;
        match seq_len.cmp(&current) {
            Greater => sequence.append(layer_idx, &rows.last(new)?),
            Less => sequence.truncate_layer(layer_idx, seq_len),
            Equal => sequence.write(layer_idx, current - tokens, &rows),
        }
    }

    /// The keys and values of a layer's `S` tokens, each `[S, H, D]`, or `[B, H, S, D]` for a batch of several
    /// sequences. In a circular cache, of the tokens that the last one sees.
    ///
    /// The first call copies the layer. The copy is kept in addition to the blocks: the next call copies only the new
    /// tokens and returns views. Views never change. A layer that was truncated or overwritten is copied again. A cache
    /// that is circular or keeps old tokens in 8-bit storage is copied at each call. [`attend`](Self::attend) needs no
    /// copy.
    ///
    /// # Errors
    ///
    /// [`KvError::Layer`] when the layer does not exist; otherwise an error of candle.
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
        let view = sequence.view(layer_idx)?;
        if view.window.is_some() || self.pool.0.older_than.is_some() {
            return view.shaped(view.keys_and_values()?);
        }
        // The lock is not held while copying. A call from another thread meanwhile makes its own copy.
        let most = if sequence.overflow == Overflow::Grow { usize::MAX } else { self.pool.max_seq_len() };
        let cached = self.copies()[layer_idx].take();
        let copy = match cached {
            Some(mut copy) => copy.extend(&view, most).map(|()| copy)?,
            None => Contiguous::new(&view, most)?,
        };
        let views = copy.views();
        self.copies()[layer_idx] = Some(copy);
        views
    }

    /// Attention of a layer's last `T` tokens, with the queries `q [B, n * H, T, D]`, without a copy of the keys and
    /// values: as [`PagedLayerKVCache::attend`](crate::PagedLayerKVCache::attend).
    ///
    /// # Errors
    ///
    /// As there, and [`KvError::Layer`] when the layer does not exist.
    pub fn attend(&self, layer_idx: usize, q: &Tensor, scale: f32, causal: bool) -> Result<Tensor> {
        self.layer(layer_idx)?;
        match &self.sequence {
            Some(sequence) => sequence.view(layer_idx)?.attend(q, scale, causal),
            None => {
                let expected = "none: the cache has no tokens".into();
                Err(KvError::Queries { got: q.dims().to_vec(), expected })
            }
        }
    }

    /// How many tokens a layer has; 0 if the layer does not exist.
    pub fn seq_len(&self, layer_idx: usize) -> usize {
        let sequence = self.sequence.as_ref().filter(|sequence| sequence.layer(layer_idx).is_ok());
        sequence.map_or(0, |sequence| sequence.len(layer_idx))
    }

    /// Lengths and memory sizes, under these keys. The first three are the host's, counted as the host does.
    ///
    /// - `current_sequence_length`: the length of the longest layer.
    /// - `max_sequence_length`: `max_seq_len`, or the length of a cache that has grown past it.
    /// - `tensor_memory_bytes`: bytes of `max_sequence_length` tokens of each sequence.
    /// - `reserved_memory_bytes`: bytes of all blocks.
    /// - `held_memory_bytes`: bytes of the blocks in use.
    /// - `copied_memory_bytes`: bytes of the copies that [`get`](Self::get) keeps.
    pub fn memory_usage(&self) -> HashMap<String, usize> {
        let stats = self.pool.stats();
        let batch = self.sequence.as_ref().map_or(1, |sequence| sequence.batch);
        let copied = self.copies().iter().flatten().map(Contiguous::bytes).sum();
        let current = self.sequence.as_ref().map_or(0, Sequence::longest);
        let max = if self.overflow == Overflow::Grow {
            self.pool.max_seq_len().max(current)
        } else {
            self.pool.max_seq_len()
        };
        let numbers = [
            ("tensor_memory_bytes", max.saturating_mul(batch).saturating_mul(self.pool.0.recent.bytes_per_token())),
            ("current_sequence_length", current),
            ("max_sequence_length", max),
            ("reserved_memory_bytes", stats.bytes_allocated),
            ("held_memory_bytes", stats.bytes_in_use),
            ("copied_memory_bytes", copied),
        ];
        numbers.into_iter().map(|(key, number)| (key.into(), number)).collect()
    }

    /// Statistics of the cache. A hit is a call of [`get`](Self::get) on a layer with tokens.
    pub fn stats(&self) -> CacheStats {
        self.pool.stats()
    }

    /// The numbers of blocks that the cache uses, in the storage of new tokens and in 8-bit storage.
    pub fn blocks_in_use(&self) -> BlocksInUse {
        self.sequence.as_ref().map_or(BlocksInUse::default(), Sequence::blocks)
    }

    /// Lets the cache grow past `max_seq_len` from now on, as with [`Overflow::Grow`]. A circular cache stays circular
    /// until it is cleared.
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

    /// Removes all tokens and frees all blocks. The next tokens may have another batch size.
    ///
    /// # Errors
    ///
    /// [`KvError::Device`] when `device` is not the cache's device. A cache cannot move to another device.
    pub fn clear(&mut self, device: &Device) -> Result<()> {
        let own = &self.pool.0.taken.device;
        if !device.same_device(own) {
            let (got, expected) = (format!("{device:?}"), format!("{own:?}"));
            return Err(KvError::Device { tensor: "clear", got, expected });
        }
        self.drop_tokens();
        Ok(())
    }

    /// Checks that the layer exists, and does nothing else. Keys and values are in memory already, and attention
    /// prefetches the next block while it computes with the current one. Blocks that were prefetched earlier would be
    /// evicted from the CPU's caches before attention reads them.
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

    fn copies(&self) -> MutexGuard<'_, Vec<Option<Contiguous>>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_tokens(&mut self) {
        self.sequence = None;
        self.copies().iter_mut().for_each(|copy| *copy = None);
    }

    /// Checks that `rows` have the batch size of the cache.
    fn fits(&self, rows: &Rows, k: &Tensor, v: &Tensor) -> Result<()> {
        match &self.sequence {
            // An empty cache may start with another batch size.
            Some(sequence) if sequence.batch != rows.batch && sequence.longest() > 0 => {
                let (expected, got) = (sequence.batch, rows.batch);
                Err(KvError::Batch { expected, got, k: k.dims().to_vec(), v: v.dims().to_vec() })
            }
            _ => Ok(()),
        }
    }

    /// The sequence of this batch size. One of another batch size is dropped first.
    fn sequence_of(&mut self, batch: usize) -> Result<&mut Sequence> {
        if self.sequence.as_ref().is_some_and(|sequence| sequence.batch != batch) {
            self.drop_tokens();
        }
        let (pool, overflow) = (&self.pool, self.overflow);
        match &mut self.sequence {
            Some(sequence) => Ok(sequence),
            none => {
                for stores in [Some(&pool.0.recent), pool.0.old.as_ref()].into_iter().flatten() {
                    stores.at_least(self.blocks.saturating_mul(batch))?;
                }
                let mut table = pool.table_options(&CacheOptions::default().batch(batch)).private();
                table.window = table.window.filter(|_| overflow != Overflow::Grow);
                let mut sequence = Sequence::new(&Arc::clone(&pool.0), batch, table);
                sequence.enlarges = sequence.options.window.is_some();
                sequence.overflow = overflow;
                Ok(none.insert(sequence))
            }
        }
    }
}
