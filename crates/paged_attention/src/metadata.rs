//! What kernels of others take to read and write the blocks of a step.

use candle_core::{Device, Result, Tensor};

use crate::plan::{Plan, Planned};

/// The metadata of one step in the layers of one group, for kernels of others: where to write new keys and values, and
/// where each sequence's blocks are. Each is a tensor on the cache's device; `docs/kernels.md` has a table of which
/// kernel takes which. Together with the views of the blocks ([`KvCache::nhd_views`](crate::KvCache::nhd_views)) they
/// are all that a kernel needs.
///
/// Numbers are u32, which have the same bits as the i32 that most kernels declare (candle has no i32 before 0.10);
/// slots are i64, as in vLLM. In a group with a window, the entry of a block that the window has passed is 0. A kernel
/// with the same window does not read it.
#[derive(Debug, Clone, Copy)]
pub struct StepMetadata<'s> {
    plan: &'s Plan,
    block_size: usize,
    device: &'s Device,
}

impl<'s> StepMetadata<'s> {
    pub(crate) fn new(plan: &'s Plan, block_size: usize, device: &'s Device) -> Self {
        Self { plan, block_size, device }
    }

    /// The slot of each new token, `block * block_size + offset`: `(tokens)` of i64 (vLLM's `slot_mapping`).
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn slot_mapping(&self) -> Result<Tensor> {
        let slots: Vec<i64> = self.plan.slot_mapping.iter().map(|&slot| slot.into()).collect();
        Tensor::new(slots, self.device)
    }

    /// The blocks of each sequence, in the order of its positions, filled up with zeros: `(sequences, most blocks)` of
    /// u32 (vLLM's and candle-flash-attn's block table).
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn block_tables(&self) -> Result<Tensor> {
        let lists: Vec<Vec<u32>> = self.plan.sequences.iter().map(|planned| self.blocks_of(planned)).collect();
        let most = lists.iter().map(Vec::len).max().unwrap_or(0);
        let padded = lists.iter().flat_map(|list| list.iter().copied().chain(std::iter::repeat(0)).take(most));
        Tensor::from_vec(padded.collect::<Vec<_>>(), (lists.len(), most), self.device)
    }

    /// The blocks of all sequences, one after another: u32 (FlashInfer's `paged_kv_indices`).
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn kv_indices(&self) -> Result<Tensor> {
        let blocks: Vec<u32> = self.plan.sequences.iter().flat_map(|planned| self.blocks_of(planned)).collect();
        Tensor::new(blocks, self.device)
    }

    /// Where each sequence's blocks begin in [`kv_indices`](Self::kv_indices), and where the last one's end:
    /// `(sequences + 1)` of u32 (FlashInfer's `paged_kv_indptr`).
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn kv_indptr(&self) -> Result<Tensor> {
        self.cumulative(|planned| planned.len().div_ceil(self.block_size))
    }

    /// How many tokens are in each sequence's last block: `(sequences)` of u32 (FlashInfer's `paged_kv_last_page_len`).
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn kv_last_page_len(&self) -> Result<Tensor> {
        self.of_each(|planned| (planned.len() - 1) % self.block_size + 1)
    }

    /// How many tokens each sequence has, the new ones included: `(sequences)` of u32 (vLLM's `seq_lens`).
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn context_lens(&self) -> Result<Tensor> {
        self.of_each(Planned::len)
    }

    /// The sums of the context lengths before each sequence, and of all: `(sequences + 1)` of u32 (candle-flash-attn's
    /// `seqlens_k`).
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn cu_context_lens(&self) -> Result<Tensor> {
        self.cumulative(Planned::len)
    }

    /// How many new tokens each sequence has: `(sequences)` of u32.
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn query_lens(&self) -> Result<Tensor> {
        self.of_each(|planned| planned.rows.len())
    }

    /// Where each sequence's rows begin, and where the last one's end: `(sequences + 1)` of u32 (vLLM's
    /// `query_start_loc`, FlashInfer's `qo_indptr`, candle-flash-attn's `seqlens_q`).
    ///
    /// # Errors
    ///
    /// The error of the device.
    pub fn cu_query_lens(&self) -> Result<Tensor> {
        self.cumulative(|planned| planned.rows.len())
    }

    /// The largest context length; 0 without sequences.
    pub fn max_context_len(&self) -> usize {
        self.plan.sequences.iter().map(Planned::len).max().unwrap_or(0)
    }

    /// The largest number of new tokens of a sequence; 0 without sequences.
    pub fn max_query_len(&self) -> usize {
        self.plan.sequences.iter().map(|planned| planned.rows.len()).max().unwrap_or(0)
    }

    /// The blocks of a sequence, 0 for those that were freed.
    fn blocks_of(&self, planned: &Planned) -> Vec<u32> {
        let own = &self.plan.blocks[planned.blocks.clone()];
        let block = |logical| planned.index_of(logical).and_then(|index| own.get(index)).copied().unwrap_or(0);
        (0..planned.len().div_ceil(self.block_size)).map(block).collect()
    }

    fn of_each(&self, number: impl Fn(&Planned) -> usize) -> Result<Tensor> {
        let numbers: Vec<u32> = self.plan.sequences.iter().map(|planned| number(planned) as u32).collect();
        Tensor::new(numbers, self.device)
    }

    fn cumulative(&self, number: impl Fn(&Planned) -> usize) -> Result<Tensor> {
        let mut sums = vec![0];
        for planned in &self.plan.sequences {
            sums.push(sums[sums.len() - 1] + number(planned) as u32);
        }
        Tensor::new(sums, self.device)
    }
}
