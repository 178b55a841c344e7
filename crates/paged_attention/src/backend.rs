//! The ways to compute over a plan: on a CPU, fused, or with plain tensor operations on any device.

use block_pool::{KvLayout, KvShape, Order};
use candle_core::{Result, Tensor};

use crate::plan::Plan;
use crate::{Attention, Kernel, cpu, gather};

/// One layer of a cache.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    /// `(blocks, numbers of a block)`
    pub(crate) tensor: &'a Tensor,
    pub(crate) layout: &'a KvLayout,
    /// For the fused backend.
    pub(crate) kernel: Kernel,
    /// The group of layers that it is in, and the shape of that.
    pub(crate) group: usize,
    pub(crate) shape: KvShape,
}

/// A way to compute.
trait Compute {
    /// Writes k and v `(tokens, kv_heads, head_dim)` to the slots of the plan.
    fn write(&self, layer: Layer<'_>, plan: &Plan, k: &Tensor, v: &Tensor) -> Result<()>;

    /// Copies the first `len` tokens of these blocks: k and v, each `(len, kv_heads, head_dim)`.
    fn read(&self, layer: Layer<'_>, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)>;

    /// Attends with q `(tokens, heads, head_dim)` to all tokens of each sequence.
    fn attend(&self, layer: Layer<'_>, plan: &Plan, q: &Tensor, heads: usize, attention: &Attention) -> Result<Tensor>;
}

struct Fused;
struct Gather;

impl Compute for Fused {
    fn write(&self, layer: Layer<'_>, plan: &Plan, k: &Tensor, v: &Tensor) -> Result<()> {
        cpu::write(layer.tensor, k, v, layer.layout, plan)
    }

    fn read(&self, layer: Layer<'_>, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
        cpu::read(layer.tensor, layer.layout, blocks, len)
    }

    fn attend(&self, layer: Layer<'_>, plan: &Plan, q: &Tensor, heads: usize, attention: &Attention) -> Result<Tensor> {
        let Layer { tensor, layout, kernel, .. } = layer;
        cpu::attend(tensor, q, &cpu::Call { layout, plan, heads, attention, kernel })
    }
}

impl Compute for Gather {
    fn write(&self, layer: Layer<'_>, plan: &Plan, k: &Tensor, v: &Tensor) -> Result<()> {
        gather::write(layer.tensor, layer.layout, plan, k, v)
    }

    fn read(&self, layer: Layer<'_>, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
        gather::gather(layer.tensor, layer.layout, blocks, len)
    }

    fn attend(&self, layer: Layer<'_>, plan: &Plan, q: &Tensor, _: usize, attention: &Attention) -> Result<Tensor> {
        gather::attend(layer.tensor, layer.layout, plan, q, attention)
    }
}

impl Layer<'_> {
    /// Blocks in the order of panels are read by the CPU's kernels, others by tensor operations.
    fn compute(&self) -> &'static dyn Compute {
        match self.layout.order {
            Order::Panels | Order::QuadPanels => &Fused,
            Order::Nhd => &Gather,
        }
    }

    /// As [`Compute::write`].
    pub(crate) fn write(self, plan: &Plan, k: &Tensor, v: &Tensor) -> Result<()> {
        self.compute().write(self, plan, k, v)
    }

    /// As [`Compute::read`].
    pub(crate) fn read(self, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
        self.compute().read(self, blocks, len)
    }

    /// As [`Compute::attend`].
    pub(crate) fn attend(self, plan: &Plan, q: &Tensor, heads: usize, attention: &Attention) -> Result<Tensor> {
        self.compute().attend(self, plan, q, heads, attention)
    }
}
