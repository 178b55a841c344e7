//! Writes, reads and attention without a step: for callers whose layers take their tokens at different times, or whose
//! sequences lie in several caches.

use std::ops::Range;

use block_pool::KvLayout;
use block_table::{BlockTable, Span};
use candle_core::{DType, Result, Tensor};

use crate::backend::Queries;
use crate::gather::Sequence;
use crate::plan::{Plan, Planned, freed_of};
use crate::{AttendError, Attention, KvCache, cpu, validate, wrap_error};

/// The largest possible position. Distances between positions are signed, so a position has to fit into `isize`.
const LAST_POSITION: usize = isize::MAX as usize;

/// Consecutive tokens of one or more sequences in one cache; see [`attend_segments`].
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// The cache that holds the tokens.
    pub cache: &'a KvCache,
    /// One table for each sequence. Every table has slots for the same positions.
    pub tables: &'a [BlockTable],
    /// The position in the sequence of the first token of each table.
    pub start: usize,
    /// The position in the sequence after the last token that is attended to. Not less than `start`.
    pub end: usize,
}

impl KvCache {
    /// Writes keys and values to one layer, at the positions from `start` on of each table: `k` `(tables * tokens,
    /// kv_heads, head_dim)` and `v` `(tables * tokens, kv_heads, value_dim)`, table after table. `v` is `None` if the
    /// [values are in the keys](block_pool::KvShape::values_in_keys). The slots must have been
    /// [reserved](BlockTable::reserve). Blocks that are shared or cached are copied first
    /// ([`BlockTable::make_writable`]).
    ///
    /// A [`Step`](crate::Step) does this for all layers of a pass, and rolls back after a failure. Here the caller has
    /// to commit a token only when all layers have it, and to roll back what failed.
    ///
    /// # Errors
    ///
    /// [`AttendError`], wrapped, when the layer does not exist, a shape, dtype or device is wrong, a position has no
    /// slot, or positions go beyond `usize::MAX`; nothing was written then. Otherwise the error of the device, or of
    /// the pool when it has no block for a copy.
    pub fn write<'v>(
        &self,
        layer: usize,
        tables: &mut [BlockTable],
        start: usize,
        k: &Tensor,
        v: impl Into<Option<&'v Tensor>>,
    ) -> Result<()> {
        let v = v.into();
        let target = self.layer(layer)?;
        let rows = k.dims().first().copied().unwrap_or(0);
        validate::keys_and_values(target, rows, k, v)?;
        let tokens = rows.checked_div(tables.len()).unwrap_or(0);
        if tokens * tables.len() != rows {
            return segments_error(format!("{rows} rows cannot be divided equally among {} tables", tables.len()));
        }
        let Some(end) = start.checked_add(tokens) else {
            return segments_error(format!(
                "{tokens} tokens from position {start} on go beyond position {}",
                usize::MAX
            ));
        };
        for table in tables.iter() {
            validate::table(self.pool(), table)?;
            // The window may have freed some of the positions.
            if let Some(missing) = (start..end).find(|&at| table.slot_of_group(target.group, at).is_none()) {
                let capacity = table.capacity();
                return segments_error(format!(
                    "positions {start}..{end} are not all reserved: position {missing} has no slot in the table, whose \
                     capacity is {capacity}"
                ));
            }
        }
        let mut slot_mapping = Vec::new();
        for table in tables {
            table.make_writable(start..end).map_err(wrap_error)?;
            let slots = (start..end).filter_map(|at| table.slot_of_group(target.group, at));
            slot_mapping.extend(slots.map(|slot| slot as u32));
        }
        target.write(&Plan::of_slots(slot_mapping), k, v)
    }

    /// Copies the keys and values at `positions` of a table out of one layer: `(tokens, kv_heads, head_dim)` and
    /// `(tokens, kv_heads, value_dim)`.
    ///
    /// The result has the type in which they are stored, or f32 if that is 8-bit. Positions that were reserved and not
    /// written have arbitrary content. An empty range returns no tokens, whatever its start.
    ///
    /// # Errors
    ///
    /// [`AttendError`], wrapped, when the layer does not exist, the table belongs to another pool, the range ends
    /// before it starts, or a position has no slot. Otherwise the error of the device.
    pub fn read(&self, layer: usize, table: &BlockTable, positions: Range<usize>) -> Result<(Tensor, Tensor)> {
        let source = self.layer(layer)?;
        validate::table(self.pool(), table)?;
        let Range { start, end } = positions;
        if end < start {
            return segments_error(format!("positions {start}..{end} end before they start"));
        }
        let block_size = self.pool().block_size();
        let (mut before, tokens) = (start % block_size, end - start);
        let mut blocks = start / block_size..end.div_ceil(block_size);
        if tokens == 0 {
            (before, blocks) = (0, 0..0);
        }
        // The iteration ends at the first block that is missing, so that a range that is far too long costs nothing.
        let slots = blocks.map(|block| table.slot_of_group(source.group, block * block_size));
        let Some(blocks) = slots.map(|slot| Some((slot? / block_size) as u32)).collect::<Option<Vec<_>>>() else {
            return segments_error(format!("not all positions of {start}..{end} have a slot in the table"));
        };
        let (k, v) = source.read(&blocks, before + tokens)?;
        Ok((k.narrow(0, before, tokens)?, v.narrow(0, before, tokens)?))
    }
}

/// Computes the attention of `q (sequences * tokens, heads, head_dim)` over several segments in one layer. The result
/// is `(sequences * tokens, heads, value_dim)`, in the type of `q`.
///
/// Each segment begins where the previous one ends. The queries are the tokens of each sequence from position `at` on.
///
/// A sequence begins where its first segment begins, so the sink tokens are the first tokens of that segment. Tokens
/// that a table without a window has freed ([`BlockTable::free_before`]) are not part of the sequence. A query that
/// sees no token gets zeros.
///
/// With the fused backend, each segment is read in place. The results of the segments are merged by the logarithms of
/// the sums of their weights ("Flash-Decoding", Dao et al. 2023), so segments may be stored in different types. If a
/// cache has the gather backend, the segments are copied into one tensor.
///
/// # Errors
///
/// [`AttendError`], wrapped:
///
/// - a shape, dtype or device is wrong, or the layer does not exist;
/// - the segments do not fit each other, or have no tokens;
/// - a query comes before the start of the last segment although its position matters: attention is causal, has a
///   window, or weighs by distance (ALiBi);
/// - a query sees a position that a table's window has freed;
/// - there are several segments, and a table has a window or the layer's window has sink tokens;
/// - a position is greater than `isize::MAX`.
///
/// Otherwise the error of the device.
pub fn attend_segments(
    segments: &[Segment<'_>],
    layer: usize,
    at: usize,
    q: &Tensor,
    attention: &Attention,
) -> Result<Tensor> {
    let heads = check(segments, layer, at, q, attention)?;
    let segments: Vec<_> = segments.iter().filter(|segment| segment.first(layer) < segment.end).collect();
    if segments.iter().any(|segment| !segment.cache.is_fused()) {
        return attend_gathered(&segments, layer, at, q, attention);
    }
    // A sink logit counts once, and not in every segment.
    let parts = if segments.len() > 1 { &attention.without_sink_logits() } else { attention };
    let one = |segment: &Segment<'_>| {
        let (layer, plan) = (segment.cache.layer(layer)?, segment.plan(layer, at, q.dims()[0]));
        cpu::attend_part(layer.tensor, q, &layer.call(&Queries { plan: &plan, q, heads, attention: parts }))
    };
    let mut outs = segments.iter().map(|segment| one(segment)).collect::<Result<Vec<_>>>()?;
    let mut out = match outs.len() {
        1 => std::mem::take(&mut outs[0].0),
        _ => merge(&outs, heads, attention),
    };
    if outs.len() > 1 && out.iter().any(|x| !x.is_finite()) {
        recompute(&segments, layer, at, q, attention, &mut out)?;
    }
    cpu::like(out, q)
}

impl Segment<'_> {
    /// The group of a layer, which exists.
    fn group(&self, layer: usize) -> usize {
        self.cache.group_of(layer).unwrap_or(0)
    }

    /// The position of the first token that is attended to in a layer.
    fn first(&self, layer: usize) -> usize {
        self.start + self.tables.first().map_or(0, |table| freed_of(table, self.group(layer)).1)
    }

    /// Checks that no query sees a position that the window of a table has freed. A window that has moved on has freed
    /// positions that earlier queries see. (A [`Step`](crate::Step) needs no such check: its new tokens come after all
    /// tokens of the table, and the table keeps every position that they see.)
    fn check_freed(&self, layer: usize, at: usize, rows: usize, attention: &Attention) -> Result<()> {
        for table in self.tables {
            let group = self.group(layer);
            let (freed, block_size) = (freed_of(table, group).0, table.pool().block_size());
            if freed.is_empty() {
                continue;
            }
            let (kept, start) = (self.start + freed.end * block_size, at.saturating_sub(self.start));
            let span = table.span_of_group(group);
            let planned = Planned::of_queries(0..rows, start, self.end - self.start, span).with_freed(freed);
            let sees_freed = |row: usize| Some((row, planned.freed_but_seen(row, attention, block_size)?));
            if let Some((row, seen)) = (0..rows).find_map(sees_freed) {
                let (query, seen) = (at + row, self.start + seen);
                return segments_error(format!(
                    "the query at position {query} sees position {seen}, which was freed: the window has kept the \
                     positions from {kept} on"
                ));
            }
        }
        Ok(())
    }

    fn plan(&self, layer: usize, at: usize, rows: usize) -> Plan {
        let mut plan = Plan::of_group(self.group(layer));
        for table in self.tables {
            let rows = rows / self.tables.len();
            plan.push_queries(table, rows, at.saturating_sub(self.start), self.end - self.start);
        }
        plan
    }
}

/// Merges the results of several segments: their means, weighted by `2^log` of each segment and row. A row is not
/// finite if the result of one of its segments is not finite.
fn merge(segments: &[(Vec<f32>, Vec<f32>)], heads: usize, attention: &Attention) -> Vec<f32> {
    let Some((first, logs)) = segments.first() else { return Vec::new() };
    let value_dim = first.len() / logs.len();
    let mut out = vec![0f32; first.len()];
    for (row, out) in out.chunks_exact_mut(value_dim).enumerate() {
        // A sink logit is a part without values.
        let sink = attention.sink_logit(row % heads).map(|logit| logit * std::f32::consts::LOG2_E);
        let least = sink.unwrap_or(f32::NEG_INFINITY);
        let largest = segments.iter().fold(least, |largest, (_, logs)| largest.max(logs[row]));
        if largest == f32::NEG_INFINITY {
            // Either the row sees nothing, and all means are zeros; or the tokens that it sees are not finite, nor are
            // the means.
            let means = segments.iter().map(|(means, _)| &means[row * value_dim..]);
            means.for_each(|means| out.iter_mut().zip(means).for_each(|(out, mean)| *out += mean));
            continue;
        }
        let weights = segments.iter().map(|(_, logs)| (logs[row] - largest).exp2());
        let total = weights.clone().sum::<f32>() + sink.map_or(0.0, |sink| (sink - largest).exp2());
        for ((means, _), weight) in segments.iter().zip(weights) {
            for (out, mean) in out.iter_mut().zip(&means[row * value_dim..]) {
                *out += mean * (weight / total);
            }
        }
    }
    out
}

/// Recomputes the rows of `out (rows, heads, head_dim)` that are not finite in f64, over all segments together: a
/// segment whose result is not finite can have a weight of zero compared with another segment.
fn recompute(
    segments: &[&Segment<'_>],
    layer: usize,
    at: usize,
    q: &Tensor,
    attention: &Attention,
    out: &mut [f32],
) -> Result<()> {
    let sequences = segments.first().map_or(1, |segment| segment.tables.len());
    for (i, out) in out.chunks_mut((out.len() / sequences).max(1)).enumerate() {
        if out.iter().any(|x| !x.is_finite()) {
            let mut lse = vec![0f32; out.len()]; // not needed, but large enough
            gathered_sequence(segments, layer, at, q, attention, i)?.in_f64(out, &mut lse, |_, _| false)?;
        }
    }
    Ok(())
}

/// Attention over the segments with the gather backend, for every device: each sequence is copied into one tensor.
fn attend_gathered(
    segments: &[&Segment<'_>],
    layer: usize,
    at: usize,
    q: &Tensor,
    attention: &Attention,
) -> Result<Tensor> {
    let sequences = segments.first().map_or(0, |segment| segment.tables.len());
    let outputs = (0..sequences).map(|i| Ok(gathered_sequence(segments, layer, at, q, attention, i)?.attend()?.0));
    Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)?.to_dtype(q.dtype())
}

/// Sequence number `i`, with its keys and values of all segments copied into one tensor each.
fn gathered_sequence<'a>(
    segments: &[&Segment<'_>],
    layer: usize,
    at: usize,
    q: &Tensor,
    attention: &'a Attention,
    i: usize,
) -> Result<Sequence<'a>> {
    let (_, heads, head_dim) = q.dims3()?;
    let layout = segments.first().map(|segment| segment.cache.layer(layer)).transpose()?.map(|of| *of.layout);
    let (kv_heads, value_dim) = layout.map_or((heads, head_dim), |layout| (layout.kv_heads, layout.value_dim));
    // Positions are counted from the first token of the first segment, as in the fused backend.
    let origin = segments.first().map_or(0, |segment| segment.first(layer));
    let nothing = |dims| Tensor::zeros((0, kv_heads, dims), DType::F32, q.device());
    let (mut positions, mut keys, mut values) = (Vec::new(), vec![nothing(head_dim)?], vec![nothing(value_dim)?]);
    for segment in segments {
        let table = &segment.tables[i];
        let freed = table.freed_blocks_of_group(segment.group(layer));
        let block_size = table.pool().block_size();
        let end = segment.end - segment.start;
        let runs = [0..end.min(freed.start * block_size), end.min(freed.end * block_size)..end];
        for run in runs.into_iter().filter(|run| !run.is_empty()) {
            positions.extend(run.clone().map(|position| segment.start + position - origin));
            let (k, v) = segment.cache.read(layer, table, run)?;
            keys.push(k.to_dtype(DType::F32)?);
            values.push(v.to_dtype(DType::F32)?);
        }
    }
    let of = |segment: &&Segment<'_>| (segment.tables.len(), segment.tables[i].span_of_group(segment.group(layer)));
    let (sequences, span) = segments.first().map_or((1, Span::all()), of);
    let end = segments.last().map_or(0, |segment| segment.end - origin);
    let rows = q.dim(0)? / sequences;
    let planned = Planned::of_queries(0..rows, at.saturating_sub(origin), end, span);
    let q = q.narrow(0, i * rows, rows)?;
    Sequence::new(planned, attention, positions, &q, &Tensor::cat(&keys, 0)?, &Tensor::cat(&values, 0)?)
}

/// Checks all arguments of [`attend_segments`]. Returns the number of query heads.
fn check(segments: &[Segment<'_>], layer: usize, at: usize, q: &Tensor, attention: &Attention) -> Result<usize> {
    let Some(first) = segments.first() else { return segments_error("there is no segment to attend to".into()) };
    let rows = q.dims().first().copied().unwrap_or(0);
    let expected = first.cache.layer(layer)?;
    let heads = validate::queries_alone(expected, rows, q, attention)?;
    let sequences = first.tables.len();
    if sequences == 0 || !rows.is_multiple_of(sequences) {
        return segments_error(format!("{rows} queries cannot be divided equally among {sequences} sequences"));
    }
    let rows = rows / sequences;
    if at.checked_add(rows).is_none_or(|end| end > LAST_POSITION) {
        return segments_error(format!("{rows} queries from position {at} on go beyond position {LAST_POSITION}"));
    }
    let mut before: Option<&Segment<'_>> = None;
    for segment in segments {
        let Segment { start, end, .. } = *segment;
        if end < start || end > LAST_POSITION {
            return segments_error(format!(
                "a segment at {start}..{end} ends before it starts, or beyond position {LAST_POSITION}"
            ));
        }
        let group = segment.group(layer);
        let dims = |layout: &KvLayout| (layout.kv_heads, layout.head_dim, layout.value_dim);
        let same = dims(segment.cache.layer(layer)?.layout) == dims(expected.layout);
        if !same || segment.tables.len() != sequences {
            return segments_error("the segments have different numbers of heads, dimensions or sequences".into());
        }
        for table in segment.tables {
            validate::table(segment.cache.pool(), table)?;
            if table.capacity() < end - start {
                let capacity = table.capacity();
                return segments_error(format!(
                    "a segment at {start}..{end} lies in a table with a capacity of {capacity} tokens"
                ));
            }
            if table.freed_blocks_of_group(group) != segment.tables[0].freed_blocks_of_group(group) {
                return segments_error("the tables of a segment have freed different blocks".into());
            }
        }
        if before.is_some_and(|before| before.end != segment.first(layer)) {
            return segments_error(format!(
                "a segment that begins at {} does not follow the previous segment",
                segment.first(layer)
            ));
        }
        before = Some(segment);
    }
    if segments.iter().all(|segment| segment.end <= segment.first(layer)) {
        return segments_error("the segments have no tokens to attend to".into());
    }
    let is_windowed =
        |segment: &Segment<'_>| segment.tables.iter().any(|table| !table.span_of_group(segment.group(layer)).is_all());
    let windowed = segments.iter().any(is_windowed);
    let last = before.map_or(0, |segment| segment.first(layer));
    // A query before the start of a segment has no position in it.
    let position_matters = attention.depends_on_position() || windowed;
    if position_matters && at < last {
        return segments_error(format!(
            "queries at {at} come before position {last}, where the last segment begins, but what they see depends on \
             their position"
        ));
    }
    let has_sink_tokens = attention.window.is_some_and(|window| window.sink_tokens() > 0);
    if segments.len() > 1 && (has_sink_tokens || windowed) {
        return segments_error(
            "a table with a window, or a window with sink tokens, cannot be used with several segments".into(),
        );
    }
    for segment in segments {
        segment.check_freed(layer, at, rows, attention)?;
    }
    Ok(heads)
}

fn segments_error<T>(what: String) -> Result<T> {
    Err(wrap_error(AttendError::Segments(what)))
}
