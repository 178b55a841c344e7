//! Multi-head latent attention (DeepSeek-V2, section 2.1) in its absorbed form: 16 or 128 query heads of 576 dimensions
//! over one latent vector per token, whose first 512 dimensions are the values. Compared with plain candle products
//! over a contiguous tensor, with a cache that stores padded values beside the keys, and with the machine's limit of
//! multiply-adds.

use std::hint::black_box;

use anyhow::Result;
use benches::{Contender, Race, Record, Rounds, is_smoke_test, multiply_adds};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use paged_attention::{Attention, KvCache, KvDtype, KvShape, Step};

const KEY: usize = 576;
const VALUE: usize = 512;
const SECONDS: f64 = 3.0;

/// `rows` new tokens at the end of `context` tokens, with this many query heads.
struct Case {
    heads: usize,
    context: usize,
    rows: usize,
    dtype: KvDtype,
}

impl Case {
    fn name(&self) -> String {
        let Self { heads, context, rows, dtype } = self;
        let kind = if *rows == 1 { "decode" } else { "prefill" };
        format!("{kind} {heads}/1x576 values in keys {dtype} context {context}")
    }

    /// The type that a model computes in.
    fn dtype(&self) -> DType {
        if self.dtype == KvDtype::Int8 { DType::F32 } else { self.dtype.tensor_dtype() }
    }

    fn random(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::randn(0f32, 1., shape, &Device::Cpu)?.to_dtype(self.dtype())?)
    }

    /// Keys that each row sees, summed over the rows.
    fn seen(&self) -> usize {
        (self.context - self.rows + 1..=self.context).sum()
    }
}

/// Attention as four operations of candle, over latents `(context, 576)`. The query heads are the rows of one product.
fn plain(q: &Tensor, latents: &Tensor, mask: Option<&Tensor>, scale: f64) -> candle_core::Result<Tensor> {
    let (rows, heads, _) = q.dims3()?;
    let scores = (q.flatten_to(1)?.matmul(&latents.t()?)? * scale)?;
    let scores = match mask {
        Some(mask) => scores.reshape((rows, heads, ()))?.broadcast_add(mask)?.flatten_to(1)?,
        None => scores,
    };
    softmax_last_dim(&scores)?.matmul(&latents.narrow(D::Minus1, 0, VALUE)?)
}

fn measure(case: &Case, record: &mut Record) -> Result<()> {
    let build = |shape: KvShape| KvCache::builder(shape).blocks(case.context.div_ceil(16)).dtype(case.dtype).build();
    let latent_cache = build(KvShape::new(1, 1, KEY).values_in_keys(VALUE))?;
    let padded_cache = build(KvShape::new(1, 1, KEY))?;
    let latents = case.random(&[case.context, 1, KEY])?;
    let q = case.random(&[case.rows, case.heads, KEY])?;
    let (before, new) = (case.context - case.rows, latents.narrow(0, case.context - case.rows, case.rows)?);
    let (mut latent_table, mut padded_table) = (latent_cache.table(), padded_cache.table());
    if before > 0 {
        let old = latents.narrow(0, 0, before)?;
        let mut step = latent_cache.step();
        step.push(&mut latent_table, &vec![0; before])?;
        step.write(0, &old, None)?;
        step.commit()?;
        let mut step = padded_cache.step();
        step.push(&mut padded_table, &vec![0; before])?;
        step.write(0, &old, &old)?;
        step.commit()?;
    }
    let (mut latent_step, mut padded_step): (Step<'_>, Step<'_>) = (latent_cache.step(), padded_cache.step());
    latent_step.push(&mut latent_table, &vec![0; case.rows])?;
    padded_step.push(&mut padded_table, &vec![0; case.rows])?;
    let attention = Attention::scaled_by(192);
    let contiguous = latents.squeeze(1)?;
    let mask = (case.rows > 1).then(|| causal_mask(case)).transpose()?;
    let scale = 1.0 / 192f64.sqrt();
    let chains = case.seen() * case.heads * (KEY + VALUE) / benches::CHAINS / rayon::current_num_threads();
    let mut contenders: Vec<Contender<'_>> = vec![
        Contender::timed("paged", |_| {
            black_box(latent_step.attend(0, &q, &new, None, &attention).expect("the shapes fit"));
        }),
        Contender::timed("padded values", |_| {
            black_box(padded_step.attend(0, &q, &new, &new, &attention).expect("the shapes fit"));
        }),
        Contender::timed("candle products", |_| {
            black_box(plain(&q, &contiguous, mask.as_ref(), scale).expect("the shapes fit"));
        }),
        Contender::timed("floor", |_| {
            rayon::broadcast(|_| black_box(multiply_adds(chains)));
        }),
    ];
    let race = Race::run(Rounds::for_seconds(SECONDS), &mut contenders)?;
    drop(contenders);
    let peers = [("padded values".into(), race.ratio(1, 0)), ("candle products".into(), race.ratio(2, 0))];
    record.compared(&case.name(), "time", race.time(0), "ns", Some(race.ratio(3, 0)), peers);
    Ok(())
}

/// `(rows, 1, context)`: 0 where a row sees a key, otherwise -inf.
fn causal_mask(case: &Case) -> Result<Tensor> {
    let before = case.context - case.rows;
    let sees = |row: usize, key: usize| if key <= before + row { 0f32 } else { f32::NEG_INFINITY };
    let mask: Vec<f32> = (0..case.rows).flat_map(|row| (0..case.context).map(move |key| sees(row, key))).collect();
    Ok(Tensor::from_vec(mask, (case.rows, 1, case.context), &Device::Cpu)?.to_dtype(case.dtype())?)
}

fn main() -> Result<()> {
    let mut record = Record::default();
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
        for heads in [16, 128] {
            let contexts: &[(usize, usize)] = if is_smoke_test() { &[(64, 1)] } else { &[(4096, 1), (512, 512)] };
            for &(context, rows) in contexts {
                measure(&Case { heads, context, rows, dtype }, &mut record)?;
            }
        }
    }
    // DeepSeek-V2-Lite.
    let bytes = |shape: KvShape| shape.bytes_per_block(1, KvDtype::Bf16).map_or(f64::NAN, |bytes| bytes as f64);
    let latent = bytes(KvShape::new(27, 1, KEY).values_in_keys(VALUE));
    let padded = bytes(KvShape::new(27, 1, KEY));
    record.compared(
        "bytes per token, 27 layers, bf16",
        "size",
        latent,
        "bytes",
        None,
        [("padded values".into(), padded / latent)],
    );
    record.write("latent")
}
