//! Reading the keys and values of a layer: attention over its blocks in place, and copies of them.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use paged_attention::{Attention, KvShape, Segment, Window, attend_segments};

use crate::KvError;
use crate::error::Result;
use crate::pool::Inner;
use crate::rows::Rows;
use crate::segment::OwnedSegment;

/// The keys and values of a layer at one moment. While a view exists its blocks do not change, so it can be read
/// without access to the sequence.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) pool: Arc<Inner>,
    pub(crate) batch: usize,
    pub(crate) layer: usize,
    /// How many tokens the layer has.
    pub(crate) len: usize,
    /// What a token sees, if the cache is circular.
    pub(crate) window: Option<Window>,
    pub(crate) segments: Arc<Vec<OwnedSegment>>,
}

impl View {
    /// Attention of the layer's last tokens, `q [batch, heads, tokens, head_dim]`, over what they see. The result has
    /// the shape of `q`.
    pub(crate) fn attend(&self, q: &Tensor, scale: f32, causal: bool) -> Result<Tensor> {
        let len = self.len;
        let KvShape { kv_heads, head_dim, .. } = self.pool.taken.shape;
        let (heads, tokens) = match *q.dims() {
            [batch, heads, tokens, dims]
                if batch == self.batch
                    && dims == head_dim
                    && (1..=len).contains(&tokens)
                    && heads > 0
                    && heads % kv_heads == 0 =>
            {
                (heads, tokens)
            }
            _ => {
                let batch = self.batch;
                let expected = format!("[{batch}, n * {kv_heads}, 1..={len}, {head_dim}]");
                return Err(KvError::Queries { got: q.dims().to_vec(), expected });
            }
        };
        self.pool.taken.number(q, "q")?;
        let mut attention = Attention::new(scale).causal(causal);
        if let Some(window) = self.window {
            attention = attention.window(window); // the tables keep more than a token sees
        }
        let q = q.transpose(1, 2)?; // (batch, tokens, heads, head_dim)
        let first = len - tokens;
        let mut outputs = Vec::with_capacity(1);
        for positions in self.split_at_segments(first..len, causal) {
            let n = positions.len();
            let rows = q.narrow(1, positions.start - first, n)?.reshape((self.batch * n, heads, head_dim))?;
            let segments = self.up_to(if causal { positions.end } else { len });
            let out = attend_segments(&segments, self.layer, positions.start, &rows, &attention)?;
            outputs.push(out.reshape((self.batch, n, heads, head_dim))?);
        }
        let out = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 1)? };
        Ok(out.transpose(1, 2)?)
    }

    /// The first position at which `rows` differ from the stored keys and values, among the positions that the layer's
    /// last token sees. `rows` start at position 0.
    pub(crate) fn differs(&self, rows: &Rows) -> Result<Option<usize>> {
        for visible in self.visible() {
            let positions = visible.start.min(rows.tokens)..visible.end.min(rows.tokens);
            if positions.is_empty() {
                continue;
            }
            let (k, v) = self.copies(std::slice::from_ref(&positions))?;
            if let Some(at) = rows.slice(positions.start, positions.len())?.differs(&k, &v)? {
                return Ok(Some(positions.start + at));
            }
        }
        Ok(None)
    }

    /// The positions that the layer's last token sees: the sink tokens, and its window.
    fn visible(&self) -> [Range<usize>; 2] {
        let (sinks, start) = match self.window {
            Some(window) => (window.sink_tokens(), window.start(self.len.saturating_sub(1))),
            None => (0, 0),
        };
        let sinks = sinks.min(self.len);
        [0..sinks, start.max(sinks)..self.len]
    }

    /// Splits the queries where segments begin: a causal query sees nothing of a segment that begins after it.
    fn split_at_segments(&self, queries: Range<usize>, causal: bool) -> Vec<Range<usize>> {
        if !causal || self.segments.len() == 1 {
            return vec![queries];
        }
        let within = |at: usize| {
            let bounds = OwnedSegment::bounds(&self.segments, at);
            queries.start.max(bounds.start)..queries.end.min(bounds.end)
        };
        (0..self.segments.len()).map(within).filter(|positions| !positions.is_empty()).collect()
    }

    /// The segments that begin before position `end`, each cut off there.
    fn up_to<'s>(&'s self, end: usize) -> Vec<Segment<'s>> {
        let segments = self.segments.iter().enumerate().filter(|(_, segment)| segment.first() < end);
        let cut = |(at, segment): (usize, &'s OwnedSegment)| {
            let end = end.min(OwnedSegment::bounds(&self.segments, at).end);
            Segment { cache: &segment.cache, tables: &segment.tables, start: segment.start, end }
        };
        segments.map(cut).collect()
    }

    /// Copies of the layer's keys and values, each `(batch, tokens, kv_heads, head_dim)`: of all tokens, or, in a
    /// circular cache, of those that the last token sees.
    pub(crate) fn keys_and_values(&self) -> Result<(Tensor, Tensor)> {
        self.copies(&self.visible())
    }

    /// The same for the tokens from position `first` on. A circular cache may have freed some of them.
    pub(crate) fn keys_and_values_from(&self, first: usize) -> Result<(Tensor, Tensor)> {
        self.copies(std::slice::from_ref(&(first..self.len)))
    }

    /// Keys and values in the shape that `get` returns: `(tokens, kv_heads, head_dim)` for one sequence,
    /// `(batch, kv_heads, tokens, head_dim)` for several.
    pub(crate) fn shaped(&self, (k, v): (Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        match self.batch {
            1 => Ok((k.squeeze(0)?, v.squeeze(0)?)),
            _ => Ok((k.transpose(1, 2)?.contiguous()?, v.transpose(1, 2)?.contiguous()?)),
        }
    }

    fn copies(&self, ranges: &[Range<usize>]) -> Result<(Tensor, Tensor)> {
        let taken = &self.pool.taken;
        if ranges.iter().all(Range::is_empty) {
            let KvShape { kv_heads, head_dim, .. } = taken.shape;
            let empty = Tensor::zeros((self.batch, 0, kv_heads, head_dim), taken.dtype, &taken.device)?;
            return Ok((empty.clone(), empty));
        }
        let (mut keys, mut values) = (vec![], vec![]);
        for sequence in 0..self.batch {
            let (mut k_parts, mut v_parts) = (vec![], vec![]);
            for range in ranges {
                for at in 0..self.segments.len() {
                    let bounds = OwnedSegment::bounds(&self.segments, at);
                    let positions = range.start.max(bounds.start)..range.end.min(bounds.end);
                    if positions.is_empty() {
                        continue;
                    }
                    let segment = &self.segments[at];
                    let in_table = positions.start - segment.start..positions.end - segment.start;
                    let (k, v) = segment.cache.read(self.layer, &segment.tables[sequence], in_table)?;
                    k_parts.push(k.to_dtype(taken.dtype)?);
                    v_parts.push(v.to_dtype(taken.dtype)?);
                }
            }
            keys.push(Tensor::cat(&k_parts, 0)?);
            values.push(Tensor::cat(&v_parts, 0)?);
        }
        Ok((Tensor::stack(&keys, 0)?, Tensor::stack(&values, 0)?))
    }
}
