//! The cache: a pool, the tensors that hold its blocks, and the kernel that attention uses.

use std::sync::Arc;

use block_pool::{BlockPool, KvDtype, KvShape, KvTensors, Order, PoolMetrics};
use block_table::{BlockTable, TableOptions};
use candle_core::{Device, Result, Tensor};

use crate::backend::Layer;
use crate::{AttendError, Kernel, KvCacheBuilder, LayerGroup, Step, wrap_error};

/// A paged KV cache. A clone is another handle to the same cache, and threads can share it.
///
/// Its layers are in one or more groups ([`LayerGroup`]). Most models have one: all layers have one shape, and see the
/// same tokens. With several groups, the pool counts in [units](Self::bytes_per_unit) instead of blocks.
#[derive(Debug, Clone)]
pub struct KvCache {
    pool: BlockPool,
    layers: Arc<CacheLayers>,
    kernel: Kernel,
    metrics: Arc<PoolMetrics>,
}

/// The layers of a cache.
#[derive(Debug)]
pub(crate) struct CacheLayers {
    /// The groups, each with the tensors of its layers.
    pub(crate) groups: Vec<(LayerGroup, KvTensors)>,
    /// For each layer, its group, and its index there.
    pub(crate) places: Vec<(usize, usize)>,
    pub(crate) bytes_per_unit: usize,
}

impl KvCache {
    /// A builder for a cache whose layers all have one shape. `shape` has the number of layers, the heads of keys and
    /// values, and their dimensions.
    pub fn builder(shape: KvShape) -> KvCacheBuilder {
        KvCacheBuilder::new(vec![LayerGroup::of(shape)])
    }

    /// A builder for a cache whose layers differ: in how far they look back, or in shape. Each layer is in one of the
    /// groups.
    ///
    /// Nothing else changes for a model: a sequence has one table and one length, a step has one
    /// [`attend`](Step::attend) for each layer. All groups share the memory, and a request fits or fails in all of them
    /// together.
    ///
    /// Each group reserves addresses for all of the memory, and the system provides the memory itself when blocks are
    /// written. What a group does not need any more goes back to the system when another one needs it: on Linux, in
    /// whole pages, and not while blocks are [poisoned](KvCacheBuilder::poison).
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use paged_attention::{Attention, KvCache, LayerGroup, Window};
    ///
    /// let full = LayerGroup::new([2], 1, 8);
    /// let windowed = LayerGroup::new([0, 1], 2, 8).window(Window::new(32));
    /// let cache = KvCache::builder_of([full, windowed]).memory(1 << 20).build()?;
    ///
    /// let mut table = cache.table();
    /// let mut step = cache.step();
    /// step.push(&mut table, &[1; 100])?;
    /// for (layer, kv_heads) in [2, 2, 1].into_iter().enumerate() {
    ///     let rows = |heads| Tensor::zeros((100, heads, 8), DType::F32, &Device::Cpu);
    ///     step.attend(layer, &rows(4)?, &rows(kv_heads)?, &rows(kv_heads)?, &Attention::scaled_by(8))?;
    /// }
    /// step.commit()?;
    /// let blocks = [0, 1].map(|group| table.blocks_of_group(group).len());
    /// assert_eq!(blocks, [7, 3]); // the window has passed four blocks
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn builder_of(groups: impl IntoIterator<Item = LayerGroup>) -> KvCacheBuilder {
        KvCacheBuilder::new(groups.into_iter().collect())
    }

    pub(crate) fn from_parts(pool: BlockPool, layers: CacheLayers, kernel: Kernel, metrics: PoolMetrics) -> Self {
        Self { pool, layers: Arc::new(layers), kernel, metrics: Arc::new(metrics) }
    }

    /// The table of a new, empty sequence. Call [`BlockTable::match_prefix`] before the prompt is computed, to start
    /// with the cached blocks of its longest prefix.
    pub fn table(&self) -> BlockTable {
        BlockTable::new(&self.pool)
    }

    /// The table of a new, empty sequence with options: a window, a salt that must match for prefixes to be shared, or
    /// private prefixes.
    pub fn table_with(&self, options: &TableOptions) -> BlockTable {
        BlockTable::with_options(&self.pool, options)
    }

    /// A new step: one forward pass over any number of sequences.
    pub fn step<'t>(&self) -> Step<'t> {
        Step::new(self)
    }

    /// The pool of blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The number of layers, of all groups together.
    pub fn layers(&self) -> usize {
        self.layers.places.len()
    }

    /// The groups of layers. Their indices are those of the pool's groups.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &LayerGroup> {
        self.layers.groups.iter().map(|(group, _)| group)
    }

    /// The index of the group that a layer is in; `None` if the layer does not exist.
    pub fn group_of(&self, layer: usize) -> Option<usize> {
        self.layers.places.get(layer).map(|&(group, _)| group)
    }

    /// The number of layers, and the heads and dimensions of keys and values; of the first group, if there are several.
    pub fn shape(&self) -> KvShape {
        self.first().0.shape()
    }

    /// The type in which keys and values are stored; in the first group, if there are several.
    pub fn dtype(&self) -> KvDtype {
        self.first().1.dtype()
    }

    /// The device that holds the keys and values.
    pub fn device(&self) -> &Device {
        self.first().1.device()
    }

    /// What the bytes of the blocks depend on, besides the model and its rotary parameters: the shapes, types, orders and
    /// spans of the groups, the tokens in a block, and the kernel, whose rounding later layers see. Blocks of two caches
    /// with equal strings can be exchanged, for example through a [`Tier`](crate::Tier). The string itself may change
    /// with any version.
    pub fn block_identity(&self) -> String {
        let block_size = self.pool.block_size();
        let mut identity = format!("paged_attention {} {:?} {block_size}", env!("CARGO_PKG_VERSION"), self.kernel);
        for (group, tensors) in &self.layers.groups {
            identity += &format!("\n{group:?} {} {:?}", tensors.dtype(), tensors.layout());
        }
        identity
    }

    /// The size in bytes of one block over all layers; of one block of each group, if there are several.
    pub fn bytes_per_block(&self) -> usize {
        self.layers.groups.iter().map(|(_, tensors)| tensors.bytes_per_block()).sum()
    }

    /// The size in bytes of a unit of the pool: a block, or with several groups, the largest size that all their blocks
    /// are a multiple of.
    pub fn bytes_per_unit(&self) -> usize {
        self.layers.bytes_per_unit
    }

    /// The tensor of one layer, `(blocks, elements of a block)`, for your own kernels. `docs/layout.md` has the order
    /// of the elements. Reading is always safe; write only to blocks that your own tables use.
    ///
    /// # Errors
    ///
    /// When the layer does not exist.
    pub fn tensor(&self, layer: usize) -> Result<&Tensor> {
        Ok(self.layer(layer)?.tensor)
    }

    /// The keys and the values of one layer as views for kernels of others: `(blocks, block_size, kv_heads, head_dim)`
    /// and `(blocks, block_size, kv_heads, value_dim)`, in the order NHD ([`Order::Nhd`]). A cache has it on every
    /// device but a CPU, and on a CPU with [`Backend::Gather`](crate::Backend::Gather). [`Step::metadata`] has the
    /// tables.
    ///
    /// # Errors
    ///
    /// When the layer does not exist, or its blocks are in another order.
    pub fn nhd_views(&self, layer: usize) -> Result<(Tensor, Tensor)> {
        let Some(&(group, index)) = self.layers.places.get(layer) else {
            return Err(wrap_error(AttendError::NoLayer { layer, layers: self.layers() }));
        };
        self.layers.groups[group].1.nhd_views(index)
    }

    pub(crate) fn layer(&self, layer: usize) -> Result<Layer<'_>> {
        let found = self.layers.places.get(layer).and_then(|&(group, index)| {
            let (_, tensors) = &self.layers.groups[group];
            let (tensor, layout) = (tensors.layer(index)?, tensors.layout());
            Some(Layer { tensor, layout, kernel: self.kernel, group })
        });
        found.ok_or_else(|| wrap_error(AttendError::NoLayer { layer, layers: self.layers() }))
    }

    /// Whether the CPU's kernels read the blocks.
    pub(crate) fn is_fused(&self) -> bool {
        self.first().1.layout().order != Order::Nhd
    }

    pub(crate) fn record_metrics(&self) {
        self.metrics.record(&self.pool);
    }

    /// A cache has at least one group.
    fn first(&self) -> &(LayerGroup, KvTensors) {
        &self.layers.groups[0]
    }
}
