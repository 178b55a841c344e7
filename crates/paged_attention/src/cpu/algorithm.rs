//! Attention over blocks: online softmax over tiles of tokens.
//!
//! A *task* is a few consecutive new tokens of one sequence, some of its key heads, and some *chunks* of its tokens. Its
//! *rows* are the new tokens times the query heads of a group, so that decode (one token, a group of heads) and prefill
//! (many tokens) are the same computation, and every key and value is loaded once for all rows.
//!
//! For each tile, with `m` the largest score so far, `l` the sum of weights and `o` the weighted sum of values (Milakov and
//! Gimelshein 2018; Dao et al. 2022, section 3.1; all scores times `log2 e`, so that the exponential is a power of two):
//!
//! ```text
//! s = q K        m' = max(m, max s)      p = 2^(s - m')
//! l = l 2^(m - m') + sum p               o = o 2^(m - m') + p V
//! ```
//!
//! Chunks are computed apart, each from nothing, and then merged in their order, so that several threads can share a long
//! sequence ("Flash-Decoding", Dao et al. 2023). Tiles and chunks begin at fixed positions, and a row's sums have an order
//! of their own. So its result is the same to the last bit whatever blocks hold the tokens, whichever rows are computed
//! beside it, and however many threads there are.
//!
//! Memory is read in four steady streams, the panels of a tile: heads inside tiles, as they lie in the blocks. The processor
//! reads ahead in each by itself, and what the next head or tile begins with is asked for meanwhile.

use std::ops::Range;

use super::exp2::{SoftCap, exp2_wide};
use super::format::{Format, ROWS, Space};
use super::kernel::Run;
use super::state::{State, finite};
use super::tile::{Blocks, Copied, Scores, TILE, TILE_PANELS, Tile};
use super::wide::{LANES, Wide, largest, sum};
use crate::Attention;
use crate::plan::Sight;

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 8 * TILE;

/// What one task reads.
pub(super) struct Task<'a, F: Format> {
    pub(super) blocks: Blocks<'a, F::Number>,
    pub(super) attention: &'a Attention,
    /// The rows of its tokens in its heads.
    pub(super) queries: &'a F::Queries,
    /// Query heads of a key head.
    pub(super) group: usize,
    /// Its key heads.
    pub(super) heads: Range<usize>,
    /// Its new tokens, counted in the sequence's part of the step.
    pub(super) tokens: Range<usize>,
    /// Its chunks: some, and some behind them.
    pub(super) chunks: [Range<usize>; 2],
}

/// The chunks that positions are in, sinks and recent ones, each chunk once.
pub(super) fn chunks([sinks, recent]: &[Range<usize>; 2]) -> [Range<usize>; 2] {
    let first = sinks.end.div_ceil(CHUNK);
    [0..first, first.max(recent.start / CHUNK)..recent.end.div_ceil(CHUNK)]
}

/// Memory that a thread uses again from task to task.
pub(super) struct Scratch<F: Format> {
    scores: Vec<Scores>,
    /// What each new token sees.
    sights: Vec<Sight>,
    /// What it sees of a tile, counted from its start.
    seen: Vec<Sight>,
    copied: Copied<F::Number>,
    space: Space,
}

impl<F: Format> Default for Scratch<F> {
    fn default() -> Self {
        Self {
            scores: Vec::new(),
            sights: Vec::new(),
            seen: Vec::new(),
            copied: Copied::default(),
            space: Space::default(),
        }
    }
}

impl<F: Format> Scratch<F> {
    /// Behind the last token that a new one sees.
    fn end(&self) -> usize {
        self.sights.last().map_or(0, |sight| sight.recent.end)
    }
}

/// A task, and memory for it.
pub(super) struct Attend<'a, 'b, F: Format>(pub(super) &'b Task<'a, F>, pub(super) &'b mut Scratch<F>);

impl<F: Format> Run for Attend<'_, '_, F> {
    type Output = State;

    #[inline(always)]
    fn run<V: Wide>(self) -> State {
        attend::<V, F>(self.0, self.1)
    }
}

/// Computes one task: the states of its rows, `(heads, tokens, group)`.
#[inline(always)]
fn attend<V: Wide, F: Format>(task: &Task<'_, F>, scratch: &mut Scratch<F>) -> State {
    let rows = task.tokens.len() * task.group;
    scratch.scores.resize(rows, [[0.0; LANES]; TILE_PANELS]);
    scratch.sights.clear();
    scratch.sights.extend(task.tokens.clone().map(|token| task.blocks.span.sight(token, task.attention)));

    let mut total = State::new(task.heads.len() * rows, task.blocks.dims());
    let mut further = None;
    let mut tiles = [Vec::new(), Vec::new()];
    for (i, chunk) in task.chunks.iter().cloned().flatten().enumerate() {
        let positions = chunk * CHUNK..scratch.end().min((chunk + 1) * CHUNK);
        if i == 0 {
            attend_chunk::<V, F>(task, positions, &mut total, scratch, &mut tiles);
        } else {
            let state = further.get_or_insert_with(|| State::new(task.heads.len() * rows, task.blocks.dims()));
            state.clear();
            attend_chunk::<V, F>(task, positions, state, scratch, &mut tiles);
            total.merge(state);
        }
    }
    total
}

#[inline(always)]
fn attend_chunk<'a, V: Wide, F: Format>(
    task: &Task<'a, F>,
    positions: Range<usize>,
    state: &mut State,
    scratch: &mut Scratch<F>,
    [here, ahead]: &mut [Vec<Tile<'a, F::Number>>; 2],
) {
    let rows = task.tokens.len() * task.group;
    let end = scratch.end();
    let Scratch { scores, sights, seen, copied, space } = scratch;
    let tile_at = |start: usize| start..end.min(start + TILE);
    let groups = rows.div_ceil(ROWS);
    let soft_cap = task.attention.soft_cap.map(SoftCap::new);
    let adjusted = soft_cap.is_some() || task.attention.slopes.is_some();
    let behind = positions.end.next_multiple_of(TILE);
    let first_that_sees = |start: usize| {
        let Range { start, end } = tile_at(start);
        sights.iter().position(|Sight { sinks, recent }| *sinks > start || recent.start < end && recent.end > start)
    };
    let starts = positions.step_by(TILE);
    let mut starts = starts.filter_map(|start| first_that_sees(start).map(|first| (start, first))).peekable();
    if let Some(&(start, _)) = starts.peek() {
        task.blocks.find(&tile_at(start), &task.heads, ahead);
    }
    while let Some((start, first)) = starts.next() {
        let within = tile_at(start);
        std::mem::swap(here, ahead);
        // Behind the chunk, too: more often than not the same thread computes the next one.
        let next = starts.peek().map_or(behind, |&(next, _)| next);
        task.blocks.find(&tile_at(next), &task.heads, ahead);
        seen.clear();
        seen.extend(sights.iter().map(|sight| sight.within(&within)));
        let masked = seen.iter().any(|seen| !sees_all(seen));

        // Whole groups: rows that see nothing stay as they are.
        let first = first * task.group / ROWS * ROWS;
        for (h, head) in task.heads.clone().enumerate() {
            let own;
            let tile = match here.get(h) {
                Some(tile) => tile,
                None => {
                    let only = seen.first().filter(|_| task.blocks.only_seen);
                    copied.fill::<F>(&task.blocks, head, &within, only);
                    own = copied.tile();
                    &own
                }
            };
            let next = here.get(h + 1).or(ahead.first());
            for row in (first..rows).step_by(ROWS) {
                let scores = &mut scores[row..rows.min(row + ROWS)];
                let next = next.filter(|_| row == first).map(|next| &next.keys);
                F::scores::<V>(task.queries, h * groups + row / ROWS, &tile.keys, next, scores);
            }
            if adjusted || masked {
                for (row, scores) in scores.iter_mut().enumerate().skip(first) {
                    let token = row / task.group;
                    let position = task.blocks.span.start + task.tokens.start + token;
                    let head = head * task.group + row % task.group;
                    adjust::<V>(scores, soft_cap.as_ref(), task.attention.slope(head), start, position);
                    mask(scores, &seen[token]);
                }
            }
            for row in (first..rows).step_by(ROWS) {
                let end = rows.min(row + ROWS);
                let states = h * rows + row..h * rows + end;
                soften::<V>(&mut scores[row..end], states.start, state);
                let next = next.filter(|_| row == first).map(|next| &next.values);
                F::weigh::<V>(&scores[row..end], within.len(), &tile.values, next, state.sums(states), space);
            }
        }
    }
}

/// Puts a tile's scores through what the layer asks for beside products: a soft cap, then a bias by distance.
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

/// Whether a tile is seen from its beginning to its end.
#[inline(always)]
fn sees_all(Sight { sinks, recent }: &Sight) -> bool {
    *sinks >= recent.start && recent.end >= TILE
}

/// Takes out the scores of tokens that a row does not see.
#[inline(always)]
fn mask(scores: &mut Scores, seen: &Sight) {
    if !sees_all(seen) {
        let flat = scores.as_flattened_mut();
        flat[seen.sinks..seen.recent.start].fill(f32::NEG_INFINITY);
        flat[seen.recent.end..].fill(f32::NEG_INFINITY);
    }
}

/// Turns the scores of up to four rows into weights and takes these into their states, of which number `first` is the first.
#[inline(always)]
fn soften<V: Wide>(rows: &mut [Scores], first: usize, state: &mut State) {
    match rows.len() {
        1 => soften_rows::<V, 1>(rows, first, state),
        2 => soften_rows::<V, 2>(rows, first, state),
        3 => soften_rows::<V, 3>(rows, first, state),
        _ => soften_rows::<V, ROWS>(rows, first, state),
    }
}

#[inline(always)]
fn soften_rows<V: Wide, const R: usize>(rows: &mut [Scores], first: usize, state: &mut State) {
    if let Some(rows) = rows.first_chunk_mut::<R>() {
        V::apart(Soften(rows, first, state));
    }
}

/// R rows, the state of the first of them, and all states.
struct Soften<'a, const R: usize>(&'a mut [Scores; R], usize, &'a mut State);

impl<const R: usize> Run for Soften<'_, R> {
    type Output = ();

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // with constant bounds it is unrolled
    fn run<V: Wide>(self) {
        let Self(rows, first, state) = self;
        let (mut highest, mut shrink, mut grown) = ([0f32; R], [0f32; LANES], false);
        for r in 0..R {
            let before = state.largest(first + r);
            let mut high = V::splat(before);
            for panel in 0..TILE_PANELS {
                high = V::load(&rows[r][panel]).larger(high);
            }
            // A score that is too large for f32 counts as the largest number there is, and the row is computed again at the
            // end: infinity minus itself is not a number. A score that is not one makes its weight so.
            highest[r] = largest(high).min(f32::MAX);
            shrink[r] = before - finite(highest[r]);
            grown |= highest[r] != before;
        }
        if grown {
            exp2_wide(V::load(&shrink)).store(&mut shrink);
        } else {
            shrink = [1.0; LANES];
        }
        let zero = V::splat(0.0);
        for r in 0..R {
            let reference = V::splat(finite(highest[r]));
            let mut sums = V::splat(0.0);
            for panel in 0..TILE_PANELS {
                let p = exp2_wide(zero.smaller(V::load(&rows[r][panel]).sub(reference)));
                p.store(&mut rows[r][panel]);
                sums = sums.add(p);
            }
            state.grow::<V>(first + r, highest[r], shrink[r], sum(sums));
        }
    }
}
