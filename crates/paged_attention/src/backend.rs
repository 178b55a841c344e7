//! The ways to compute over a plan: on a CPU, fused, or with plain tensor operations on any device.

use block_pool::{KvLayout, Order};
use candle_core::{Result, Tensor};

use crate::plan::Plan;
use crate::{Attention, Kernel, cpu, gather};

/// One layer of keys and values.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    /// `(blocks, numbers of a block)`
    pub(crate) tensor: &'a Tensor,
    pub(crate) layout: &'a KvLayout,
    /// For the fused backend.
    pub(crate) kernel: Kernel,
    /// The group of layers that it is in.
    pub(crate) group: usize,
}

/// What attention over a plan is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    pub(crate) plan: &'a Plan,
    /// `(tokens, heads, head_dim)`.
    pub(crate) q: &'a Tensor,
    pub(crate) heads: usize,
    pub(crate) attention: &'a Attention,
}

/// A way to compute.
trait Compute {
    /// Writes k `(tokens, kv_heads, head_dim)` and v `(tokens, kv_heads, value_dim)` to the slots of the plan. There is
    /// no v if the values are in the keys.
    fn write(&self, layer: Layer<'_>, plan: &Plan, k: &Tensor, v: Option<&Tensor>) -> Result<()>;

    /// Copies the first `len` tokens of these blocks: k `(len, kv_heads, head_dim)` and v `(len, kv_heads, value_dim)`.
    fn read(&self, layer: Layer<'_>, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)>;

    /// Attends to all tokens of each sequence: `(tokens, heads, value_dim)`, in the type of q.
    fn attend(&self, layer: Layer<'_>, queries: Queries<'_>) -> Result<Tensor>;

    /// The same, and the natural logarithm of the sum of weights of each row and head, `(tokens, heads)` in f32.
    fn attend_with_lse(&self, layer: Layer<'_>, queries: Queries<'_>) -> Result<(Tensor, Tensor)>;
}

struct Fused;
struct Gather;

impl Compute for Fused {
    fn write(&self, layer: Layer<'_>, plan: &Plan, k: &Tensor, v: Option<&Tensor>) -> Result<()> {
        cpu::write(layer.tensor, k, v, layer.layout, plan)
    }

    fn read(&self, layer: Layer<'_>, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
        cpu::read(layer.tensor, layer.layout, blocks, len)
    }

    fn attend(&self, layer: Layer<'_>, queries: Queries<'_>) -> Result<Tensor> {
        cpu::attend(layer.tensor, queries.q, &layer.call(&queries))
    }

    fn attend_with_lse(&self, layer: Layer<'_>, queries: Queries<'_>) -> Result<(Tensor, Tensor)> {
        cpu::attend_with_lse(layer.tensor, queries.q, &layer.call(&queries))
    }
}

impl Compute for Gather {
    fn write(&self, layer: Layer<'_>, plan: &Plan, k: &Tensor, v: Option<&Tensor>) -> Result<()> {
        gather::write(layer.tensor, layer.layout, plan, k, v)
    }

    fn read(&self, layer: Layer<'_>, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
        gather::gather(layer.tensor, layer.layout, blocks, len)
    }

    fn attend(&self, layer: Layer<'_>, Queries { plan, q, attention, .. }: Queries<'_>) -> Result<Tensor> {
        gather::attend(layer.tensor, layer.layout, plan, q, attention).map(|(out, _)| out)
    }

    fn attend_with_lse(&self, layer: Layer<'_>, queries: Queries<'_>) -> Result<(Tensor, Tensor)> {
        gather::attend(layer.tensor, layer.layout, queries.plan, queries.q, queries.attention)
    }
}

impl<'a> Layer<'a> {
    /// Blocks in the order of panels are read by the CPU's kernels, others by tensor operations.
    fn compute(&self) -> &'static dyn Compute {
        match self.layout.order {
            Order::Panels | Order::QuadPanels => &Fused,
            Order::Nhd => &Gather,
        }
    }

    /// The parameters of a call of the fused backend.
    pub(crate) fn call(self, &Queries { plan, heads, attention, .. }: &Queries<'a>) -> cpu::Call<'a> {
        cpu::Call { layout: self.layout, plan, heads, attention, kernel: self.kernel }
    }

    /// As [`Compute::write`].
    pub(crate) fn write(self, plan: &Plan, k: &Tensor, v: Option<&Tensor>) -> Result<()> {
        self.compute().write(self, plan, k, v)
    }

    /// As [`Compute::read`].
    pub(crate) fn read(self, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
        self.compute().read(self, blocks, len)
    }

    /// As [`Compute::attend`].
    pub(crate) fn attend(self, queries: Queries<'_>) -> Result<Tensor> {
        self.compute().attend(self, queries)
    }

    /// As [`Compute::attend_with_lse`].
    pub(crate) fn attend_with_lse(self, queries: Queries<'_>) -> Result<(Tensor, Tensor)> {
        self.compute().attend_with_lse(self, queries)
    }
}
