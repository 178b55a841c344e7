//! The rows of a step: what a model needs to know about them, and what kernels of others do.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{Pushed, Step};
use crate::plan::Planned;
use crate::{Attention, StepMetadata};

impl Step<'_> {
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
    /// [`AttendError::EmptyStep`](crate::AttendError::EmptyStep), wrapped, when no sequence was pushed: not every
    /// operation of candle takes a tensor without rows. The error of the device.
    pub fn token_ids(&self) -> Result<Tensor> {
        self.checked_rows()?;
        Tensor::new(self.token_ids.as_slice(), self.cache.device())
    }

    /// The position of each new token in its sequence: `(tokens)` of u32, the input of the rotary embedding.
    ///
    /// # Errors
    ///
    /// As [`token_ids`](Self::token_ids).
    pub fn positions(&self) -> Result<Tensor> {
        self.checked_rows()?;
        let positions =
            |planned: &Planned| (planned.dropped + planned.start) as u32..(planned.dropped + planned.len()) as u32;
        let positions: Vec<u32> = self.plans[0].sequences.iter().flat_map(positions).collect();
        Tensor::new(positions, self.cache.device())
    }

    /// The rows of a sequence in the step's tensors, by the order in which the sequences were pushed; `None` if there
    /// are fewer.
    pub fn rows_of(&self, sequence: usize) -> Option<Range<usize>> {
        self.plans[0].sequences.get(sequence).map(|planned| planned.rows.clone())
    }

    /// The rows whose logits are wanted, sequence after sequence: `(rows)` of u32, by which a model selects what its
    /// head computes. They are the last row of each sequence, or what its [options](crate::PushOptions) ask for. There
    /// can be none.
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn logits_rows(&self) -> Result<Tensor> {
        let rows = self.pushed.iter().zip(&self.plans[0].sequences);
        let rows =
            rows.flat_map(|(pushed, planned)| (planned.rows.end - pushed.logits) as u32..planned.rows.end as u32);
        Tensor::new(rows.collect::<Vec<_>>(), self.cache.device())
    }

    /// Where the logits of a sequence are among those of all [`logits_rows`](Self::logits_rows); `None` if there are
    /// fewer sequences.
    pub fn logits_of(&self, sequence: usize) -> Option<Range<usize>> {
        let wanted = |pushed: &[Pushed<'_>]| pushed.iter().map(|pushed| pushed.logits).sum();
        let first: usize = wanted(self.pushed.get(..sequence)?);
        Some(first..first + self.pushed.get(sequence)?.logits)
    }

    /// How many tokens this attention reads with those of another sequence: the fused backend reads what sequences with
    /// at most 32 new tokens have in common once for all of them, in whole chunks of 512 tokens, if it is
    /// [long enough](Attention::shared_reads_from), as far as they see it. (More than some 32 rows, new tokens times
    /// query heads per key head, are bound by arithmetic and are computed for each sequence.)
    ///
    /// # Errors
    ///
    /// [`AttendError::NoLayer`](crate::AttendError::NoLayer), wrapped, when the layer does not exist.
    pub fn shared_tokens(&self, layer: usize, attention: &Attention) -> Result<usize> {
        let target = self.cache.layer(layer)?;
        let (plan, block_size) = (&self.plans[target.group], target.layout.block_size);
        Ok(plan.shared(block_size, attention.shared_reads_from).tokens(plan, block_size))
    }

    /// What kernels of others take to read and write one layer of this step: slot mapping, block tables, lengths. It is
    /// the same for all layers of a group.
    ///
    /// # Errors
    ///
    /// [`AttendError::NoLayer`](crate::AttendError::NoLayer), wrapped, when the layer does not exist.
    pub fn metadata(&self, layer: usize) -> Result<StepMetadata<'_>> {
        let target = self.cache.layer(layer)?;
        Ok(StepMetadata::new(&self.plans[target.group], target.layout.block_size, self.cache.device()))
    }
}
