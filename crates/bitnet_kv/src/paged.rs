//! What takes the place of `bitnet_transformer`'s `KVCache` and `LayerKVCache`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};
use paged_attention::KvShape;

use crate::error::Result;
use crate::read::View;
use crate::sequence::Sequence;
use crate::{BlocksInUse, CacheOptions, KvError, PagedKVPool};

/// One request's keys and values, all layers: made by [`PagedKVPool::cache`]. It is `Send`, and owns what it needs, so it fits
/// through a `&mut dyn Any`. Dropping it gives its blocks back.
///
/// A pass gives each layer its tokens in turn, by [`append`](PagedLayerKVCache::append). The first layer that goes beyond all
/// others takes the blocks for all of them, so a pass that begins has room to end. Layers that are cleared or appended to on
/// their own keep lengths of their own.
#[derive(Debug)]
pub struct PagedKVCache {
    layers: Vec<PagedLayerKVCache>,
    shared: Shared,
    pool: PagedKVPool,
}

/// One layer of a [`PagedKVCache`], or a layer that stands alone.
#[derive(Debug)]
pub struct PagedLayerKVCache {
    layer: usize,
    shared: Shared,
    pool: PagedKVPool,
}

/// The sequence that the layers of a cache belong to. Nobody who has it attends meanwhile, nor waits for threads inside rayon:
/// whoever waits for it gets on, also as a task in the pool of threads in which another one attends.
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

    /// The layers, the first one first.
    pub fn layers(&self) -> &[PagedLayerKVCache] {
        &self.layers
    }

    /// The layers, to append to.
    pub fn layers_mut(&mut self) -> &mut [PagedLayerKVCache] {
        &mut self.layers
    }

    /// The layer with this index, if there is one.
    pub fn layer_mut(&mut self, idx: usize) -> Option<&mut PagedLayerKVCache> {
        self.layers.get_mut(idx)
    }

    /// Prepares a pass over a sequence of these tokens, whatever the cache holds, and says how many of the first need not be
    /// computed: feed the model `tokens[n..]`. At least the last is always left, since its logits are needed.
    ///
    /// The cache knows the tokens it holds: those that it was told, and that all layers have. So it keeps what these begin with
    /// like those, and cuts the rest; where the pool knows more of them, it takes that instead, and a circular cache that has
    /// given back what it would need begins anew. A pass that succeeds makes its tokens held ones, and one that fails does not.
    ///
    /// Ask before every pass, with all tokens of the sequence from its first one on: prompt, answer so far, and what was just
    /// sampled.
    ///
    /// ```
    /// # use bitnet_kv::{KvShape, PagedKVCache, PagedKVPool};
    /// # use candle_core::{DType, Device, Tensor};
    /// # let pool = PagedKVPool::builder(KvShape { layers: 2, kv_heads: 1, head_dim: 4 }).blocks(8).build()?;
    /// # fn model(tokens: &[u32], cache: &mut PagedKVCache) -> Result<(), bitnet_kv::KvError> {
    /// #     let kv = Tensor::zeros((1, 1, tokens.len(), 4), DType::F32, &Device::Cpu)?;
    /// #     cache.layers_mut().iter_mut().try_for_each(|layer| layer.append(&kv, &kv))
    /// # }
    /// let mut cache = pool.cache();
    /// for (tokens, to_compute) in [
    ///     (vec![5, 6, 7], 3),    // a prompt
    ///     (vec![5, 6, 7], 1),    // once more: its last token alone
    ///     (vec![5, 6, 7, 8], 1), // a sampled token behind it
    ///     (vec![5, 9], 1),       // another prompt, with a common start
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
    /// [`KvError::Sequences`] when the cache holds several sequences; [`KvError::Busy`] when a layer still attends to what would
    /// be given back.
    pub fn begin_pass(&mut self, tokens: &[u32]) -> Result<usize> {
        self.shared.lock().begin_pass(tokens)
    }

    /// Starts with what the pool knows of these tokens, the request's from its first one on, and says how many of them need
    /// not be computed: feed the model `tokens[n..]`. At least the last is always left, since its logits are needed. For an empty
    /// cache, whose caller then counts himself: [`begin_pass`](Self::begin_pass) needs no counting.
    ///
    /// The tokens are remembered: when they have been computed, other requests find them, also after this one has gone. Tell
    /// later ones with [`note_tokens`](Self::note_tokens).
    ///
    /// # Errors
    ///
    /// [`KvError::NotEmpty`] when the cache has tokens already, or holds several sequences; [`KvError::Busy`] when a layer
    /// still attends to what has been cleared.
    pub fn match_prefix(&mut self, tokens: &[u32]) -> Result<usize> {
        self.shared.lock().match_prefix(tokens)
    }

    /// Says which tokens the next pass appends, so that they can be found, too: what was sampled, or the next message of a
    /// conversation. Without it they are kept for this request alone, and so are those behind them.
    pub fn note_tokens(&mut self, tokens: &[u32]) {
        self.shared.lock().note_tokens(tokens);
    }

    /// How many tokens all layers have.
    pub fn seq_len(&self) -> usize {
        self.shared.lock().shortest()
    }

    /// How long the cache may become, or how far it sees if it is circular.
    pub fn max_seq_len(&self) -> usize {
        self.pool.max_seq_len()
    }

    /// Keeps the first `len` tokens of all layers: what a sliding prompt or a rejected draft leaves. Does nothing to layers
    /// that have no more. Blocks that a layer still attends to are given back when it has.
    ///
    /// # Errors
    ///
    /// [`KvError::OutOfWindow`] when a circular cache has given back what the last of the `len` tokens sees; it is then
    /// unchanged. Going back over the last pass always works.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.shared.lock().truncate(len)
    }

    /// Forgets all tokens and gives all blocks back; those that a layer still attends to follow when it has.
    pub fn clear(&mut self) {
        self.shared.lock().clear();
    }

    /// Blocks that the cache holds: for new tokens, and in 8-bit storage. Those that it shares with others count.
    pub fn blocks_in_use(&self) -> BlocksInUse {
        self.shared.lock().blocks()
    }

    /// Bytes of the blocks that the cache holds.
    pub fn bytes_in_use(&self) -> usize {
        self.shared.lock().bytes()
    }

    /// The pool that its blocks come from.
    pub fn pool(&self) -> &PagedKVPool {
        &self.pool
    }
}

impl PagedLayerKVCache {
    /// A layer that stands alone, with a pool of its own for `batch_size` sequences of up to `max_seq_len` tokens.
    ///
    /// # Errors
    ///
    /// [`KvError`] when a number is 0 or the memory cannot be had.
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
        let builder = PagedKVPool::builder(KvShape { layers: 1, kv_heads: n_kv_heads, head_dim }).device(device);
        let blocks = max_seq_len.div_ceil(16).max(1).saturating_mul(batch_size);
        let pool = builder.max_seq_len(max_seq_len).blocks(blocks).build()?;
        let mut cache = pool.cache_with(&CacheOptions::default().batch(batch_size));
        // A pool that was built has its layer.
        cache.layers.pop().ok_or(KvError::Zero("layers"))
    }

    /// Adds the keys, after the rotary embedding, and values of new tokens, each `[B, H_kv, T, D]` in the cache's type. In place:
    /// nothing that is there is copied.
    ///
    /// They come after all that the layer has. An engine that goes back, or begins another sequence, says so before its pass:
    /// see [`PagedKVCache::begin_pass`].
    ///
    /// # Errors
    ///
    /// [`KvError`] when a shape, batch, type or device is wrong, the cache would be longer than `max_seq_len`
    /// ([`KvError::Overflow`]), the pool is full ([`KvError::OutOfBlocks`]), or another layer attends at this moment
    /// ([`KvError::Busy`]). The cache is then as it was.
    pub fn append(&mut self, k_new: &Tensor, v_new: &Tensor) -> Result<()> {
        let rows = self.pool.0.taken.rows(k_new, v_new, false)?;
        let mut sequence = self.shared.lock();
        if rows.batch != sequence.batch {
            let (k, v) = (k_new.dims().to_vec(), v_new.dims().to_vec());
            return Err(KvError::Batch { expected: sequence.batch, got: rows.batch, k, v });
        }
        sequence.append(self.layer, &rows)
    }

    /// Attends with the last `T` tokens of the layer, `q [B, n * H_kv, T, D]`, to all that they see of it:
    /// `softmax(scale * q kᵀ) v`, the same shape. Query head `h` reads key head `h / n` (grouped-query attention). With
    /// `causal` a token sees itself and those before it, without it all tokens.
    ///
    /// It takes the place of repeating keys and values, scores, mask, softmax and the second product; keys and values are read
    /// where they lie. The result is a view of `(B, T, heads, D)`: to go on with `[B, T, heads * D]`, transpose and reshape it,
    /// which copies nothing.
    ///
    /// # Errors
    ///
    /// [`KvError`] when q has another shape, type or device, or more tokens than the layer, or when one of them sees what a
    /// circular cache has given back: those of the last pass do not.
    pub fn attend(&self, q: &Tensor, scale: f32, causal: bool) -> Result<Tensor> {
        self.look(|view| view.attend(q, scale, causal))
    }

    /// A copy of the keys, `[B, H_kv, seq_len, D]`; of a circular cache those that its last token sees.
    ///
    /// # Errors
    ///
    /// When the tensor library refuses.
    pub fn keys(&self) -> Result<Tensor> {
        Ok(self.look(View::keys_and_values)?.0.transpose(1, 2)?.contiguous()?)
    }

    /// A copy of the values, as [`keys`](Self::keys).
    ///
    /// # Errors
    ///
    /// When the tensor library refuses.
    pub fn values(&self) -> Result<Tensor> {
        Ok(self.look(View::keys_and_values)?.1.transpose(1, 2)?.contiguous()?)
    }

    /// How many tokens the layer has: the position of the next one.
    pub fn seq_len(&self) -> usize {
        self.shared.lock().len(self.layer)
    }

    /// How long the cache may become, or how far it sees if it is circular.
    pub fn max_seq_len(&self) -> usize {
        self.pool.max_seq_len()
    }

    /// Heads of keys and values.
    pub fn n_kv_heads(&self) -> usize {
        self.pool.shape().kv_heads
    }

    /// Forgets the layer's tokens. Blocks are given back when all layers have been cleared.
    pub fn clear(&mut self) {
        // There is nothing that going back to the beginning would see.
        drop(self.shared.lock().truncate_layer(self.layer, 0));
    }

    /// Looks at what the layer holds, without keeping anybody waiting.
    fn look<T>(&self, with: impl FnOnce(&View) -> Result<T>) -> Result<T> {
        let view = self.shared.lock().view(self.layer)?;
        let result = with(&view);
        drop(view);
        // What could not be given back meanwhile goes now; whether it did is nothing to the one who looked.
        drop(self.shared.lock().tidy());
        result
    }
}
