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

use super::exp2::{exp2_wide, tanh_times};
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
    /// Its rows, and the group of them that is its first.
    pub(super) queries: (&'a F::Queries, usize),
    /// Query heads of a key head.
    pub(super) group: usize,
    /// Its key heads.
    pub(super) heads: Range<usize>,
    /// Its new tokens, counted in the sequence's part of the step.
    pub(super) tokens: Range<usize>,
    /// Its chunks.
    pub(super) chunks: Range<usize>,
}

/// Memory that a thread uses again from task to task.
pub(super) struct Scratch<F: Format> {
    scores: Vec<Scores>,
    /// What each new token sees of a tile, counted from its start.
    seen: Vec<Sight>,
    copied: Copied<F::Number>,
    space: Space,
}

impl<F: Format> Default for Scratch<F> {
    fn default() -> Self {
        Self { scores: Vec::new(), seen: Vec::new(), copied: Copied::default(), space: Space::default() }
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

    let mut total = State::new(task.heads.len() * rows, task.blocks.dims());
    let mut further = None;
    for (i, chunk) in task.chunks.clone().enumerate() {
        let seen = seen_by(task, task.tokens.end - 1).recent.end;
        let positions = chunk * CHUNK..seen.min((chunk + 1) * CHUNK);
        if i == 0 {
            attend_chunk::<V, F>(task, positions, &mut total, scratch);
        } else {
            let state = further.get_or_insert_with(|| State::new(task.heads.len() * rows, task.blocks.dims()));
            state.clear();
            attend_chunk::<V, F>(task, positions, state, scratch);
            total.merge(state);
        }
    }
    total
}

fn seen_by<F: Format>(task: &Task<'_, F>, token: usize) -> Sight {
    task.blocks.span.sight(token, task.attention)
}

#[inline(always)]
fn attend_chunk<V: Wide, F: Format>(
    task: &Task<'_, F>,
    positions: Range<usize>,
    state: &mut State,
    scratch: &mut Scratch<F>,
) {
    let rows = task.tokens.len() * task.group;
    let in_place = task.blocks.in_place();
    let seen = seen_by(task, task.tokens.end - 1).recent.end;
    let tile_at = |start: usize| start..seen.min(start + TILE);
    // The first of the new tokens that sees something of a tile: they see further and further. Those behind it look back
    // less and less far.
    let first_of = |tile: &Range<usize>| {
        let token = task.tokens.clone().find(|&token| seen_by(task, token).recent.end > tile.start)?;
        let Sight { sinks, recent } = seen_by(task, token);
        (sinks > tile.start || recent.start < tile.end).then_some(token - task.tokens.start)
    };
    let (queries, first_group) = task.queries;
    let groups = rows.div_ceil(ROWS);
    let mut ahead = None;
    for start in positions.clone().step_by(TILE) {
        let within = tile_at(start);
        let tile = ahead.take().unwrap_or_else(|| Tile::new(&task.blocks, &within));
        // Behind the chunk, too: more often than not the same thread computes the next one.
        let after = tile_at(start + TILE);
        ahead = (in_place && !after.is_empty()).then(|| Tile::new(&task.blocks, &after));
        let Some(first) = first_of(&within) else { continue };
        scratch.seen.clear();
        scratch.seen.extend(task.tokens.clone().map(|token| seen_by(task, token).within(&within)));

        // Whole groups: rows that see nothing stay as they are.
        let first = first * task.group / ROWS * ROWS;
        for (h, head) in task.heads.clone().enumerate() {
            let keys_and_values = if in_place {
                (tile.keys(head), tile.values(head))
            } else {
                scratch.copied.fill::<F>(&task.blocks, head, &within);
                (scratch.copied.keys(), scratch.copied.values())
            };
            let (keys, values) = keys_and_values;
            let next = match &ahead {
                _ if !in_place => None,
                _ if head + 1 < task.heads.end => Some((tile.keys(head + 1), tile.values(head + 1))),
                Some(ahead) => Some((ahead.keys(task.heads.start), ahead.values(task.heads.start))),
                None => None,
            };
            for row in (first..rows).step_by(ROWS) {
                let scores = &mut scratch.scores[row..rows.min(row + ROWS)];
                let next = next.as_ref().filter(|_| row == first).map(|(keys, _)| keys);
                F::scores::<V>(queries, first_group + h * groups + row / ROWS, &keys, next, scores);
            }
            for row in first..rows {
                let position = task.blocks.span.start + task.tokens.start + row / task.group;
                let scores = &mut scratch.scores[row];
                adjust::<V>(scores, task.attention, head * task.group + row % task.group, start, position);
                mask(scores, &scratch.seen[row / task.group]);
            }
            for row in (first..rows).step_by(ROWS) {
                let end = rows.min(row + ROWS);
                let states = h * rows + row..h * rows + end;
                V::apart(Soften(&mut scratch.scores[row..end], states.start, state));
                let next = next.as_ref().filter(|_| row == first).map(|(_, values)| values);
                let weights = &scratch.scores[row..end];
                F::weigh::<V>(weights, within.len(), &values, next, state.sums(states), &mut scratch.space);
            }
        }
    }
}

/// Puts a tile's scores through what the layer asks for beside products: a soft cap, then a bias by distance.
#[inline(always)]
fn adjust<V: Wide>(scores: &mut Scores, attention: &Attention, head: usize, start: usize, position: usize) {
    if let Some(cap) = attention.soft_cap {
        let cap = V::splat(cap * std::f32::consts::LOG2_E);
        for scores in scores.iter_mut() {
            tanh_times(V::load(scores), cap).store(scores);
        }
    }
    if let Some(slope) = attention.slope(head) {
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

/// Takes out the scores of tokens that a row does not see.
#[inline(always)]
fn mask(scores: &mut Scores, seen: &Sight) {
    let Sight { sinks, recent } = seen;
    if *sinks < recent.start || recent.end < TILE {
        let flat = scores.as_flattened_mut();
        flat[*sinks..recent.start].fill(f32::NEG_INFINITY);
        flat[recent.end..].fill(f32::NEG_INFINITY);
    }
}

/// Turns the scores of up to four rows into weights and takes these into their states, of which the second number is the
/// first.
struct Soften<'a>(&'a mut [Scores], usize, &'a mut State);

impl Run for Soften<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let Self(rows, first, state) = self;
        // A score that is too large for f32 counts as the largest number there is: infinity minus itself is not a number.
        let most = V::splat(f32::MAX);
        let (mut highest, mut shrink, mut weight) = ([0f32; ROWS], [0f32; LANES], [0f32; ROWS]);
        for (r, scores) in rows.iter_mut().enumerate().take(ROWS) {
            let mut high = V::splat(state.largest(first + r));
            for scores in scores.iter_mut() {
                let clipped = most.smaller(V::load(scores));
                clipped.store(scores);
                high = clipped.larger(high);
            }
            highest[r] = largest(high);
            shrink[r] = state.largest(first + r) - finite(highest[r]);
        }
        exp2_wide(V::load(&shrink)).store(&mut shrink);
        for (r, scores) in rows.iter_mut().enumerate().take(ROWS) {
            let reference = V::splat(finite(highest[r]));
            let mut sums = V::splat(0.0);
            for scores in scores.iter_mut() {
                let p = exp2_wide(V::load(scores).sub(reference));
                p.store(scores);
                sums = sums.add(p);
            }
            weight[r] = sum(sums);
        }
        for r in 0..rows.len().min(ROWS) {
            state.grow::<V>(first + r, highest[r], shrink[r], weight[r]);
        }
    }
}
