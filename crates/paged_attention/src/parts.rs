//! Keys and values written, read and attended to without a step: for callers whose layers do not take their tokens together,
//! or whose sequences lie in several caches.

use std::ops::Range;

use block_pool::{KvShape, Order};
use block_table::BlockTable;
use candle_core::{DType, Error, Result, Tensor};

use crate::gather::Sequence;
use crate::plan::{Plan, Span, gap_of};
use crate::{AttendError, Attention, KvCache, cpu, gather, validate};

/// Consecutive tokens of some sequences, in the cache where they lie; see [`attend_parts`].
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The cache.
    pub cache: &'a KvCache,
    /// One table for each sequence, all with as many tokens.
    pub tables: &'a [BlockTable],
    /// Which token of its sequence a table's first one is.
    pub start: usize,
    /// The position behind the last token that counts, in the sequence.
    pub end: usize,
}

impl KvCache {
    /// Stores keys and values in one layer, at the positions of each table from `start` on, both
    /// `(tables * tokens, kv_heads, head_dim)`, table after table. The slots must have been
    /// [reserved](BlockTable::reserve); blocks that others hold are copied first ([`BlockTable::own`]).
    ///
    /// A [`Step`](crate::Step) does this for all layers of a pass, and rolls back what fails. Here that is the caller's
    /// business: a token is to be committed when all layers have it.
    ///
    /// # Errors
    ///
    /// [`AttendError`], wrapped, when the layer does not exist, a shape, dtype or device is wrong, or a position has no slot;
    /// nothing was written then. Otherwise what the device reports, or the pool when it has no room for a copy.
    pub fn write_at(
        &self,
        layer: usize,
        tables: &mut [BlockTable],
        start: usize,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<()> {
        let tensor = validate::layer(self.tensors(), layer)?;
        let rows = k.dims().first().copied().unwrap_or(0);
        validate::keys_and_values(self, rows, k, v)?;
        let tokens = rows.checked_div(tables.len()).unwrap_or(0);
        if tokens * tables.len() != rows {
            return parts_error(format!("{rows} rows cannot be shared out among {} tables", tables.len()));
        }
        for table in tables.iter() {
            validate::table(self.pool(), table)?;
            // A window may have given some of them back.
            if let Some(missing) = (start..start + tokens).find(|&at| table.slot(at).is_none()) {
                let (end, capacity) = (start + tokens, table.capacity());
                return parts_error(format!(
                    "positions {start}..{end} are not reserved: {missing} is not held, the table ends at {capacity}"
                ));
            }
        }
        let mut plan = Plan::default();
        for table in tables {
            table.own(start..start + tokens).map_err(Error::wrap)?;
            plan.slots.extend((start..start + tokens).filter_map(|at| table.slot(at)).map(|slot| slot as u32));
        }
        match self.layout().order {
            Order::HeadMajor | Order::Int8 => cpu::write(tensor, k, v, self.layout(), &plan),
            Order::TokenMajor => gather::write(tensor, self.layout(), &plan, k, v),
        }
    }

    /// Copies the keys and values at these positions of a table out of one layer, each `(tokens, kv_heads, head_dim)`, in the
    /// type in which they are stored, or f32 if that is 8-bit. Positions that were reserved and not written hold anything.
    ///
    /// # Errors
    ///
    /// When the layer does not exist, the table is of another pool, a position has no slot, or the device refuses.
    pub fn read_at(&self, layer: usize, table: &BlockTable, positions: Range<usize>) -> Result<(Tensor, Tensor)> {
        let tensor = validate::layer(self.tensors(), layer)?;
        validate::table(self.pool(), table)?;
        let block_size = self.pool().block_size();
        let first = positions.start / block_size;
        let slots = (first..positions.end.div_ceil(block_size).max(first)).map(|block| table.slot(block * block_size));
        let Some(blocks) = slots.map(|slot| Some((slot? / block_size) as u32)).collect::<Option<Vec<_>>>() else {
            return parts_error(format!("the table does not hold all positions of {positions:?}"));
        };
        let (before, tokens) = (positions.start % block_size, positions.len());
        let (k, v) = match self.layout().order {
            Order::HeadMajor | Order::Int8 => cpu::read(tensor, self.layout(), &blocks, before + tokens)?,
            Order::TokenMajor => gather::gather(tensor, self.layout(), &blocks, before + tokens)?,
        };
        Ok((k.narrow(0, before, tokens)?, v.narrow(0, before, tokens)?))
    }
}

/// Attends with `q (sequences * tokens, heads, head_dim)` to what the parts hold in one layer; the result has q's shape and
/// type. The parts follow each other, the first ones first; the queries are the sequences' tokens from position `at` on.
///
/// Each part is read where it lies, and what comes of it is weighed by the logarithm of its weights ("Flash-Decoding", Dao
/// et al. 2023): parts may be stored in different types.
///
/// # Errors
///
/// [`AttendError`], wrapped, when a shape, dtype or device is wrong, the parts do not fit each other, a causal query comes
/// before the last part, or a window with sinks looks over several parts. Otherwise what the device reports.
pub fn attend_parts(parts: &[Part<'_>], layer: usize, at: usize, q: &Tensor, attention: &Attention) -> Result<Tensor> {
    let heads = check(parts, layer, at, q, attention)?;
    let parts: Vec<_> = parts.iter().filter(|part| part.first() < part.end).collect();
    if parts.iter().any(|part| part.cache.layout().order == Order::TokenMajor) {
        return gathered(&parts, layer, at, q, attention);
    }
    let one = |part: &Part<'_>| {
        let plan = part.plan(at, q.dims()[0]);
        let (layout, kernel) = (part.cache.layout(), part.cache.kernel());
        let tensor = validate::layer(part.cache.tensors(), layer)?;
        cpu::attend_part(tensor, q, &cpu::Call { layout, plan: &plan, heads, attention, kernel })
    };
    let mut outs = parts.iter().map(|part| one(part)).collect::<Result<Vec<_>>>()?;
    let head_dim = q.dims()[2];
    let mut out = match outs.len() {
        1 => std::mem::take(&mut outs[0].0),
        _ => merge(&outs, head_dim),
    };
    if outs.len() > 1 && out.iter().any(|x| !x.is_finite()) {
        again(&parts, layer, at, q, attention, &mut out)?;
    }
    cpu::like(out, q)
}

impl Part<'_> {
    /// The position of the first token that the part holds.
    fn first(&self) -> usize {
        self.start + self.tables.first().map_or(0, |table| gap_of(table).1)
    }

    fn plan(&self, at: usize, rows: usize) -> Plan {
        let mut plan = Plan::default();
        for table in self.tables {
            let rows = rows / self.tables.len();
            plan.push_queries(table, rows, at.saturating_sub(self.start), self.end - self.start);
        }
        plan
    }
}

/// The means of all parts, each weighed by `2^` of its logarithm. A row is not finite where one of its parts is not.
fn merge(parts: &[(Vec<f32>, Vec<f32>)], head_dim: usize) -> Vec<f32> {
    let Some((first, _)) = parts.first() else { return Vec::new() };
    let mut out = vec![0f32; first.len()];
    for (row, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let largest = parts.iter().fold(f32::NEG_INFINITY, |largest, (_, logs)| largest.max(logs[row]));
        if largest == f32::NEG_INFINITY {
            // Nothing is seen, and the means are zeros; or what is seen is not finite, and so are they.
            let means = parts.iter().map(|(means, _)| &means[row * head_dim..]);
            means.for_each(|means| out.iter_mut().zip(means).for_each(|(out, mean)| *out += mean));
            continue;
        }
        let weights = parts.iter().map(|(_, logs)| (logs[row] - largest).exp2());
        let total: f32 = weights.clone().sum();
        for ((means, _), weight) in parts.iter().zip(weights) {
            for (out, mean) in out.iter_mut().zip(&means[row * head_dim..]) {
                *out += mean * (weight / total);
            }
        }
    }
    out
}

/// Computes the rows of `out (rows, heads, head_dim)` that are not finite in f64, over all parts together: what is not finite
/// in one of them can weigh nothing beside another.
fn again(
    parts: &[&Part<'_>],
    layer: usize,
    at: usize,
    q: &Tensor,
    attention: &Attention,
    out: &mut [f32],
) -> Result<()> {
    let sequences = parts.first().map_or(1, |part| part.tables.len());
    for (i, out) in out.chunks_mut((out.len() / sequences).max(1)).enumerate() {
        if out.iter().any(|x| !x.is_finite()) {
            sequence(parts, layer, at, q, attention, i)?.in_f64(out, |_, _| false)?;
        }
    }
    Ok(())
}

/// The way for every device: what the parts hold is copied together.
fn gathered(parts: &[&Part<'_>], layer: usize, at: usize, q: &Tensor, attention: &Attention) -> Result<Tensor> {
    let sequences = parts.first().map_or(0, |part| part.tables.len());
    let outputs = (0..sequences).map(|i| sequence(parts, layer, at, q, attention, i)?.attend());
    Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)?.to_dtype(q.dtype())
}

/// Sequence number `i`, and what the parts hold of it copied together.
fn sequence<'a>(
    parts: &[&Part<'_>],
    layer: usize,
    at: usize,
    q: &Tensor,
    attention: &'a Attention,
    i: usize,
) -> Result<Sequence<'a>> {
    let (mut positions, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for part in parts {
        let table = &part.tables[i];
        let (before, missing) = table.gap();
        let block_size = table.pool().block_size();
        let end = part.end - part.start;
        let runs = match missing {
            0 => [0..end, 0..0],
            _ => [0..end.min(before * block_size), ((before + missing) * block_size).min(end)..end],
        };
        for run in runs.into_iter().filter(|run| !run.is_empty()) {
            positions.extend(run.clone().map(|position| part.start + position));
            let (k, v) = part.cache.read_at(layer, table, run)?;
            keys.push(k.to_dtype(DType::F32)?);
            values.push(v.to_dtype(DType::F32)?);
        }
    }
    let (sequences, window) = parts.first().map_or((1, None), |part| (part.tables.len(), part.tables[i].window()));
    let end = parts.last().map_or(0, |part| part.end);
    let rows = q.dim(0)? / sequences;
    let span = Span::of_queries(0..rows, at, end, window);
    let q = q.narrow(0, i * rows, rows)?;
    Sequence::new(span, attention, positions, &q, &Tensor::cat(&keys, 0)?, &Tensor::cat(&values, 0)?)
}

/// Checks everything; returns the number of query heads.
fn check(parts: &[Part<'_>], layer: usize, at: usize, q: &Tensor, attention: &Attention) -> Result<usize> {
    let Some(first) = parts.first() else { return parts_error("no part to attend to".into()) };
    let rows = q.dims().first().copied().unwrap_or(0);
    let heads = validate::queries_alone(first.cache, rows, q, attention)?;
    let sequences = first.tables.len();
    if sequences == 0 || !rows.is_multiple_of(sequences) {
        return parts_error(format!("{rows} queries cannot be shared out among {sequences} sequences"));
    }
    let mut before: Option<&Part<'_>> = None;
    for part in parts {
        validate::layer(part.cache.tensors(), layer)?;
        let (KvShape { kv_heads, head_dim, .. }, expected) = (part.cache.shape(), first.cache.shape());
        if (kv_heads, head_dim) != (expected.kv_heads, expected.head_dim) || part.tables.len() != sequences {
            return parts_error("the parts have different heads, dimensions or numbers of sequences".into());
        }
        for table in part.tables {
            validate::table(part.cache.pool(), table)?;
            if part.end < part.start || table.capacity() < part.end - part.start {
                let (start, end, capacity) = (part.start, part.end, table.capacity());
                return parts_error(format!("a part at {start}..{end} lies in a table for {capacity} tokens"));
            }
            if table.gap() != part.tables[0].gap() {
                return parts_error("the sequences of a part hold different positions".into());
            }
        }
        if before.is_some_and(|before| before.end != part.first()) {
            return parts_error(format!("a part that begins at {} does not follow the one before", part.first()));
        }
        before = Some(part);
    }
    let (last, total) = before.map_or((0, 0), |part| (part.first(), part.end));
    let sees_nothing = total == 0 || first.first() == total;
    if sees_nothing || (attention.causal && at < last) {
        return parts_error(format!(
            "queries at {at} do not come behind position {last} of the last part, or see nothing"
        ));
    }
    let windowed = |part: &Part<'_>| part.tables.iter().any(|table| table.window().is_some());
    let sinks = attention.window.is_some_and(|window| window.sinks() > 0);
    if parts.len() > 1 && (sinks || parts.iter().any(windowed)) {
        return parts_error("a table's window, or a window with sinks, cannot look over several parts".into());
    }
    Ok(heads)
}

fn parts_error<T>(what: String) -> Result<T> {
    Err(Error::wrap(AttendError::Parts(what)))
}
