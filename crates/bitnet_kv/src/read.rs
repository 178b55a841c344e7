//! Looking at what a layer holds: attention over it where it lies, and copies of it.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use paged_attention::{Attention, KvShape, Part as Stretch, Window, attend_parts};

use crate::KvError;
use crate::error::Result;
use crate::part::Part;
use crate::pool::Inner;
use crate::rows::Rows;

/// What a layer held when it was asked for. As long as it is there the blocks stay as they are, and nobody who looks at them
/// needs the sequence itself.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) pool: Arc<Inner>,
    pub(crate) batch: usize,
    pub(crate) layer: usize,
    /// The tokens that the layer has.
    pub(crate) len: usize,
    /// How far its tokens look back.
    pub(crate) window: Option<Window>,
    pub(crate) parts: Arc<Vec<Part>>,
}

impl View {
    /// Attends with the last tokens of the layer, `q [batch, heads, tokens, head_dim]`, to what they see of it; the result has
    /// q's shape.
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
            attention = attention.window(window); // the tables hold more than a token sees
        }
        let q = q.transpose(1, 2)?; // (batch, tokens, heads, head_dim)
        let first = len - tokens;
        let mut outputs = Vec::with_capacity(1);
        for positions in self.stretches(first..len, causal) {
            let n = positions.len();
            let rows = q.narrow(1, positions.start - first, n)?.reshape((self.batch * n, heads, head_dim))?;
            let parts = self.up_to(if causal { positions.end } else { len });
            let out = attend_parts(&parts, self.layer, positions.start, &rows, &attention)?;
            outputs.push(out.reshape((self.batch, n, heads, head_dim))?);
        }
        let out = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 1)? };
        Ok(out.transpose(1, 2)?)
    }

    /// The first position at which `rows`, given from the beginning on, are not those that the layer's last token sees.
    pub(crate) fn differs(&self, rows: &Rows) -> Result<Option<usize>> {
        for seen in self.seen() {
            let positions = seen.start.min(rows.tokens)..seen.end.min(rows.tokens);
            if positions.is_empty() {
                continue;
            }
            let (k, v) = self.copies(std::slice::from_ref(&positions))?;
            if let Some(at) = rows.part(positions.start, positions.len())?.differs(&k, &v)? {
                return Ok(Some(positions.start + at));
            }
        }
        Ok(None)
    }

    /// The positions that the layer's last token sees: the sinks, and those behind them.
    fn seen(&self) -> [Range<usize>; 2] {
        let (sinks, start) = match self.window {
            Some(window) => (window.sinks(), window.start(self.len.saturating_sub(1))),
            None => (0, 0),
        };
        let sinks = sinks.min(self.len);
        [0..sinks, start.max(sinks)..self.len]
    }

    /// Queries cut where parts begin: a part that begins behind a query has nothing for it.
    fn stretches(&self, queries: Range<usize>, causal: bool) -> Vec<Range<usize>> {
        if !causal || self.parts.len() == 1 {
            return vec![queries];
        }
        let within = |at: usize| {
            let bounds = Part::bounds(&self.parts, at);
            queries.start.max(bounds.start)..queries.end.min(bounds.end)
        };
        (0..self.parts.len()).map(within).filter(|positions| !positions.is_empty()).collect()
    }

    /// The parts, up to position `end`.
    fn up_to<'s>(&'s self, end: usize) -> Vec<Stretch<'s>> {
        let parts = self.parts.iter().enumerate().filter(|(_, part)| part.first() < end);
        let stretch = |(at, part): (usize, &'s Part)| {
            let end = end.min(Part::bounds(&self.parts, at).end);
            Stretch { cache: &part.cache, tables: &part.tables, start: part.start, end }
        };
        parts.map(stretch).collect()
    }

    /// Copies of the layer's keys and values, each `(batch, tokens, kv_heads, head_dim)`: all tokens, or, of a circular cache,
    /// those that its last token sees.
    pub(crate) fn keys_and_values(&self) -> Result<(Tensor, Tensor)> {
        self.copies(&self.seen())
    }

    /// The same of the tokens from position `first` on, which a circular cache may have given back.
    pub(crate) fn keys_and_values_from(&self, first: usize) -> Result<(Tensor, Tensor)> {
        self.copies(std::slice::from_ref(&(first..self.len)))
    }

    /// Keys and values as `get` gives them: `(tokens, kv_heads, head_dim)` of one sequence, `(batch, kv_heads, tokens, head_dim)`
    /// of several.
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
            for seen in ranges {
                for at in 0..self.parts.len() {
                    let bounds = Part::bounds(&self.parts, at);
                    let positions = seen.start.max(bounds.start)..seen.end.min(bounds.end);
                    if positions.is_empty() {
                        continue;
                    }
                    let part = &self.parts[at];
                    let own = positions.start - part.start..positions.end - part.start;
                    let (k, v) = part.cache.read_at(self.layer, &part.tables[sequence], own)?;
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
