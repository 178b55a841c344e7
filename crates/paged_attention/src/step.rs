//! The step: one forward pass over a batch of sequences.

use std::sync::atomic::{AtomicBool, Ordering};

use block_table::BlockTable;
use candle_core::{Result, Tensor};
use smallvec::SmallVec;

use crate::layers::Layers;
use crate::plan::{Plan, Planned};
use crate::{AttendError, Attention, CommitError, KvCache, PushError, validate, wrap_error};

/// One forward pass over a batch of sequences, prefill and decode alike.
///
/// [`push`](Self::push) adds a sequence, each layer calls [`attend`](Self::attend) once, and [`commit`](Self::commit)
/// makes the new tokens part of their sequences, provided that every layer has been written. A step that is dropped
/// instead, by an early return or a panic, rolls every sequence back.
///
/// The step borrows its tables: code that pushes a table twice, or drops it during the step, does not compile.
///
/// ```compile_fail
/// # use paged_attention::{KvCache, KvShape};
/// # let shape = KvShape::new(1, 1, 4);
/// # let cache = KvCache::builder(shape).blocks(4).build().unwrap();
/// let mut table = cache.table();
/// let mut step = cache.step();
/// step.push(&mut table, &[1, 2]).unwrap();
/// drop(table); // error[E0505]: cannot move out of `table` because it is borrowed
/// step.commit().unwrap();
/// ```
#[derive(Debug)]
#[must_use = "dropping a step rolls its sequences back"]
pub struct Step<'t> {
    cache: KvCache,
    pushed: Vec<Pushed<'t>>,
    /// One for each group of layers. The rows are the same in all of them.
    plans: SmallVec<[Plan; 1]>,
    token_ids: Vec<u32>,
    /// Whether a layer has been written. From then on no sequence can join.
    started: AtomicBool,
    /// The layers that have the keys and values of the new tokens, or were declared to stay unwritten.
    written: Layers,
}

#[derive(Debug)]
struct Pushed<'t> {
    table: &'t mut BlockTable,
}

impl<'t> Step<'t> {
    pub(crate) fn new(cache: &KvCache) -> Self {
        Self {
            cache: cache.clone(),
            pushed: Vec::new(),
            plans: (0..cache.groups().len()).map(Plan::of_group).collect(),
            token_ids: Vec::new(),
            started: AtomicBool::new(false),
            written: Layers::none_of(cache.layers()),
        }
    }

    /// Adds a sequence with its next tokens: a whole prompt, a chunk of a prompt, or the token that was just sampled.
    ///
    /// Reserves slots for the tokens: allocates the blocks that they need, and copies the last block if the tokens
    /// begin inside it and it is shared or cached.
    ///
    /// The tokens identify what is computed: two sequences with the same salt and the same tokens end up sharing the
    /// blocks of one of them. If tokens alone do not identify the input, as with embeddings, give the table a
    /// [`Salt`](crate::Salt), or make it [`private`](crate::TableOptions::private).
    ///
    /// # Errors
    ///
    /// - [`PushError::OutOfBlocks`] when the pool has too few available blocks.
    /// - [`PushError::Storage`] when the copy of the last block fails.
    /// - [`PushError::NoTokens`] when `tokens` is empty.
    /// - [`PushError::ForeignTable`] when the table belongs to another pool.
    /// - [`PushError::Started`] when a layer of the step has been written.
    ///
    /// After any error the sequence, the step and the pool are unchanged, and the step can go on with the sequences it
    /// has.
    pub fn push(&mut self, table: &'t mut BlockTable, tokens: &[u32]) -> std::result::Result<(), PushError> {
        if *self.started.get_mut() {
            return Err(PushError::Started);
        }
        if tokens.is_empty() {
            return Err(PushError::NoTokens);
        }
        if !table.pool().is_same(self.cache.pool()) {
            return Err(PushError::ForeignTable);
        }
        table.reserve(tokens.len())?;
        for plan in &mut self.plans {
            plan.push(table, tokens.len());
        }
        self.token_ids.extend_from_slice(tokens);
        self.pushed.push(Pushed { table });
        Ok(())
    }

    /// The number of sequences in the step.
    pub fn sequences(&self) -> usize {
        self.pushed.len()
    }

    /// The number of new tokens of all sequences together: the rows of `q`, `k` and `v`.
    pub fn tokens(&self) -> usize {
        self.plans[0].rows()
    }

    /// The ids of the new tokens, sequence after sequence: `(tokens)` of u32, the input of the embedding.
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn token_ids(&self) -> Result<Tensor> {
        Tensor::new(self.token_ids.as_slice(), self.cache.device())
    }

    /// The position of each new token in its sequence: `(tokens)` of u32, the input of the rotary embedding.
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn positions(&self) -> Result<Tensor> {
        let positions =
            |planned: &Planned| (planned.dropped + planned.start) as u32..(planned.dropped + planned.len()) as u32;
        let positions: Vec<u32> = self.plans[0].sequences.iter().flat_map(positions).collect();
        Tensor::new(positions, self.cache.device())
    }

    /// The row of the last token of each sequence: `(sequences)` of u32. The logits of these rows are sampled from.
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn last_rows(&self) -> Result<Tensor> {
        let rows: Vec<u32> = self.plans[0].sequences.iter().map(|planned| planned.rows.end as u32 - 1).collect();
        Tensor::new(rows, self.cache.device())
    }

    /// Writes the keys and values of the new tokens to one layer, and attends to all tokens of each sequence.
    ///
    /// | tensor | shape |
    /// |---|---|
    /// | `q` and the result | `(tokens, heads, head_dim)` |
    /// | `k`, `v` | `(tokens, kv_heads, head_dim)` |
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
    pub fn attend(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor, attention: &Attention) -> Result<Tensor> {
        let _span =
            tracing::trace_span!("attend", layer, tokens = self.tokens(), sequences = self.sequences()).entered();
        let target = self.cache.layer(layer)?;
        let heads = validate::queries(target, self.rows()?, q, k, attention)?;
        self.fill(layer, k, v)?;
        let attended = target.attend(&self.plans[target.group], q, heads, attention)?;
        self.written.insert(layer);
        Ok(attended)
    }

    /// Writes the keys and values of the new tokens to one layer, both `(tokens, kv_heads, head_dim)`, without
    /// attention: for layers whose attention is computed elsewhere.
    ///
    /// # Errors
    ///
    /// As [`attend`](Self::attend).
    pub fn write(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.fill(layer, k, v)?;
        self.written.insert(layer);
        Ok(())
    }

    /// Writes keys and values to a layer. The layer counts as not written from the first change on; the caller marks it
    /// as written when all its work has succeeded.
    fn fill(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let target = self.cache.layer(layer)?;
        validate::keys_and_values(target, self.rows()?, k, v)?;
        self.started.store(true, Ordering::Relaxed);
        self.written.remove(layer);
        target.write(&self.plans[target.group], k, v)
    }

    /// The number of new tokens.
    fn rows(&self) -> Result<usize> {
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
        let declared = Layers::none_of(self.written.layers());
        for layer in layers {
            if !declared.insert(layer) {
                return Err(wrap_error(AttendError::NoLayer { layer, layers: declared.layers() }));
            }
        }
        self.written.insert_all(&declared);
        Ok(())
    }

    /// Makes the new tokens part of their sequences. Blocks that became full are cached: other sequences can match them
    /// as a prefix.
    ///
    /// # Errors
    ///
    /// [`CommitError::Unwritten`] when a layer has neither been written nor [declared to stay
    /// unwritten](Self::leave_unwritten). Every sequence is rolled back then. A step without sequences has nothing to
    /// write, so its commit succeeds.
    pub fn commit(mut self) -> std::result::Result<(), CommitError> {
        self.check_written()?;
        let all = std::mem::take(&mut self.pushed);
        for (Pushed { table }, planned) in all.into_iter().zip(&self.plans[0].sequences) {
            let committed = table.commit_tokens(&self.token_ids[planned.rows.clone()]);
            debug_assert!(committed.is_ok(), "`push` has reserved the slots");
        }
        Ok(())
    }

    /// Makes only the first `accepted[i]` new tokens of sequence `i` part of it, and rolls the rest back: for
    /// speculative decoding, where the model accepts some of the drafted tokens. `accepted` has one number for each
    /// sequence, in the order in which the sequences were pushed.
    ///
    /// # Errors
    ///
    /// - [`CommitError::Sequences`] when the number of counts differs from the number of sequences.
    /// - [`CommitError::Tokens`] when more tokens of a sequence are accepted than were pushed.
    /// - [`CommitError::Unwritten`] as for [`commit`](Self::commit), whatever was accepted.
    ///
    /// Every sequence is rolled back then.
    pub fn commit_accepted(mut self, accepted: &[usize]) -> std::result::Result<(), CommitError> {
        if accepted.len() != self.pushed.len() {
            return Err(CommitError::Sequences { accepted: accepted.len(), pushed: self.pushed.len() });
        }
        let spans = self.plans[0].sequences.iter();
        for (sequence, (planned, &accepted)) in spans.zip(accepted).enumerate() {
            if accepted > planned.rows.len() {
                return Err(CommitError::Tokens { sequence, accepted, pushed: planned.rows.len() });
            }
        }
        self.check_written()?;
        for ((Pushed { table }, planned), accepted) in
            self.pushed.iter_mut().zip(&self.plans[0].sequences).zip(accepted)
        {
            let tokens = &self.token_ids[planned.rows.clone()][..*accepted];
            let committed = table.commit_tokens(tokens);
            debug_assert!(committed.is_ok(), "`push` has reserved the slots");
        }
        // Dropping the step rolls back the tokens that were not accepted.
        Ok(())
    }

    /// Checks that every layer was written: other sequences can read every layer of committed tokens.
    fn check_written(&self) -> std::result::Result<(), CommitError> {
        match self.written.first_missing() {
            Some(layer) if !self.pushed.is_empty() => {
                Err(CommitError::Unwritten { layer, layers: self.written.layers() })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        for Pushed { table } in &mut self.pushed {
            table.roll_back();
        }
        // The recorder is the host's code. If it panicked while another panic unwinds, the process would abort.
        if !std::thread::panicking() {
            self.cache.record_metrics();
        }
    }
}
