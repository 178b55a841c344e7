//! Attention over blocks: online softmax over tiles of tokens.
//!
//! A *task* is a few new tokens, some key heads, and some *chunks* of the tokens that they see. Its *rows* are the new
//! tokens times the query heads of a group. So decode (one token, a group of heads), prefill (many tokens), and decode
//! of several sequences over the same blocks are one computation, and every key and value is loaded once for all rows.
//!
//! Each row has a running maximum `m` of the scores, a running sum `l` of the weights, and accumulators `o`, the
//! weighted sum of values. For each tile (Milakov and Gimelshein 2018; Dao et al. 2022, section 3.1; all scores are
//! multiplied by `log2 e`, so that the exponential is a power of two):
//!
//! ```text
//! s = q K        m' = max(m, max s)      p = 2^(s - m')
//! l = l 2^(m - m') + sum p               o = o 2^(m - m') + p V
//! ```
//!
//! Each chunk is computed from an empty state, and the states are merged in the order of the chunks, so that several
//! threads can share a long sequence ("Flash-Decoding", Dao et al. 2023). Tiles and chunks begin at fixed positions,
//! and the terms of a row's sums are added in a fixed order. So its result is the same to the last bit whatever blocks
//! hold the tokens, whatever other rows are computed with it, and however many threads there are.
//!
//! Memory is read in four sequential streams, one for each panel of a tile: tile by tile, and within a tile head by
//! head, the order of the data in the blocks. The hardware prefetcher follows each stream. Software prefetches load the
//! next head or tile while the current one is computed.

use std::ops::Range;

use super::exp2::{SoftCap, exp2_wide};
use super::format::{Buffers, Format, ROWS};
use super::panels::{Panels, Scores, TILE, TILE_PANELS};
use super::state::{State, finite};
use super::tile::{Blocks, Copied, Tile};
use super::wide::{LANES, Run, Wide, reduce_max, reduce_sum};
use crate::Attention;
use crate::plan::{Planned, VisibleRange};

/// Tokens per chunk.
pub(super) const CHUNK: usize = 8 * TILE;

/// The most rows that are computed at once: their scores and states fit a core's cache beside the keys and values.
const PART_ROWS: usize = 32;

/// The same if the values are in the keys, which are transposed for each part.
const PART_ROWS_OF_KEYS: usize = 128;

/// The inputs of one task.
pub(super) struct Task<'a, F: Format> {
    /// The blocks that all its new tokens see there.
    pub(super) blocks: Blocks<'a, F::Number>,
    pub(super) attention: &'a Attention,
    /// The packed query rows of the new tokens in the task's heads.
    pub(super) queries: &'a F::Queries,
    /// Query heads per key head.
    pub(super) group: usize,
    /// The task's key heads.
    pub(super) heads: Range<usize>,
    pub(super) tokens: &'a [NewToken],
    /// The task's chunks: two ranges, the second after the first.
    pub(super) chunks: [Range<usize>; 2],
}

/// A new token whose rows are computed.
pub(super) struct NewToken {
    /// Its row in the step.
    pub(super) row: usize,
    pub(super) position: usize,
    pub(super) visible: VisibleRange,
}

impl NewToken {
    /// New token number `token` of a sequence.
    pub(super) fn of(planned: &Planned, token: usize, attention: &Attention) -> Self {
        let visible = planned.visible(token, attention);
        Self { row: planned.rows.start + token, position: planned.start + token, visible }
    }
}

/// The chunks that contain these positions, of sink tokens and of recent tokens. Each chunk is listed once.
pub(super) fn chunks([sinks, recent]: &[Range<usize>; 2]) -> [Range<usize>; 2] {
    let first = sinks.end.div_ceil(CHUNK);
    [0..first, first.max(recent.start / CHUNK)..recent.end.div_ceil(CHUNK)]
}

impl<F: Format> Task<'_, F> {
    /// The end of the positions that the new tokens see.
    fn end(&self) -> usize {
        self.tokens.iter().map(|token| token.visible.recent.end).max().unwrap_or(0)
    }

    /// How many key heads and how many new tokens are computed at once: all, or if there are too many rows for a core's
    /// cache, one head and a part of the new tokens after another. A part begins at a group of [`ROWS`].
    fn at_once(&self) -> (usize, usize) {
        let most = if self.blocks.layout.values_in_keys { PART_ROWS_OF_KEYS } else { PART_ROWS };
        if self.tokens.len() * self.group <= most {
            return (self.heads.len(), self.tokens.len());
        }
        let whole_groups = (1..=ROWS).find(|tokens| (tokens * self.group).is_multiple_of(ROWS)).unwrap_or(ROWS);
        (1, (most / self.group).max(1).next_multiple_of(whole_groups).min(self.tokens.len()))
    }
}

/// Buffers that a thread reuses from task to task.
pub(super) struct Scratch<F: Format> {
    scores: Vec<Scores>,
    /// The part of each visible range that is in the current tile, relative to the start of the tile.
    seen: Vec<VisibleRange>,
    copied: Copied<F::Number>,
    buffers: Buffers,
}

impl<F: Format> Default for Scratch<F> {
    fn default() -> Self {
        Self { scores: Vec::new(), seen: Vec::new(), copied: Copied::default(), buffers: Buffers::default() }
    }
}

/// A task, buffers for it, and the states of its rows, `(heads, tokens, group)`, that have seen no token.
pub(super) struct Attend<'a, 'b, F: Format>(
    pub(super) &'b Task<'a, F>,
    pub(super) &'b mut Scratch<F>,
    pub(super) &'b mut State,
);

impl<F: Format> Run for Attend<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        attend::<V, F>(self.0, self.1, self.2);
    }
}

/// Computes one task.
#[inline(always)]
fn attend<V: Wide, F: Format>(task: &Task<'_, F>, scratch: &mut Scratch<F>, total: &mut State) {
    let rows = task.tokens.len() * task.group;
    let (heads_at_once, tokens_at_once) = task.at_once();
    scratch.scores.resize(tokens_at_once * task.group, [[0.0; LANES]; TILE_PANELS]);
    let mut partial = None;
    let mut tiles = [Vec::new(), Vec::new()];
    for (i, chunk) in task.chunks.iter().cloned().flatten().enumerate() {
        let positions = chunk * CHUNK..task.end().min((chunk + 1) * CHUNK);
        let state = match i {
            0 => &mut *total,
            _ => partial.get_or_insert_with(|| State::new(task.heads.len() * rows, task.blocks.dims())),
        };
        for heads in parts(task.heads.len(), heads_at_once) {
            for tokens in parts(task.tokens.len(), tokens_at_once) {
                attend_chunk::<V, F>(task, heads.clone(), tokens, positions.clone(), state, scratch, &mut tiles);
            }
        }
        if i > 0 {
            partial.iter_mut().for_each(|state| {
                total.merge(state);
                state.clear();
            });
        }
    }
}

/// `0..n` in parts of `size`.
fn parts(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(size.max(1)).map(move |start| start..n.min(start + size))
}

/// Adds the tokens at `positions`, which are in one chunk, to the states of the rows of these heads and new tokens of the
/// task.
#[inline(always)]
fn attend_chunk<'a, V: Wide, F: Format>(
    task: &Task<'a, F>,
    heads: Range<usize>,
    tokens: Range<usize>,
    positions: Range<usize>,
    state: &mut State,
    scratch: &mut Scratch<F>,
    [tiles, next_tiles]: &mut [Vec<Tile<'a, F::Number>>; 2],
) {
    // All rows of a head, and those that are computed here.
    let rows = task.tokens.len() * task.group;
    let own = tokens.start * task.group..tokens.end * task.group;
    let tokens = &task.tokens[tokens];
    let layout = task.blocks.layout;
    let end = task.end();
    let Scratch { scores, seen, copied, buffers } = scratch;
    let tile_at = |start: usize| start..end.min(start + TILE);
    let groups = rows.div_ceil(ROWS);
    let soft_cap = task.attention.soft_cap.map(SoftCap::new);
    let adjusted = soft_cap.is_some() || task.attention.slopes.is_some();
    let chunk_end = positions.end.next_multiple_of(TILE);
    let first_seeing = |start: usize| {
        let Range { start, end } = tile_at(start);
        tokens.iter().position(|NewToken { visible: VisibleRange { sink_tokens, recent }, .. }| {
            *sink_tokens > start || recent.start < end && recent.end > start
        })
    };
    let starts = positions.step_by(TILE);
    let mut starts = starts.filter_map(|start| first_seeing(start).map(|first| (start, first))).peekable();
    let key_heads = task.heads.start + heads.start..task.heads.start + heads.end;
    if let Some(&(start, _)) = starts.peek() {
        task.blocks.locate(&tile_at(start), &key_heads, next_tiles);
    }
    while let Some((start, first)) = starts.next() {
        let within = tile_at(start);
        std::mem::swap(tiles, next_tiles);
        // At the end of a chunk this is the first tile after it: usually the same thread computes the next chunk.
        let next = starts.peek().map_or(chunk_end, |&(next, _)| next);
        task.blocks.locate(&tile_at(next), &key_heads, next_tiles);
        seen.clear();
        seen.extend(tokens.iter().map(|token| token.visible.within(&within)));
        let masked = seen.iter().any(|seen| !sees_all(seen));

        // Begin at a whole group of ROWS. The states of rows that see no token of the tile do not change.
        let first = first * task.group / ROWS * ROWS;
        for (at, (h, head)) in heads.clone().zip(key_heads.clone()).enumerate() {
            let gathered;
            let tile = match tiles.get(at) {
                Some(tile) => tile,
                None => {
                    let only = seen.first().filter(|_| task.blocks.visible_only);
                    copied.fill::<F>(&task.blocks, head, &within, only);
                    gathered = copied.tile();
                    &gathered
                }
            };
            let next = tiles.get(at + 1).or(next_tiles.first());
            let scores = &mut scores[first..own.len()];
            let group = h * groups + (own.start + first) / ROWS;
            F::scores::<V>(task.queries, group, &tile.keys, next.map(|next| &next.keys), scores);
            if adjusted || masked {
                for (row, scores) in (first..).zip(scores.iter_mut()) {
                    let token = row / task.group;
                    let position = tokens[token].position;
                    let head = head * task.group + row % task.group;
                    adjust::<V>(scores, soft_cap.as_ref(), task.attention.slope(head), start, position);
                    mask(scores, &seen[token]);
                }
            }
            let states = h * rows + own.start + first..h * rows + own.end;
            if layout.values_in_keys {
                V::outlined(AttendKeys::<F> {
                    scores,
                    tokens: within.len(),
                    keys: &tile.keys,
                    value_dim: layout.value_dim,
                    states,
                    state,
                    buffers,
                });
                continue;
            }
            for (i, scores) in scores.chunks_mut(ROWS).enumerate() {
                online_softmax::<V>(scores, states.start + i * ROWS, state);
            }
            let next = next.map(|next| &next.values);
            F::accumulate::<V>(scores, within.len(), &tile.values, next, state.accumulators(states), buffers);
        }
    }
}

/// The weights of a tile and their sums of values, where the values are in the keys. A function of its own, so that the
/// loop over other tiles stays small.
struct AttendKeys<'a, 'n, F: Format> {
    /// The scores of all rows that see the tile.
    scores: &'a mut [Scores],
    /// How many tokens the tile has.
    tokens: usize,
    keys: &'a Panels<'n, F::Number>,
    value_dim: usize,
    /// The indices of these rows in `state`.
    states: Range<usize>,
    state: &'a mut State,
    buffers: &'a mut Buffers,
}

impl<F: Format> Run for AttendKeys<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let Self { scores, tokens, keys, value_dim, states, state, buffers } = self;
        for (i, rows) in scores.chunks_mut(ROWS).enumerate() {
            online_softmax::<V>(rows, states.start + i * ROWS, state);
        }
        F::accumulate_keys::<V>(scores, tokens, keys, value_dim, state.accumulators(states), buffers);
    }
}

/// Applies the soft cap, if there is one, and then the ALiBi bias to one row's scores of a tile.
#[inline(always)]
fn adjust<V: Wide>(scores: &mut Scores, soft_cap: Option<&SoftCap>, slope: Option<f32>, start: usize, position: usize) {
    if let Some(cap) = soft_cap {
        for scores in scores.iter_mut() {
            cap.of(V::load(scores)).store(scores);
        }
    }
    if let Some(slope) = slope {
        let slope = slope * std::f32::consts::LOG2_E;
        for (panel, scores) in scores.iter_mut().enumerate() {
            let mut bias = [0f32; LANES];
            for (lane, bias) in bias.iter_mut().enumerate() {
                let distance = (start + panel * LANES + lane) as i64 - position as i64;
                *bias = slope * distance as f32;
            }
            V::load(scores).add(V::load(&bias)).store(scores);
        }
    }
}

/// Whether all tokens of a tile are visible.
#[inline(always)]
fn sees_all(VisibleRange { sink_tokens, recent }: &VisibleRange) -> bool {
    *sink_tokens >= recent.start && recent.end >= TILE
}

/// Sets the scores of tokens that a row does not see to -inf.
#[inline(always)]
fn mask(scores: &mut Scores, seen: &VisibleRange) {
    if !sees_all(seen) {
        let flat = scores.as_flattened_mut();
        flat[seen.sink_tokens..seen.recent.start].fill(f32::NEG_INFINITY);
        flat[seen.recent.end..].fill(f32::NEG_INFINITY);
    }
}

/// One step of online softmax for up to four rows: turns their scores of a tile into weights, and updates their running
/// maximum and running sum and rescales their accumulators. `first` is the index in `state` of the first of these rows.
#[inline(always)]
fn online_softmax<V: Wide>(rows: &mut [Scores], first: usize, state: &mut State) {
    match rows.len() {
        1 => online_softmax_rows::<V, 1>(rows, first, state),
        2 => online_softmax_rows::<V, 2>(rows, first, state),
        3 => online_softmax_rows::<V, 3>(rows, first, state),
        _ => online_softmax_rows::<V, ROWS>(rows, first, state),
    }
}

#[inline(always)]
fn online_softmax_rows<V: Wide, const R: usize>(rows: &mut [Scores], first: usize, state: &mut State) {
    if let Some(rows) = rows.first_chunk_mut::<R>() {
        V::outlined(OnlineSoftmax(rows, first, state));
    }
}

/// The scores of R rows, the index of the first of them in the state, and the state.
struct OnlineSoftmax<'a, const R: usize>(&'a mut [Scores; R], usize, &'a mut State);

impl<const R: usize> Run for OnlineSoftmax<'_, R> {
    type Output = ();

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // with constant bounds it is unrolled
    fn run<V: Wide>(self) {
        let Self(rows, first, state) = self;
        let (mut new_max, mut rescale, mut changed) = ([0f32; R], [0f32; LANES], false);
        for r in 0..R {
            let old_max = state.running_max(first + r);
            let mut max = V::splat(old_max);
            for panel in 0..TILE_PANELS {
                max = V::load(&rows[r][panel]).max(max);
            }
            // A score of +inf is clamped to the largest f32, since infinity minus infinity is NaN. The row is
            // recomputed at the end. A NaN score gives a NaN weight.
            new_max[r] = reduce_max(max).min(f32::MAX);
            rescale[r] = old_max - finite(new_max[r]);
            changed |= new_max[r] != old_max;
        }
        if changed {
            exp2_wide(V::load(&rescale)).store(&mut rescale);
        } else {
            rescale = [1.0; LANES];
        }
        let zero = V::splat(0.0);
        for r in 0..R {
            let subtrahend = V::splat(finite(new_max[r]));
            let mut sums = V::splat(0.0);
            for panel in 0..TILE_PANELS {
                let p = exp2_wide(zero.min(V::load(&rows[r][panel]).sub(subtrahend)));
                p.store(&mut rows[r][panel]);
                sums = sums.add(p);
            }
            state.update::<V>(first + r, new_max[r], rescale[r], reduce_sum(sums));
        }
    }
}
