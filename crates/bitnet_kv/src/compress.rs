//! Moving old tokens to 8-bit storage.
//!
//! Tokens are moved in whole blocks. A token is moved once and never back, so that no value is rounded twice.

use std::ops::Range;

use candle_core::{DType, Tensor};
use paged_attention::TableOptions;

use crate::KvError;
use crate::error::Result;
use crate::pool::Inner;
use crate::segment::OwnedSegment;
use crate::stats::Squares;

/// Moves old tokens of one cache to 8-bit storage.
pub(crate) struct Mover<'a> {
    pub(crate) pool: &'a Inner,
    /// The number of tables in each segment.
    pub(crate) batch: usize,
    pub(crate) segments: &'a mut Vec<OwnedSegment>,
}

impl Mover<'_> {
    /// Moves the tokens before position `boundary` that fill whole blocks. Tokens that 8-bit storage has no room for
    /// stay where they are.
    pub(crate) fn move_old(&mut self, boundary: usize) -> Result<()> {
        while let Some(at) = self.segments.iter().position(|segment| !segment.old) {
            let bounds = OwnedSegment::bounds(self.segments, at);
            let segment = &self.segments[at];
            let end = boundary.min(segment.committed()).min(bounds.end);
            // A segment that another one follows, after growth, is moved as a whole: its last block too, full or not.
            let whole = at + 1 < self.segments.len() && end == bounds.end;
            let block_size = segment.cache.pool().block_size();
            let end =
                if whole { end } else { segment.start + end.saturating_sub(segment.start) / block_size * block_size };
            if end <= bounds.start || !self.compress(at, bounds.start..end)? {
                return Ok(());
            }
            // `compress` may have inserted a segment before it.
            let Some(at) = self.segments.iter().position(|segment| !segment.old) else { return Ok(()) };
            if !whole {
                let segment = &mut self.segments[at];
                segment.tables.iter_mut().for_each(|table| table.free_before(end - segment.start));
                return Ok(());
            }
            self.segments.remove(at);
        }
        Ok(())
    }

    /// Copies tokens of segment `at` to 8-bit storage, after the tokens that are there. Returns whether there was room.
    fn compress(&mut self, at: usize, positions: Range<usize>) -> Result<bool> {
        let Some(stores) = &self.pool.old else { return Ok(false) };
        let before = at.checked_sub(1).filter(|&before| self.segments[before].reserve(positions.end).is_ok());
        let fresh = match before {
            Some(_) => None,
            None => {
                let options = TableOptions::default().private();
                match OwnedSegment::new(stores, &options, self.batch, positions.start, positions.len(), true) {
                    Err(KvError::OutOfBlocks(_)) => return Ok(false),
                    made => Some(made?),
                }
            }
        };
        let (at, before) = match (before, fresh) {
            (_, Some(fresh)) => {
                self.segments.insert(at, fresh);
                (at + 1, at)
            }
            (before, None) => (at, before.unwrap_or(0)),
        };
        let moved = self.copy(at, before, &positions);
        let segment = &mut self.segments[before];
        match &moved {
            Ok(_) => segment.tables.iter_mut().for_each(|table| {
                let committed = table.commit(positions.len());
                debug_assert!(committed.is_ok(), "the tokens are reserved");
            }),
            Err(_) if segment.committed() == segment.start => drop(self.segments.remove(before)),
            Err(_) => segment.tables.iter_mut().for_each(paged_attention::BlockTable::roll_back),
        }
        self.pool.counters.compressed(positions.len() * self.batch, moved?);
        Ok(true)
    }

    /// Copies all layers, and measures the rounding error.
    fn copy(&mut self, from: usize, to: usize, positions: &Range<usize>) -> Result<Squares> {
        let mut squares = Squares::default();
        for layer in 0..self.pool.taken.shape.layers {
            let (k, v) = read(&self.segments[from], layer, positions)?;
            let target = &mut self.segments[to];
            let start = positions.start - target.start;
            target.cache.write(layer, &mut target.tables, start, &k, &v)?;
            let (stored_k, stored_v) = read(target, layer, positions)?;
            squares.keys += square_sum(&k)?;
            squares.key_changes += square_sum(&(k - stored_k)?)?;
            squares.values += square_sum(&v)?;
            squares.value_changes += square_sum(&(v - stored_v)?)?;
        }
        Ok(squares)
    }
}

/// The keys and values at these positions, each `(batch * tokens, kv_heads, head_dim)` in f32.
fn read(segment: &OwnedSegment, layer: usize, positions: &Range<usize>) -> Result<(Tensor, Tensor)> {
    let (k, v) = segment.read(layer, positions.start - segment.start..positions.end - segment.start)?;
    Ok((k.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?))
}

fn square_sum(t: &Tensor) -> Result<f64> {
    Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?))
}
