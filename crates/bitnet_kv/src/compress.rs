//! Moving what is old to 8-bit storage.
//!
//! A token is moved once, by whole blocks, and never comes back: what was rounded is not rounded again.

use std::ops::Range;

use candle_core::{DType, Tensor};
use paged_attention::{KvCache, TableOptions};

use crate::KvError;
use crate::error::Result;
use crate::part::Part;
use crate::pool::Inner;
use crate::stats::Squares;

/// What moves the tokens of one cache.
pub(crate) struct Mover<'a> {
    pub(crate) pool: &'a Inner,
    /// The tables of each part.
    pub(crate) batch: usize,
    pub(crate) parts: &'a mut Vec<Part>,
}

impl Mover<'_> {
    /// Moves the tokens before position `boundary`, as far as they fill blocks. Where there is no room for them they stay.
    pub(crate) fn move_old(&mut self, boundary: usize) -> Result<()> {
        while let Some(at) = self.parts.iter().position(|part| !part.old) {
            let bounds = Part::bounds(self.parts, at);
            let part = &self.parts[at];
            let end = boundary.min(part.committed()).min(bounds.end);
            // What growth has left behind goes as a whole, its last block too, full or not.
            let whole = at + 1 < self.parts.len() && end == bounds.end;
            let block_size = part.cache.pool().block_size();
            let end = if whole { end } else { part.start + end.saturating_sub(part.start) / block_size * block_size };
            if end <= bounds.start || !self.compress(at, bounds.start..end)? {
                return Ok(());
            }
            // A part for them may have come before it.
            let Some(at) = self.parts.iter().position(|part| !part.old) else { return Ok(()) };
            if !whole {
                let part = &mut self.parts[at];
                part.tables.iter_mut().for_each(|table| table.release_before(end - part.start));
                return Ok(());
            }
            self.parts.remove(at);
        }
        Ok(())
    }

    /// Copies tokens of part `at` to 8-bit storage, behind what is there; says whether there was room.
    fn compress(&mut self, at: usize, positions: Range<usize>) -> Result<bool> {
        let Some(stores) = &self.pool.old else { return Ok(false) };
        let before = at.checked_sub(1).filter(|&before| self.parts[before].reserve(positions.end).is_ok());
        let fresh = match before {
            Some(_) => None,
            None => {
                let options = TableOptions::default().private();
                match Part::new(stores, &options, self.batch, positions.start, positions.len(), true) {
                    Err(KvError::OutOfBlocks(_)) => return Ok(false),
                    made => Some(made?),
                }
            }
        };
        let (at, before) = match (before, fresh) {
            (_, Some(fresh)) => {
                self.parts.insert(at, fresh);
                (at + 1, at)
            }
            (before, None) => (at, before.unwrap_or(0)),
        };
        let moved = self.copy(at, before, &positions);
        let part = &mut self.parts[before];
        match &moved {
            Ok(_) => part.tables.iter_mut().for_each(|table| {
                let committed = table.commit(positions.len());
                debug_assert!(committed.is_ok(), "they are reserved");
            }),
            Err(_) if part.committed() == part.start => drop(self.parts.remove(before)),
            Err(_) => part.tables.iter_mut().for_each(paged_attention::BlockTable::roll_back),
        }
        self.pool.counters.compressed(positions.len() * self.batch, moved?);
        Ok(true)
    }

    /// Copies all layers, and measures what changes.
    fn copy(&mut self, from: usize, to: usize, positions: &Range<usize>) -> Result<Squares> {
        let mut squares = Squares::default();
        for layer in 0..self.pool.taken.shape.layers {
            let source = &self.parts[from];
            let (k, v) = read(&source.cache, source, layer, positions)?;
            let target = &mut self.parts[to];
            let start = positions.start - target.start;
            target.cache.write_at(layer, &mut target.tables, start, &k, &v)?;
            let (stored_k, stored_v) = read(&target.cache, target, layer, positions)?;
            squares.keys += square_sum(&k)?;
            squares.key_changes += square_sum(&(k - stored_k)?)?;
            squares.values += square_sum(&v)?;
            squares.value_changes += square_sum(&(v - stored_v)?)?;
        }
        Ok(squares)
    }
}

/// `(batch * tokens, kv_heads, head_dim)`, f32.
fn read(cache: &KvCache, part: &Part, layer: usize, positions: &Range<usize>) -> Result<(Tensor, Tensor)> {
    let own = positions.start - part.start..positions.end - part.start;
    let (mut keys, mut values) = (vec![], vec![]);
    for table in &part.tables {
        let (k, v) = cache.read_at(layer, table, own.clone())?;
        keys.push(k.to_dtype(DType::F32)?);
        values.push(v.to_dtype(DType::F32)?);
    }
    Ok((Tensor::cat(&keys, 0)?, Tensor::cat(&values, 0)?))
}

fn square_sum(t: &Tensor) -> Result<f64> {
    Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?))
}
