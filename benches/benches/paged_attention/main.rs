//! Decode attention: one new token for each sequence, its keys and values written first, as in real use.
//!
//! Beside ours: candle's grouped matrix products, on a contiguous cache that is there already and needs no write. The
//! floor is a plain read: the same bytes, gone through once by the same threads.
//! Layers take turns, so that the caches see keys and values only once in a while, as when a whole model runs.

use anyhow::Result;
use benches::{Record, Stopwatch, is_smoke_test};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use criterion::Criterion;
use paged_attention::{Attention, BlockTable, KvCache, KvShape};
use rayon::prelude::*;

/// Bytes over which the layers of one case rotate.
const COLD: usize = 256 << 20;

struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    batch: usize,
    context: usize,
    dtype: DType,
}

impl Case {
    fn name(&self) -> String {
        let Self { heads, kv_heads, head_dim, batch, context, dtype } = self;
        format!("{heads}/{kv_heads}x{head_dim} {} batch {batch} context {context}", dtype.as_str())
    }

    fn bytes(&self) -> usize {
        2 * self.batch * self.context * self.kv_heads * self.head_dim * self.dtype.size_in_bytes()
    }

    fn layers(&self) -> usize {
        if is_smoke_test() { 1 } else { COLD.div_ceil(self.bytes()).min(64) }
    }

    fn random(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::randn(0f32, 1., shape, &Device::Cpu)?.to_dtype(self.dtype)?)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn paged(&self, c: &mut Criterion) -> Result<Option<f64>> {
        let shape = KvShape { layers: self.layers(), kv_heads: self.kv_heads, head_dim: self.head_dim };
        let blocks = self.batch * self.context.div_ceil(16);
        let cache = KvCache::builder(shape).blocks(blocks).dtype(self.dtype).build()?;
        let history = self.random(&[self.context - 1, self.kv_heads, self.head_dim])?;
        let mut tables: Vec<_> = (0..self.batch).map(|_| cache.table()).collect();
        for (table, first) in tables.iter_mut().zip((0..).step_by(self.context)) {
            let mut step = cache.step();
            // Every sequence has tokens of its own, or they would share their blocks.
            step.push(table, &(first..).take(self.context - 1).collect::<Vec<_>>())?;
            for layer in 0..shape.layers {
                step.write(layer, &history, &history)?;
            }
            step.commit();
        }
        let q = self.random(&[self.batch, self.heads, self.head_dim])?;
        let k = self.random(&[self.batch, self.kv_heads, self.head_dim])?;
        let attention = Attention::new(self.scale());
        let mut layer = 0;
        let mut attend = |tables: &mut Vec<BlockTable>| {
            let mut step = cache.step();
            for table in tables {
                step.push(table, &[0]).expect("there is room");
            }
            layer = (layer + 1) % shape.layers;
            step.attend(layer, &q, &k, &k, &attention).expect("the shapes fit");
        };
        Ok(Stopwatch::time(c, &format!("paged/{}", self.name()), || attend(&mut tables)))
    }

    /// Keys and values of all layers, each `(batch * kv_heads, context, head_dim)`.
    fn contiguous(&self) -> Result<Vec<[Tensor; 2]>> {
        let shape = [self.batch * self.kv_heads, self.context, self.head_dim];
        (0..self.layers()).map(|_| Ok([self.random(&shape)?, self.random(&shape)?])).collect()
    }

    fn grouped(&self, c: &mut Criterion, layers: &[[Tensor; 2]]) -> Result<Option<f64>> {
        let group = self.heads / self.kv_heads;
        let q = (self.random(&[self.batch * self.kv_heads, group, self.head_dim])? * f64::from(self.scale()))?;
        let mut turn = 0;
        let mut attend = || -> candle_core::Result<Tensor> {
            turn = (turn + 1) % layers.len();
            let [k, v] = &layers[turn];
            softmax_last_dim(&q.matmul(&k.transpose(D::Minus1, D::Minus2)?)?)?.matmul(v)
        };
        Ok(Stopwatch::time(c, &format!("grouped/{}", self.name()), || drop(attend().expect("the shapes fit"))))
    }

    fn floor(&self, c: &mut Criterion) -> Option<f64> {
        let bits = vec![vec![1u32; self.bytes() / 4]; self.layers()];
        let mut turn = 0;
        Stopwatch::time(c, &format!("floor/{}", self.name()), || {
            turn = (turn + 1) % bits.len();
            let sum: u32 = bits[turn]
                .par_chunks(1 << 14)
                .map(|run| run.iter().fold(0, |sum, x| sum ^ x))
                .reduce(|| 0, |a, b| a ^ b);
            std::hint::black_box(sum);
        })
    }
}

fn main() -> Result<()> {
    let mut criterion = Criterion::default().configure_from_args().sample_size(20);
    let c = &mut criterion;
    let mut record = Record::default();
    let contexts: &[usize] = if is_smoke_test() { &[64] } else { &[512, 4096] };
    for (heads, kv_heads, head_dim) in [(32, 8, 128), (9, 3, 64)] {
        for &context in contexts {
            for batch in [1, 8] {
                for dtype in [DType::F32, DType::F16] {
                    let case = Case { heads, kv_heads, head_dim, batch, context, dtype };
                    let paged = case.paged(c)?;
                    let layers = case.contiguous()?;
                    let grouped = case.grouped(c, &layers)?;
                    drop(layers);
                    let floor = case.floor(c);
                    record.time(&case.name(), paged, floor, &[("candle grouped matmuls", grouped)]);
                }
            }
        }
    }
    criterion.final_summary();
    record.write("decode")
}
