//! Our contender: attention over blocks, and appending.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use harness::Contender;
use paged_attention::{Attention, BlockTable, KvCache, KvDtype, KvShape};
use rayon::ThreadPool;

use crate::child::Case;
use crate::numbers::{Kind, numbers};
use crate::turns::{contender, timed_on};

/// Its name in the tables.
pub const NAME: &str = "paged, blocks of 16";

/// Tokens in a block.
pub const BLOCK_SIZE: usize = 16;

/// The storage type of a case's keys and values.
///
/// # Errors
///
/// If there is no type of that name.
pub fn storage(case: &Case) -> Result<KvDtype> {
    let found = KvDtype::ALL.into_iter().find(|dtype| dtype.to_string() == case.dtype);
    found.with_context(|| format!("there is no storage type {}", case.dtype))
}

/// The numbers of `tokens` as a tensor `(tokens, heads, head_dim)`, in the type that a model computes in: the storage
/// type, but f32 for 8-bit storage.
///
/// # Errors
///
/// If the case's dtype does not exist.
pub fn rows(case: &Case, kind: Kind, tokens: Range<usize>, heads: usize) -> Result<Tensor> {
    let dtype = match storage(case)? {
        KvDtype::Int8 => DType::F32,
        dtype => dtype.tensor_dtype(),
    };
    let width = heads * case.head_dim;
    let numbers = numbers(kind, tokens.start * width..tokens.end * width);
    Ok(Tensor::from_vec(numbers, (tokens.len(), heads, case.head_dim), &Device::Cpu)?.to_dtype(dtype)?)
}

/// The last row of an attention's result, in f32.
///
/// # Errors
///
/// If a tensor operation fails.
pub fn last(y: &Tensor) -> Result<Vec<f32>> {
    Ok(y.narrow(0, y.dim(0)? - 1, 1)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn cache(case: &Case) -> Result<KvCache> {
    let shape = KvShape::new(case.layers, case.kv_heads, case.head_dim);
    // One more for each: the last block of a shared prefix, if it is not full, is copied.
    let own = (case.context - case.prefix + case.room).div_ceil(BLOCK_SIZE) + 1;
    let blocks = case.prefix.div_ceil(BLOCK_SIZE) + case.batch * own;
    Ok(KvCache::builder(shape).blocks(blocks).block_size(BLOCK_SIZE).dtype(storage(case)?).build()?)
}

/// Appends the tokens `range` of a case, with ids that count from `ids` at the case's first token.
fn fill(cache: &KvCache, table: &mut BlockTable, case: &Case, range: Range<usize>, ids: u32) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let k = rows(case, Kind::Key, range.clone(), case.kv_heads)?;
    let v = rows(case, Kind::Value, range.clone(), case.kv_heads)?;
    let mut step = cache.step();
    step.push(table, &range.map(|token| ids + token as u32).collect::<Vec<_>>())?;
    for layer in 0..case.layers {
        step.write(layer, &k, &v)?;
    }
    Ok(step.commit()?)
}

/// A cache with sequences that have all their tokens but the last.
#[derive(Debug)]
pub struct Decode {
    case: Case,
    cache: KvCache,
    tables: Vec<BlockTable>,
}

impl Decode {
    /// Creates and fills the cache.
    ///
    /// # Errors
    ///
    /// If the cache cannot be created or written.
    pub fn new(case: &Case) -> Result<Self> {
        let cache = cache(case)?;
        let mut shared = cache.table();
        fill(&cache, &mut shared, case, 0..case.prefix, 0)?;
        let mut tables: Vec<_> = (0..case.batch).map(|_| shared.fork()).collect();
        for (table, ids) in tables.iter_mut().zip((0..).step_by(case.context)) {
            // Every sequence has different tokens, or they would share blocks.
            fill(&cache, table, case, case.prefix..case.context - 1, ids)?;
        }
        Ok(Self { case: case.clone(), cache, tables })
    }

    /// Attention of each sequence's last token. Returns the contender and its result for the last sequence.
    ///
    /// # Errors
    ///
    /// If attention fails.
    pub fn contender<'a>(&'a mut self, threads: &'a ThreadPool) -> Result<(Contender<'a>, Vec<f32>)> {
        let case = &self.case;
        let new = case.context - 1..case.context;
        let each = [
            rows(case, Kind::Query, 0..1, case.heads)?,
            rows(case, Kind::Key, new.clone(), case.kv_heads)?,
            rows(case, Kind::Value, new, case.kv_heads)?,
        ];
        let [q, k, v] = each.map(|row| Tensor::cat(&vec![row; case.batch], 0));
        let (q, k, v) = (q?, k?, v?);
        let attention = Attention::scaled_by(case.head_dim);
        let layers = case.layers;
        let mut step = self.cache.step();
        for table in &mut self.tables {
            step.push(table, &[0])?;
        }
        let attend = move |turn: usize| step.attend(turn % layers, &q, &k, &v, &attention);
        let output = last(&attend(0)?)?;
        Ok((timed_on(threads, NAME, move |turn| Ok(attend(turn).map(drop)?)), output))
    }
}

/// Attention of all tokens of one causal sequence. Returns the contender and its result for the last token.
///
/// # Errors
///
/// If attention fails.
pub fn prefill<'a>(case: &Case, threads: &'a ThreadPool) -> Result<(Contender<'a>, Vec<f32>)> {
    let cache = cache(case)?;
    let all = 0..case.context;
    let q = rows(case, Kind::Query, all.clone(), case.heads)?;
    let (k, v) = (rows(case, Kind::Key, all.clone(), case.kv_heads)?, rows(case, Kind::Value, all, case.kv_heads)?);
    let attention = Attention::scaled_by(case.head_dim);
    let tokens = vec![0; case.context];
    let attend = move || -> Result<Tensor> {
        let mut table = cache.table();
        let mut step = cache.step();
        step.push(&mut table, &tokens)?;
        Ok(step.attend(0, &q, &k, &v, &attention)?)
    };
    let output = last(&attend()?)?;
    Ok((timed_on(threads, NAME, move |_| attend().map(drop)), output))
}

/// Appending one token at a time to a sequence, in one layer; each token has its own step, which is committed.
///
/// # Errors
///
/// If the cache cannot be created or written.
pub fn append(case: &Case) -> Result<Contender<'static>> {
    let cache = cache(case)?;
    let k = rows(case, Kind::Key, 0..1, case.kv_heads)?;
    let v = rows(case, Kind::Value, 0..1, case.kv_heads)?;
    let mut table = cache.table();
    let history = rows(case, Kind::Key, 0..case.context, case.kv_heads)?;
    let mut step = cache.step();
    step.push(&mut table, &vec![0; case.context])?;
    step.write(0, &history, &history)?;
    step.commit()?;
    let (context, room) = (case.context, case.room);
    Ok(contender(NAME, move |times| {
        let mut time = Duration::ZERO;
        let mut left = times;
        while left > 0 {
            let n = left.min(room);
            let started = Instant::now();
            for _ in 0..n {
                let mut step = cache.step();
                step.push(&mut table, &[0])?;
                step.write(0, &k, &v)?;
                step.commit()?;
            }
            time += started.elapsed();
            table.truncate(context)?;
            left -= n;
        }
        Ok(time)
    }))
}
