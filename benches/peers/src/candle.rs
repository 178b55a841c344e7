//! candle's own attention and caches, over contiguous tensors.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use candle_core::{D, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::kv_cache::{ConcatKvCache, KvCache};
use candle_nn::ops::softmax_last_dim;
use half::f16;
use harness::Contender;
use rayon::ThreadPool;

use crate::child::Case;
use crate::numbers::Kind;
use crate::paged::{last, rows};
use crate::turns::{contender, timed_on};

/// Its name and version.
pub const NAME: &str = "candle-nn 0.11.1";

/// Keys and values, each `(batch, kv_heads, context, head_dim)`; every layer has its own memory.
#[derive(Debug)]
pub struct Layers(Vec<[Tensor; 2]>);

impl Layers {
    /// Creates the layers of a case, filled with its numbers.
    ///
    /// # Errors
    ///
    /// If a tensor operation fails.
    pub fn new(case: &Case) -> Result<Self> {
        let one = |kind| -> Result<Tensor> {
            let x = rows(case, kind, 0..case.context, case.kv_heads)?.transpose(0, 1)?.unsqueeze(0)?;
            Ok(Tensor::cat(&vec![x; case.batch], 0)?.contiguous()?)
        };
        let first = [one(Kind::Key)?, one(Kind::Value)?];
        let copies = (1..case.layers).map(|_| Ok([first[0].copy()?, first[1].copy()?])).collect::<Result<Vec<_>>>()?;
        Ok(Self([vec![first], copies].concat()))
    }
}

/// Decoding as two matrix products whose left side has the query heads of a group as rows. Returns the contender and
/// its result.
///
/// # Errors
///
/// If a tensor operation fails.
pub fn grouped<'a>(case: &Case, layers: &'a Layers, threads: &'a ThreadPool) -> Result<(Contender<'a>, Vec<f32>)> {
    let group = case.heads / case.kv_heads;
    let q = rows(case, Kind::Query, 0..1, case.heads)?.reshape((1, case.kv_heads, group, case.head_dim))?;
    let scale = 1.0 / (case.head_dim as f64).sqrt();
    let q = (Tensor::cat(&vec![q; case.batch], 0)? * scale)?;
    let attend = move |turn: usize| -> Result<Tensor> {
        let [k, v] = &layers.0[turn % layers.0.len()];
        Ok(softmax_last_dim(&q.matmul(&k.transpose(D::Minus1, D::Minus2)?)?)?.matmul(v)?)
    };
    let output = last(&attend(0)?)?;
    let name = format!("{NAME}, grouped products");
    Ok((timed_on(threads, name, move |turn| attend(turn).map(drop)), output))
}

/// candle's flash attention: of the last token when decoding, of all tokens otherwise. Returns the contender and its
/// result.
///
/// # Errors
///
/// If a tensor operation fails, or the dtype is neither f32 nor f16.
pub fn flash<'a>(case: &Case, layers: &'a Layers, threads: &'a ThreadPool) -> Result<(Contender<'a>, Vec<f32>)> {
    let (tokens, mask) = match case.kind {
        "decode" => (1, AttnMask::None),
        _ => (case.context, AttnMask::causal()),
    };
    let q = rows(case, Kind::Query, 0..tokens, case.heads)?.unsqueeze(0)?; // (1, tokens, heads, head_dim)
    let q = Tensor::cat(&vec![q; case.batch], 0)?;
    let scale = 1.0 / (case.head_dim as f32).sqrt();
    let half = match case.dtype {
        "f32" => false,
        "f16" => true,
        other => bail!("candle's flash attention has no {other}"),
    };
    let attend = move |turn: usize| -> Result<Tensor> {
        let [k, v] = &layers.0[turn % layers.0.len()];
        let (k, v) = (k.transpose(1, 2)?, v.transpose(1, 2)?);
        // (batch, heads, tokens, head_dim)
        Ok(match half {
            true => flash_attn::<f16>(&q, &k, &v, scale, mask.clone(), None, None)?,
            false => flash_attn::<f32>(&q, &k, &v, scale, mask.clone(), None, None)?,
        })
    };
    let y = attend(0)?;
    let y = y.narrow(2, tokens - 1, 1)?;
    let output = last(&y)?;
    Ok((timed_on(threads, format!("{NAME}, flash attention"), move |turn| attend(turn).map(drop)), output))
}

/// Appending to a `KvCache` that has room, to a `KvCache` that is full, and to a `ConcatKvCache`.
///
/// # Errors
///
/// If a tensor operation fails.
pub fn append(case: &Case) -> Result<Vec<Contender<'static>>> {
    let batched = |tokens| -> Result<Tensor> {
        Ok(rows(case, Kind::Key, 0..tokens, case.kv_heads)?.transpose(0, 1)?.unsqueeze(0)?.contiguous()?)
    };
    let (history, token) = (batched(case.context)?, batched(1)?);
    let (context, room) = (case.context, case.room);
    let filled = {
        let history = history.clone();
        move |room: usize| -> Result<KvCache> {
            let mut cache = KvCache::new(2, context + room);
            cache.append(&history, &history)?;
            Ok(cache)
        }
    };

    // A clone shares the memory, whose pages were touched before, and has its own length.
    let roomy = filled(room)?;
    let one = token.clone();
    let fits = contender(format!("{NAME}, KvCache"), move |times| {
        let mut time = Duration::ZERO;
        let mut left = times;
        while left > 0 {
            let n = left.min(room);
            let mut cache = roomy.clone();
            let started = Instant::now();
            for _ in 0..n {
                cache.append(&one, &one)?;
            }
            time += started.elapsed();
            left -= n;
        }
        Ok(time)
    });
    let one = token.clone();
    let grows = contender(format!("{NAME}, KvCache that is full"), move |times| {
        let mut time = Duration::ZERO;
        for _ in 0..times.min(16) {
            let mut cache = filled(0)?;
            let started = Instant::now();
            cache.append(&one, &one)?;
            time += started.elapsed();
        }
        Ok(time * times as u32 / times.min(16) as u32)
    });
    let concatenates = contender(format!("{NAME}, ConcatKvCache"), move |times| {
        let mut time = Duration::ZERO;
        for _ in 0..times.min(16) {
            let mut cache = ConcatKvCache::new(2);
            cache.append(&history, &history)?;
            let started = Instant::now();
            cache.append(&token, &token)?;
            time += started.elapsed();
        }
        Ok(time * times as u32 / times.min(16) as u32)
    });
    Ok(vec![fits, grows, concatenates])
}
