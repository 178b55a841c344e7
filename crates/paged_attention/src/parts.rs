//! Keys and values written, read and attended to without a step: for callers whose layers do not take their tokens together,
//! or whose sequences lie in several caches.

use std::ops::Range;

use block_pool::{KvShape, Order};
use block_table::BlockTable;
use candle_core::{DType, Result, Tensor};

use crate::gather::Sequence;
use crate::plan::{Plan, Span, gap_of};
use crate::{AttendError, Attention, KvCache, cpu, gather, validate, wrap_error};

/// The last position that there can be: distances between positions are signed.
const LAST_POSITION: usize = isize::MAX as usize;

/// Consecutive tokens of some sequences, in the cache where they lie; see [`attend_parts`].
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The cache.
    pub cache: &'a KvCache,
    /// One table for each sequence, all with as many tokens.
    pub tables: &'a [BlockTable],
    /// Which token of its sequence a table's first one is.
    pub start: usize,
    /// The position behind the last token that counts, in the sequence; not before `start`.
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
    /// [`AttendError`], wrapped, when the layer does not exist, a shape, dtype or device is wrong, a position has no slot, or
    /// positions go beyond `usize::MAX`; nothing was written then. Otherwise what the device reports, or the pool when it has
    /// no room for a copy.
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
        let Some(end) = start.checked_add(tokens) else {
            return parts_error(format!("{tokens} tokens from position {start} on end beyond {}", usize::MAX));
        };
        for table in tables.iter() {
            validate::table(self.pool(), table)?;
            // A window may have given some of them back.
            if let Some(missing) = (start..end).find(|&at| table.slot(at).is_none()) {
                let capacity = table.capacity();
                return parts_error(format!(
                    "positions {start}..{end} are not reserved: {missing} is not held, the table ends at {capacity}"
                ));
            }
        }
        let mut plan = Plan::default();
        for table in tables {
            table.own(start..end).map_err(wrap_error)?;
            plan.slots.extend((start..end).filter_map(|at| table.slot(at)).map(|slot| slot as u32));
        }
        match self.layout().order {
            Order::HeadMajor | Order::Int8 => cpu::write(tensor, k, v, self.layout(), &plan),
            Order::TokenMajor => gather::write(tensor, self.layout(), &plan, k, v),
        }
    }

    /// Copies the keys and values at these positions of a table out of one layer, each `(tokens, kv_heads, head_dim)`, in the
    /// type in which they are stored, or f32 if that is 8-bit. Positions that were reserved and not written hold anything. An
    /// empty range gives no tokens, wherever it lies.
    ///
    /// # Errors
    ///
    /// When the layer does not exist, the table is of another pool, the range ends before it starts, a position has no slot,
    /// or the device refuses.
    pub fn read_at(&self, layer: usize, table: &BlockTable, positions: Range<usize>) -> Result<(Tensor, Tensor)> {
        let tensor = validate::layer(self.tensors(), layer)?;
        validate::table(self.pool(), table)?;
        let Range { start, end } = positions;
        if end < start {
            return parts_error(format!("positions {start}..{end} end before they start"));
        }
        let block_size = self.pool().block_size();
        let (mut before, tokens) = (start % block_size, end - start);
        let mut blocks = start / block_size..end.div_ceil(block_size);
        if tokens == 0 {
            (before, blocks) = (0, 0..0);
        }
        // A range that is too long ends at the first block that is missing.
        let slots = blocks.map(|block| table.slot(block * block_size));
        let Some(blocks) = slots.map(|slot| Some((slot? / block_size) as u32)).collect::<Option<Vec<_>>>() else {
            return parts_error(format!("the table does not hold all positions of {start}..{end}"));
        };
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
/// A sequence begins where its first part does: sinks are the first tokens there, and what a table without a window has given
/// back ([`BlockTable::release_before`]) is not a part of it. A query that sees nothing gets zeros.
///
/// Each part is read where it lies, and what comes of it is weighed by the logarithm of its weights ("Flash-Decoding", Dao
/// et al. 2023): parts may be stored in different types.
///
/// # Errors
///
/// [`AttendError`], wrapped, when a shape, dtype or device is wrong; the parts do not fit each other or hold nothing; a query
/// comes before the last part and its position matters, since attention is causal, has a window, or weighs by distance; a
/// query sees a position that a table's window has given back; a window with sinks looks over several parts; or a position is
/// greater than `isize::MAX`. Otherwise what the device reports.
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

    /// Whether each table holds what its queries see: a window that has moved on has given back what earlier tokens see. (The
    /// new tokens of a [`Step`](crate::Step) come behind all that its table has, and for these a table holds everything.)
    fn check_held(&self, at: usize, rows: usize, attention: &Attention) -> Result<()> {
        for table in self.tables {
            let ((before, missing), _) = gap_of(table);
            if missing == 0 {
                continue;
            }
            let block_size = table.pool().block_size();
            let (first, held) = (before * block_size, (before + missing) * block_size);
            let span = Span::of_queries(0..rows, at.saturating_sub(self.start), self.end - self.start, table.window());
            // Sinks are never given back.
            let given_back = |row: usize| {
                let recent = span.sight(row, attention).recent;
                let seen = recent.start.max(first);
                (seen < recent.end.min(held)).then_some((at + row, self.start + seen))
            };
            if let Some((query, seen)) = (0..rows).find_map(given_back) {
                let held = self.start + held;
                return parts_error(format!(
                    "the query at position {query} sees position {seen}, which was given back: the window holds what lies \
                     from {held} on"
                ));
            }
        }
        Ok(())
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
    let (_, heads, head_dim) = q.dims3()?;
    let kv_heads = parts.first().map_or(heads, |part| part.cache.shape().kv_heads);
    // Positions are counted from where the first part begins, as the fused backend does.
    let origin = parts.first().map_or(0, |part| part.first());
    let nothing = Tensor::zeros((0, kv_heads, head_dim), DType::F32, q.device())?;
    let (mut positions, mut keys, mut values) = (Vec::new(), vec![nothing.clone()], vec![nothing]);
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
            positions.extend(run.clone().map(|position| part.start + position - origin));
            let (k, v) = part.cache.read_at(layer, table, run)?;
            keys.push(k.to_dtype(DType::F32)?);
            values.push(v.to_dtype(DType::F32)?);
        }
    }
    let (sequences, window) = parts.first().map_or((1, None), |part| (part.tables.len(), part.tables[i].window()));
    let end = parts.last().map_or(0, |part| part.end - origin);
    let rows = q.dim(0)? / sequences;
    let span = Span::of_queries(0..rows, at.saturating_sub(origin), end, window);
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
    let rows = rows / sequences;
    if at.checked_add(rows).is_none_or(|end| end > LAST_POSITION) {
        return parts_error(format!("{rows} queries from position {at} on end beyond {LAST_POSITION}"));
    }
    let mut before: Option<&Part<'_>> = None;
    for part in parts {
        let Part { start, end, .. } = *part;
        if end < start || end > LAST_POSITION {
            return parts_error(format!("a part at {start}..{end} ends before it starts, or beyond {LAST_POSITION}"));
        }
        validate::layer(part.cache.tensors(), layer)?;
        let (KvShape { kv_heads, head_dim, .. }, expected) = (part.cache.shape(), first.cache.shape());
        if (kv_heads, head_dim) != (expected.kv_heads, expected.head_dim) || part.tables.len() != sequences {
            return parts_error("the parts have different heads, dimensions or numbers of sequences".into());
        }
        for table in part.tables {
            validate::table(part.cache.pool(), table)?;
            if table.capacity() < end - start {
                let capacity = table.capacity();
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
    if parts.iter().all(|part| part.end <= part.first()) {
        return parts_error("the parts hold nothing that queries could see".into());
    }
    let windowed = parts.iter().any(|part| part.tables.iter().any(|table| table.window().is_some()));
    let last = before.map_or(0, Part::first);
    // What comes before a part has no position in it.
    let placed = attention.causal || attention.window.is_some() || attention.slopes.is_some() || windowed;
    if placed && at < last {
        return parts_error(format!(
            "queries at {at} do not come behind position {last} of the last part; they see what they see by their position"
        ));
    }
    let sinks = attention.window.is_some_and(|window| window.sinks() > 0);
    if parts.len() > 1 && (sinks || windowed) {
        return parts_error("a table's window, or a window with sinks, cannot look over several parts".into());
    }
    for part in parts {
        part.check_held(at, rows, attention)?;
    }
    Ok(heads)
}

fn parts_error<T>(what: String) -> Result<T> {
    Err(wrap_error(AttendError::Parts(what)))
}
