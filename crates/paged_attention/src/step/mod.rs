//! The step: one forward pass over a batch of sequences.

mod attend;
mod rows;

use std::sync::atomic::AtomicBool;

use block_table::BlockTable;
use smallvec::SmallVec;

use crate::layers::Layers;
use crate::plan::Plan;
use crate::{CommitError, KvCache, PushError, PushOptions};

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
    /// The layers that have the keys and values of the new tokens.
    written: Layers,
    /// The layers that were declared to stay unwritten.
    left_unwritten: Layers,
}

#[derive(Debug)]
struct Pushed<'t> {
    table: &'t mut BlockTable,
    /// The last of its rows, as many as logits are wanted of.
    logits: usize,
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
            left_unwritten: Layers::none_of(cache.layers()),
        }
    }

    /// Adds a sequence with its next tokens: a whole prompt, a chunk of a prompt, or the token that was just sampled.
    ///
    /// [`push_with`](Self::push_with) has options: tokens that see each other, and which logits are wanted.
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
        self.push_with(table, tokens, &PushOptions::default())
    }

    /// As [`push`](Self::push), with options.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), and [`PushError::Bidirectional`] when a range of tokens that see each other is empty,
    /// goes beyond the tokens, or overlaps another one.
    pub fn push_with(
        &mut self,
        table: &'t mut BlockTable,
        tokens: &[u32],
        options: &PushOptions,
    ) -> std::result::Result<(), PushError> {
        if *self.started.get_mut() {
            return Err(PushError::Started);
        }
        if tokens.is_empty() {
            return Err(PushError::NoTokens);
        }
        if !table.pool().is_same(self.cache.pool()) {
            return Err(PushError::ForeignTable);
        }
        let bidirectional = options.checked_ranges(tokens.len())?;
        table.reserve(tokens.len())?;
        for plan in &mut self.plans {
            plan.push(table, tokens.len(), &bidirectional);
        }
        self.token_ids.extend_from_slice(tokens);
        self.pushed.push(Pushed { table, logits: options.logits_of(tokens.len()) });
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
        for (Pushed { table, .. }, planned) in all.into_iter().zip(&self.plans[0].sequences) {
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
        for ((Pushed { table, .. }, planned), accepted) in
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
        let done = Layers::none_of(self.cache.layers());
        done.insert_all(&self.written);
        done.insert_all(&self.left_unwritten);
        match done.first_missing() {
            Some(layer) if !self.pushed.is_empty() => Err(CommitError::Unwritten { layer, layers: done.layers() }),
            _ => Ok(()),
        }
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        for Pushed { table, .. } in &mut self.pushed {
            table.roll_back();
        }
        // The recorder is the host's code. If it panicked while another panic unwinds, the process would abort.
        if !std::thread::panicking() {
            self.cache.record_metrics();
        }
    }
}
