//! What a step does in each layer: it writes the new tokens' keys and values, and attends.

use std::sync::atomic::Ordering;

use candle_core::{Result, Tensor};

use super::Step;
use crate::backend::{Layer, Queries};
use crate::layers::Layers;
use crate::{AttendError, Attention, validate, wrap_error};

impl Step<'_> {
    /// Writes the keys and values of the new tokens to one layer, and attends to all tokens of each sequence.
    ///
    /// | tensor | shape |
    /// |---|---|
    /// | `q` | `(tokens, heads, head_dim)` |
    /// | `k` | `(tokens, kv_heads, head_dim)` |
    /// | `v` | `(tokens, kv_heads, value_dim)`, or `None` if the values are in the keys ([`KvShape`](crate::KvShape)) |
    /// | the result | `(tokens, heads, value_dim)` |
    ///
    /// `heads` is a multiple of `kv_heads`: query head `h` reads key head `h / (heads / kv_heads)` (grouped-query
    /// attention, Ainslie et al. 2023). `q`, `k` and `v` have the same type: f32, f16 or bf16. The cache may store
    /// another type. The arithmetic is in f32. Attention does not apply positions: apply the rotary embedding to `q`
    /// and `k` before.
    ///
    /// With the fused backend, the threads of the current rayon pool ([`rayon::ThreadPool::install`], or the global
    /// pool) share the work with the caller. Several threads, or several tasks of one rayon pool, can compute steps of
    /// different sequences of one cache at the same time.
    ///
    /// # Errors
    ///
    /// [`AttendError`], wrapped, when the layer does not exist, a shape, dtype or device is wrong, or `attention` does
    /// not fit the query heads; nothing was written then. Otherwise the error of the device; the layer then counts as
    /// not written until a later call succeeds.
    pub fn attend<'v>(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: impl Into<Option<&'v Tensor>>,
        attention: &Attention,
    ) -> Result<Tensor> {
        self.write_and(layer, q, k, v.into(), attention, |layer, queries| layer.attend(queries))
    }

    /// As [`attend`](Self::attend). Returns also the natural logarithm of the sum of weights of each row and head
    /// (log-sum-exp), `(tokens, heads)` in f32, a sink logit included: with it, [`merge_states`](crate::merge_states)
    /// merges the result with attention over other tokens that was computed elsewhere. It is -inf if a row sees no
    /// token.
    ///
    /// # Errors
    ///
    /// As [`attend`](Self::attend).
    pub fn attend_with_lse<'v>(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: impl Into<Option<&'v Tensor>>,
        attention: &Attention,
    ) -> Result<(Tensor, Tensor)> {
        self.write_and(layer, q, k, v.into(), attention, |layer, queries| layer.attend_with_lse(queries))
    }

    /// Attends without writing, to a layer that this step has written: for a model layer that reads the keys and values
    /// of another one (Gemma 3n, Gemma 4, YOCO). `layer` is the one that was written; a layer without keys and values
    /// of its own is none of the cache's layers.
    ///
    /// `q` is `(tokens, heads, head_dim)`, the result `(tokens, heads, value_dim)`. Queries see what they would see in
    /// [`attend`](Self::attend), which may have been called with another number of heads and another [`Attention`].
    ///
    /// # Errors
    ///
    /// As [`attend`](Self::attend), and [`AttendError::NotWritten`], wrapped, when the layer has not been written in
    /// this step.
    pub fn attend_cached(&self, layer: usize, q: &Tensor, attention: &Attention) -> Result<Tensor> {
        self.read_and(layer, q, attention, |layer, queries| layer.attend(queries))
    }

    /// As [`attend_cached`](Self::attend_cached), with the logarithms that [`attend_with_lse`](Self::attend_with_lse)
    /// returns.
    ///
    /// # Errors
    ///
    /// As [`attend_cached`](Self::attend_cached).
    pub fn attend_cached_with_lse(&self, layer: usize, q: &Tensor, attention: &Attention) -> Result<(Tensor, Tensor)> {
        self.read_and(layer, q, attention, |layer, queries| layer.attend_with_lse(queries))
    }

    /// Writes the keys and values of the new tokens to one layer, k `(tokens, kv_heads, head_dim)` and v `(tokens,
    /// kv_heads, value_dim)`, without attention: for layers whose attention is computed elsewhere.
    ///
    /// # Errors
    ///
    /// As [`attend`](Self::attend).
    pub fn write<'v>(&self, layer: usize, k: &Tensor, v: impl Into<Option<&'v Tensor>>) -> Result<()> {
        self.fill(layer, k, v.into())?;
        self.written.insert(layer);
        Ok(())
    }

    fn write_and<T>(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: Option<&Tensor>,
        attention: &Attention,
        attend: impl FnOnce(Layer<'_>, Queries<'_>) -> Result<T>,
    ) -> Result<T> {
        let _span = self.span(layer);
        let target = self.cache.layer(layer)?;
        let heads = validate::queries(target, self.checked_rows()?, q, k, attention)?;
        self.fill(layer, k, v)?;
        let attended = attend(target, Queries { plan: &self.plans[target.group], q, heads, attention })?;
        self.written.insert(layer);
        Ok(attended)
    }

    fn read_and<T>(
        &self,
        layer: usize,
        q: &Tensor,
        attention: &Attention,
        attend: impl FnOnce(Layer<'_>, Queries<'_>) -> Result<T>,
    ) -> Result<T> {
        let _span = self.span(layer);
        let target = self.cache.layer(layer)?;
        let heads = validate::queries_alone(target, self.checked_rows()?, q, attention)?;
        if !self.written.contains(layer) {
            return Err(wrap_error(AttendError::NotWritten { layer }));
        }
        attend(target, Queries { plan: &self.plans[target.group], q, heads, attention })
    }

    fn span(&self, layer: usize) -> tracing::span::EnteredSpan {
        tracing::trace_span!("attend", layer, tokens = self.tokens(), sequences = self.sequences()).entered()
    }

    /// Writes keys and values to a layer. The layer counts as not written from the first change on; the caller marks it
    /// as written when all its work has succeeded.
    fn fill(&self, layer: usize, k: &Tensor, v: Option<&Tensor>) -> Result<()> {
        let target = self.cache.layer(layer)?;
        validate::keys_and_values(target, self.checked_rows()?, k, v)?;
        self.started.store(true, Ordering::Relaxed);
        self.written.remove(layer);
        self.left_unwritten.remove(layer);
        target.write(&self.plans[target.group], k, v)
    }

    /// The number of new tokens.
    pub(super) fn checked_rows(&self) -> Result<usize> {
        match self.plans[0].rows() {
            0 => Err(wrap_error(AttendError::EmptyStep)),
            rows => Ok(rows),
        }
    }

    /// Declares that these layers get no keys and values in this step, so that it can be committed without them: for a
    /// model that exits early or skips layers. It can be called at any time before the commit, also from inside the
    /// model's loop over its layers.
    ///
    /// The content of the step's tokens in these layers is arbitrary. No later step may attend to them there: not of
    /// the same sequence, and not of a sequence that shares its prefix. If some passes of a model write a layer and
    /// others do not, give their tables different [salts](crate::Salt).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use paged_attention::{KvCache, KvShape};
    /// # let cache = KvCache::builder(KvShape::new(12, 1, 4)).blocks(4).build()?;
    /// # let mut table = cache.table();
    /// # let x = Tensor::zeros((2, 1, 4), DType::F32, &Device::Cpu)?;
    /// let mut step = cache.step();
    /// step.push(&mut table, &[1, 2])?;
    /// for layer in 0..7 {
    ///     step.write(layer, &x, &x)?;
    /// }
    /// step.leave_unwritten(7..12)?;
    /// step.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AttendError::NoLayer`], wrapped, for the first layer that does not exist. No layer is declared then.
    pub fn leave_unwritten(&self, layers: impl IntoIterator<Item = usize>) -> Result<()> {
        let declared = Layers::none_of(self.cache.layers());
        for layer in layers {
            if !declared.insert(layer) {
                return Err(wrap_error(AttendError::NoLayer { layer, layers: declared.layers() }));
            }
        }
        self.left_unwritten.insert_all(&declared);
        Ok(())
    }
}
