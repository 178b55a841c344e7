//! The replacement for `bitnet_transformer`'s `KVCache` and `LayerKVCache`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};
use paged_attention::KvShape;

use crate::error::Result;
use crate::read::View;
use crate::sequence::Sequence;
use crate::{BlocksInUse, CacheOptions, KvError, PagedKVPool};

/// The keys and values of one request, all layers. [`PagedKVPool::cache`] makes it. It is `Send` and `'static`, so it
/// can be passed as a `&mut dyn Any`. Dropping it frees its blocks.
///
/// A pass appends its tokens to one layer after the other, with [`append`](PagedLayerKVCache::append). The first layer
/// that grows past all others allocates the blocks for all layers, so a pass that has begun does not run out of blocks.
/// Each layer has its own length: it can be cleared and appended to alone.
#[derive(Debug)]
pub struct PagedKVCache {
    layers: Vec<PagedLayerKVCache>,
    shared: Shared,
    pool: PagedKVPool,
}

/// One layer of a [`PagedKVCache`], or a single layer with its own pool.
#[derive(Debug)]
pub struct PagedLayerKVCache {
    layer: usize,
    shared: Shared,
    pool: PagedKVPool,
}

/// The sequence that the layers of a cache share, under a lock. The lock is never held during attention, nor while
/// waiting for rayon's threads. Otherwise a rayon task that waits for the lock could block the attention that holds it.
#[derive(Debug, Clone)]
struct Shared(Arc<Mutex<Sequence>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Sequence> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PagedKVCache {
    pub(crate) fn over(pool: &PagedKVPool, options: &CacheOptions) -> Self {
        let sequence = Sequence::new(&pool.0, options.batch.max(1), pool.table_options(options));
        let shared = Shared(Arc::new(Mutex::new(sequence)));
        let layer = |layer| PagedLayerKVCache { layer, shared: shared.clone(), pool: pool.clone() };
        let layers = (0..pool.shape().layers).map(layer).collect();
        Self { layers, shared, pool: pool.clone() }
    }

    /// The layers, in order.
    pub fn layers(&self) -> &[PagedLayerKVCache] {
        &self.layers
    }

    /// The layers, in order, for appending to them.
    pub fn layers_mut(&mut self) -> &mut [PagedLayerKVCache] {
        &mut self.layers
    }

    /// The layer with this index, or `None` if there is none.
    pub fn layer_mut(&mut self, idx: usize) -> Option<&mut PagedLayerKVCache> {
        self.layers.get_mut(idx)
    }

    /// Prepares a pass over a sequence of these tokens, whatever the cache has. Returns how many of the first tokens
    /// need not be computed, `n`: feed the model `tokens[n..]`. The last token is always computed, because its logits
    /// are needed.
    ///
    /// The cache compares `tokens` with the tokens that all of its layers have and whose ids it was given. It keeps
    /// their common prefix and truncates the rest. If the pool has a longer cached prefix of `tokens`, the cache starts
    /// with that instead. A circular cache that has freed blocks that it would need starts again. After a pass that
    /// succeeds, the cache has the tokens of the pass; after one that fails, it does not.
    ///
    /// Call it before every pass, with all tokens of the sequence from the first one on: the prompt, the answer so far,
    /// and the token that was just sampled.
    ///
    /// ```
    /// # use bitnet_kv::{KvShape, PagedKVCache, PagedKVPool};
    /// # use candle_core::{DType, Device, Tensor};
    /// # let pool = PagedKVPool::builder(KvShape::new(2, 1, 4)).blocks(8).build()?;
    /// # fn model(tokens: &[u32], cache: &mut PagedKVCache) -> Result<(), bitnet_kv::KvError> {
    /// #     let kv = Tensor::zeros((1, 1, tokens.len(), 4), DType::F32, &Device::Cpu)?;
    /// #     cache.layers_mut().iter_mut().try_for_each(|layer| layer.append(&kv, &kv))
    /// # }
    /// let mut cache = pool.cache();
    /// for (tokens, to_compute) in [
    ///     (vec![5, 6, 7], 3),    // a prompt
    ///     (vec![5, 6, 7], 1),    // the same prompt: only its last token
    ///     (vec![5, 6, 7, 8], 1), // a sampled token after it
    ///     (vec![5, 9], 1),       // another prompt, with a common prefix
    /// ] {
    ///     let n = cache.begin_pass(&tokens)?;
    ///     assert_eq!(tokens.len() - n, to_compute);
    ///     model(&tokens[n..], &mut cache)?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`KvError::Sequences`] when the cache has several sequences; [`KvError::Busy`] when a layer that is still being
    /// read uses blocks that would be freed.
    pub fn begin_pass(&mut self, tokens: &[u32]) -> Result<usize> {
        self.shared.lock().begin_pass(tokens)
    }

    /// Starts an empty cache with the longest cached prefix of `tokens`, which are the request's tokens from the first
    /// one on. Returns how many of them need not be computed, `n`: feed the model `tokens[n..]`. The last token is
    /// always computed, because its logits are needed. After this call, the caller keeps track of what to compute;
    /// [`begin_pass`](Self::begin_pass) does it for the caller.
    ///
    /// The cache stores the ids of `tokens`. Once the tokens are computed, other requests can match them, even after
    /// this cache is dropped. Pass the ids of later tokens to [`note_tokens`](Self::note_tokens).
    ///
    /// # Errors
    ///
    /// [`KvError::NotEmpty`] when the cache already has tokens, or has several sequences; [`KvError::Busy`] when a
    /// layer is still reading blocks that were cleared.
    pub fn match_prefix(&mut self, tokens: &[u32]) -> Result<usize> {
        self.shared.lock().match_prefix(tokens)
    }

    /// Sets the ids of the tokens that the next pass appends, so that other requests can match them too: a sampled
    /// token, or the next message of a conversation. Without this call, only this request uses these tokens and all
    /// tokens after them. Ignored when the ids of the tokens before are not known.
    pub fn note_tokens(&mut self, tokens: &[u32]) {
        self.shared.lock().note_tokens(tokens);
    }

    /// How many tokens all layers have.
    pub fn seq_len(&self) -> usize {
        self.shared.lock().shortest()
    }

    /// The longest length that the cache may have; in a circular cache, how many tokens a token sees.
    pub fn max_seq_len(&self) -> usize {
        self.pool.max_seq_len()
    }

    /// Keeps the first `len` tokens of all layers, for example after a prompt was shortened or draft tokens were
    /// rejected. Layers with at most `len` tokens are unchanged. Blocks that a layer is still reading are freed when it
    /// is done.
    ///
    /// # Errors
    ///
    /// [`KvError::OutOfWindow`] when a circular cache has freed blocks that the last of the `len` tokens sees. The
    /// cache is then unchanged. The last pass can always be truncated.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.shared.lock().truncate(len)
    }

    /// Removes all tokens and frees all blocks. Blocks that a layer is still reading are freed when it is done.
    pub fn clear(&mut self) {
        self.shared.lock().clear();
    }

    /// The numbers of blocks that the cache uses, in the storage of new tokens and in 8-bit storage. Blocks that it
    /// shares with other caches count.
    pub fn blocks_in_use(&self) -> BlocksInUse {
        self.shared.lock().blocks()
    }

    /// Bytes of the blocks that the cache uses, shared ones included.
    pub fn bytes_in_use(&self) -> usize {
        self.shared.lock().bytes()
    }

    /// The pool of the cache.
    pub fn pool(&self) -> &PagedKVPool {
        &self.pool
    }
}

impl PagedLayerKVCache {
    /// A single layer with its own pool, for `batch_size` sequences of up to `max_seq_len` tokens.
    ///
    /// # Errors
    ///
    /// [`KvError`] when a number is 0 or the memory cannot be allocated.
    pub fn new(
        batch_size: usize,
        n_kv_heads: usize,
        max_seq_len: usize,
        head_dim: usize,
        device: &Device,
    ) -> Result<Self> {
        for (number, name) in [(batch_size, "batch_size"), (n_kv_heads, "n_kv_heads"), (head_dim, "head_dim")] {
            if number == 0 {
                return Err(KvError::Zero(name));
            }
        }
        let builder = PagedKVPool::builder(KvShape::new(1, n_kv_heads, head_dim)).device(device);
        let blocks = max_seq_len.div_ceil(16).max(1).saturating_mul(batch_size);
        let pool = builder.max_seq_len(max_seq_len).blocks(blocks).build()?;
        let mut cache = pool.cache_with(&CacheOptions::default().batch(batch_size));
        // The pool was built with one layer, so there is one.
        cache.layers.pop().ok_or(KvError::Zero("layers"))
    }

    /// Appends the keys, after the rotary embedding, and the values of new tokens, each `[B, H_kv, T, D]` in the
    /// cache's type. Earlier tokens are not copied.
    ///
    /// The new tokens come after all tokens of the layer. To truncate the sequence, or to begin another one, an engine
    /// calls [`PagedKVCache::begin_pass`] before its pass.
    ///
    /// # Errors
    ///
    /// [`KvError`] when a shape, batch, type or device is wrong, the cache would be longer than `max_seq_len`
    /// ([`KvError::Overflow`]), the pool is full ([`KvError::OutOfBlocks`]), or another layer of the cache is being
    /// read at this moment ([`KvError::Busy`]). The cache is then unchanged.
    pub fn append(&mut self, k_new: &Tensor, v_new: &Tensor) -> Result<()> {
        let rows = self.pool.0.taken.rows(k_new, v_new, false)?;
        let mut sequence = self.shared.lock();
        if rows.batch != sequence.batch {
            let (k, v) = (k_new.dims().to_vec(), v_new.dims().to_vec());
            return Err(KvError::Batch { expected: sequence.batch, got: rows.batch, k, v });
        }
        sequence.append(self.layer, &rows)
    }

    /// Attention of the layer's last `T` tokens, with the queries `q [B, n * H_kv, T, D]`, over the layer's tokens:
    /// `softmax(scale * q kᵀ) v`, in the shape of `q`. Query head `h` reads key head `h / n` (grouped-query attention).
    /// With `causal`, a token sees itself and the tokens before it; without, it sees all tokens.
    ///
    /// It replaces repeating keys and values for each query head, the scores, the mask, the softmax and the second
    /// product. Keys and values are read from their blocks, without a copy. The result is a view of a tensor
    /// `(B, T, heads, D)`, so transposing and reshaping it to `[B, T, heads * D]` copies nothing.
    ///
    /// # Errors
    ///
    /// [`KvError`] when `q` has a wrong shape, type or device, or more tokens than the layer, or when one of its tokens
    /// sees blocks that a circular cache has freed. The tokens of the last pass never do.
    pub fn attend(&self, q: &Tensor, scale: f32, causal: bool) -> Result<Tensor> {
        self.with_view(|view| view.attend(q, scale, causal))
    }

    /// A copy of the keys, `[B, H_kv, seq_len, D]`; in a circular cache, of those that the last token sees.
    ///
    /// # Errors
    ///
    /// An error of candle.
    pub fn keys(&self) -> Result<Tensor> {
        Ok(self.with_view(View::keys_and_values)?.0.transpose(1, 2)?.contiguous()?)
    }

    /// A copy of the values, in the shape of [`keys`](Self::keys).
    ///
    /// # Errors
    ///
    /// An error of candle.
    pub fn values(&self) -> Result<Tensor> {
        Ok(self.with_view(View::keys_and_values)?.1.transpose(1, 2)?.contiguous()?)
    }

    /// How many tokens the layer has. This is also the position of the next token.
    pub fn seq_len(&self) -> usize {
        self.shared.lock().len(self.layer)
    }

    /// The longest length that the cache may have; in a circular cache, how many tokens a token sees.
    pub fn max_seq_len(&self) -> usize {
        self.pool.max_seq_len()
    }

    /// The number of heads of keys and values.
    pub fn n_kv_heads(&self) -> usize {
        self.pool.shape().kv_heads
    }

    /// Removes the layer's tokens. Blocks are freed when all layers have been cleared.
    pub fn clear(&mut self) {
        // It cannot fail: truncated to 0, a layer needs none of the freed blocks.
        drop(self.shared.lock().truncate_layer(self.layer, 0));
    }

    /// Calls `with` with a view of the layer. The lock is not held meanwhile.
    fn with_view<T>(&self, with: impl FnOnce(&View) -> Result<T>) -> Result<T> {
        let view = self.shared.lock().view(self.layer)?;
        let result = with(&view);
        drop(view);
        // Free the blocks that could not be freed while the view existed. An error of this is not one of `with`.
        drop(self.shared.lock().tidy());
        result
    }
}
