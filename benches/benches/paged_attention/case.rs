//! One case: a geometry, a number of sequences, the type of their keys and values, and the order of their blocks.

use anyhow::Result;
use benches::is_smoke_test;
use candle_core::{DType, Device, Tensor};
use paged_attention::{BlockTable, KvCache, KvDtype, KvShape};

/// Least bytes of the layers that the calls of one case rotate over.
pub(crate) const COLD: usize = 512 << 20;
/// Layers of a case whose layers stay in the processor's cache. More than one, because a layer cannot be written while
/// another caller reads it.
const CACHED_LAYERS: usize = 4;

/// One row of the table.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) batch: usize,
    pub(crate) context: usize,
    pub(crate) dtype: KvDtype,
    pub(crate) threads: usize,
    /// Tokens in a block; the capacity of a sequence if the sequence is contiguous.
    pub(crate) block_size: usize,
    /// Whether each sequence's blocks are in random order.
    pub(crate) shuffled: bool,
    /// Whether keys and values come out of the processor's cache: calls rotate over few layers.
    pub(crate) cached: bool,
}

impl Case {
    pub(crate) fn name(&self) -> String {
        let Self { heads, kv_heads, head_dim, batch, context, dtype, threads, block_size, shuffled, cached } = self;
        let blocks = match (*block_size == self.capacity(), shuffled) {
            (true, _) => " contiguous",
            (_, true) => " random order",
            _ => "",
        };
        let cached = if *cached { " out of a cache" } else { "" };
        format!(
            "{heads}/{kv_heads}x{head_dim} {dtype} batch {batch} context {context} threads {threads}{blocks}{cached}"
        )
    }

    /// Slots of a sequence: its tokens in whole blocks of 16.
    pub(crate) fn capacity(&self) -> usize {
        self.context.next_multiple_of(16)
    }

    /// Bytes of the keys and values that one layer reads, scales included.
    pub(crate) fn bytes(&self) -> usize {
        let shape = KvShape::new(1, self.kv_heads, self.head_dim);
        self.batch * self.context * shape.bytes_per_block(1, self.dtype).expect("a token's bytes can be counted")
    }

    pub(crate) fn layers(&self) -> usize {
        match (is_smoke_test(), self.cached) {
            (true, _) => 1,
            (_, true) => CACHED_LAYERS,
            _ => COLD.div_ceil(self.bytes()),
        }
    }

    pub(crate) fn random(&self, shape: &[usize]) -> Result<Tensor> {
        // The type that a model computes in: as wide as the stored type, but f32 for 8-bit storage.
        let dtype = if self.dtype == KvDtype::Int8 { DType::F32 } else { self.dtype.tensor_dtype() };
        Ok(Tensor::randn(0f32, 1., shape, &Device::Cpu)?.to_dtype(dtype)?)
    }

    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// A cache whose sequences have all their tokens but the last.
    pub(crate) fn filled(&self) -> Result<(KvCache, Vec<BlockTable>)> {
        let shape = KvShape::new(self.layers(), self.kv_heads, self.head_dim);
        let blocks = self.batch * self.capacity() / self.block_size;
        let cache = KvCache::builder(shape).blocks(blocks).block_size(self.block_size).dtype(self.dtype).build()?;
        let mut holes = Vec::new();
        if self.shuffled {
            holes = (0..blocks).map(|_| cache.pool().allocate(1)).collect::<Result<_, _>>()?;
        }
        let history = self.random(&[self.context - 1, self.kv_heads, self.head_dim])?;
        let mut tables: Vec<_> = (0..self.batch).map(|_| cache.table()).collect();
        let mut random = 1usize;
        for (table, first) in tables.iter_mut().zip((0..).step_by(self.context)) {
            while table.capacity() < self.context {
                if !holes.is_empty() {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    drop(holes.swap_remove((random >> 33) % holes.len()));
                }
                table.reserve(table.capacity() + 1)?;
            }
            let mut step = cache.step();
            // Every sequence has different tokens, or they would share blocks.
            step.push(table, &(first..).take(self.context - 1).collect::<Vec<_>>())?;
            for layer in 0..shape.layers {
                step.write(layer, &history, &history)?;
            }
            step.commit()?;
        }
        Ok((cache, tables))
    }

    /// Keys and values of each layer, each `(batch, kv_heads, context, head_dim)`.
    pub(crate) fn contiguous(&self) -> Result<Vec<[Tensor; 2]>> {
        let shape = [self.batch, self.kv_heads, self.context, self.head_dim];
        let (k, v) = (self.random(&shape)?, self.random(&shape)?);
        (0..self.layers()).map(|_| Ok([k.copy()?, v.copy()?])).collect()
    }
}
