//! What takes the place of `bitnet_inference`'s `layers::attention::KVCache`.

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
    /// Nobody else has it.
    pool: PagedKVPool,
    /// The blocks that one sequence takes.
    blocks: usize,
    overflow: Overflow,
    /// What [`get`](Self::get) has copied of each layer.
    copies: Mutex<Vec<Option<Contiguous>>>,
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
        let blocks = (tokens.div_ceil(16) + if tokens > max_seq_len { 2 } else { 0 }).max(1);
        let builder = PagedKVPool::builder(shape).max_seq_len(max_seq_len).blocks(blocks).dtype(dtype);
        let builder = builder.device(device).overflow(overflow).name("bitnet_kv update");
        let pool = compress_older_than.map_or(builder.clone(), |n| builder.compress_older_than(n)).build()?;
        let copies = Mutex::new((0..num_layers).map(|_| None).collect());
        Ok(Self { sequence: None, pool, blocks, overflow, copies })
    }

    /// Brings a layer to `seq_len` tokens: the length of the sequence, not of the pass. `k` and `v` are `[T, H, D]` or
    /// `[B, H, T, D]`, and hold either new tokens or the whole sequence.
    ///
    /// - `seq_len` grows: `T` new tokens are appended. If `T` is `seq_len`, the whole sequence is given, and what is new of it
    ///   is appended.
    /// - It shrinks: the layer keeps its first `seq_len` tokens; `T` is `seq_len`, or 0.
    /// - It stays: the last `T` tokens are overwritten in place. If `T` is `seq_len`, these are all, and the whole sequence.
    ///
    /// A whole sequence has to begin as the one that the layer holds, to about a hundredth of each row's largest number: so
    /// another prompt, or a `seq_len` that counts the pass alone, is an error. It is compared, which costs a copy of what is
    /// held. What looks like the tokens that are there passes for them; and a pass of `T` tokens in place of the last `T` is
    /// meant to be one.
    ///
    /// # Errors
    ///
    /// [`KvError`] when the layer does not exist, a shape, type or device is wrong, the batch is another than before, `T` does
    /// not lead to `seq_len`, other tokens are given than the layer holds ([`KvError::OtherTokens`]), there is no room, or a
    /// circular cache has given back what the last of `seq_len` tokens sees ([`KvError::OutOfWindow`]). The cache is then as
    /// it was.
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

    /// A layer's keys and values, `[S, H, D]` each for its `S` tokens, or `[B, H, S, D]` if it holds a batch of several
    /// sequences. Of a circular cache, those that its last token sees.
    ///
    /// The first call copies the layer, and what it has copied is kept beside the blocks: the next one copies what is new, and
    /// gives views. Views never change. A layer that was cut or overwritten is copied anew, and so is each time one that is
    /// circular or keeps old tokens in 8 bits. [`attend`](Self::attend) needs no copy.
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
        let view = sequence.view(layer_idx)?;
        if view.window.is_some() || self.pool.0.older_than.is_some() {
            return view.shaped(view.keys_and_values()?);
        }
        // Nobody waits for who reads: whoever comes meanwhile makes a copy of his own.
        let most = if sequence.overflow == Overflow::Grow { usize::MAX } else { self.pool.max_seq_len() };
        let kept = self.copies()[layer_idx].take();
        let copy = match kept {
            Some(mut copy) => copy.extend(&view, most).map(|()| copy)?,
            None => Contiguous::new(&view, most)?,
        };
        let views = copy.views();
        self.copies()[layer_idx] = Some(copy);
        views
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

    /// The host's numbers, as it counts them: `current_sequence_length` of the longest layer, `max_sequence_length`, which grows
    /// with a cache that grows, and `tensor_memory_bytes` of as many tokens of each sequence. Beside them
    /// `reserved_memory_bytes` of all blocks, `held_memory_bytes` of those that hold tokens, and `copied_memory_bytes` of what
    /// [`get`](Self::get) keeps.
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

    /// What the cache has done, and what it holds. A hit is a [`get`](Self::get) that found tokens.
    pub fn stats(&self) -> CacheStats {
        self.pool.stats()
    }

    /// Blocks that the cache holds: for new tokens, and in 8-bit storage.
    pub fn blocks_in_use(&self) -> BlocksInUse {
        self.sequence.as_ref().map_or(BlocksInUse::default(), Sequence::blocks)
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
        self.forget();
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

    fn copies(&self) -> MutexGuard<'_, Vec<Option<Contiguous>>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&mut self) {
        self.sequence = None;
        self.copies().iter_mut().for_each(|copy| *copy = None);
    }

    /// Whether these belong to the batch that is held.
    fn fits(&self, rows: &Rows, k: &Tensor, v: &Tensor) -> Result<()> {
        match &self.sequence {
            // An empty cache may begin anew with another batch.
            Some(sequence) if sequence.batch != rows.batch && sequence.longest() > 0 => {
                let (expected, got) = (sequence.batch, rows.batch);
                Err(KvError::Batch { expected, got, k: k.dims().to_vec(), v: v.dims().to_vec() })
            }
            _ => Ok(()),
        }
    }

    /// The tokens of a batch; another one is forgotten.
    fn sequence_of(&mut self, batch: usize) -> Result<&mut Sequence> {
        if self.sequence.as_ref().is_some_and(|sequence| sequence.batch != batch) {
            self.forget();
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
