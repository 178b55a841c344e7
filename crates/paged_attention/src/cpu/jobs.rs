//! How a step is cut into tasks, and what the threads have computed put together.
//!
//! Where a sequence has few new tokens, the work is reading: each chunk of its tokens is a task of its own, for all key
//! heads or, if that gives too few tasks, for some. Where it has many, the work is multiplying: a few new tokens and one
//! key head are a task, over all chunks.

use std::ops::Range;

use block_pool::KvLayout;
use rayon::prelude::*;

use super::Call;
use super::algorithm::{Attend, CHUNK, Scratch, Task};
use super::format::{Format, Number};
use super::queries::Queries;
use super::state::State;
use super::tile::Blocks;
use crate::plan::Span;

/// Rows that a task has at most, unless one token's group has more: as many as keep what it works on in a core's cache.
const TASK_ROWS: usize = 32;

/// Tasks for each thread, at least, if heads can be shared out: some threads come late.
const TASKS_PER_THREAD: usize = 8;

/// Multiply-adds below which waking other threads takes longer than the work.
const WORTH_A_THREAD: usize = 1 << 18;

/// Some new tokens of a sequence.
struct Part<'a> {
    span: &'a Span,
    tokens: Range<usize>,
    /// Key heads that a task has.
    heads: usize,
    /// The chunks that the tokens see something of: those with sinks, and recent ones.
    chunks: [Range<usize>; 2],
    /// Whether each chunk is a task of its own.
    by_chunk: bool,
}

impl Part<'_> {
    /// How many chunks it sees.
    fn chunks(&self) -> usize {
        self.chunks.iter().map(Range::len).sum()
    }

    /// The heads and chunks of its tasks: chunks inside heads. However they are shared out, each chunk is merged into those
    /// before it.
    fn tasks(&self, kv_heads: usize) -> impl Iterator<Item = (Range<usize>, [Range<usize>; 2])> + use<> {
        let one = |chunk| [chunk..chunk + 1, 0..0];
        let chunks: Vec<_> = if self.by_chunk {
            self.chunks.iter().cloned().flatten().map(one).collect()
        } else {
            vec![self.chunks.clone()]
        };
        let heads = self.heads;
        (0..kv_heads).step_by(heads).flat_map(move |head| {
            let heads = head..kv_heads.min(head + heads);
            chunks.clone().into_iter().map(move |chunks| (heads.clone(), chunks))
        })
    }
}

/// Attends with `q (tokens, heads, head_dim)` over a layer's blocks; returns as much, and the logarithm, to base two, of the
/// weight that each row has seen: `(tokens, heads)`.
pub(super) fn attend<F: Format, S: Number>(layer: &[F::Number], q: &[S], call: &Call<'_>) -> (Vec<S>, Vec<f32>) {
    let KvLayout { kv_heads, head_dim, .. } = *call.layout;
    let parts = parts(call);
    let work: usize = parts.iter().map(|part| part.tokens.len() * part.chunks()).sum::<usize>() * CHUNK * call.heads;
    let alone = work * head_dim < WORTH_A_THREAD;

    let mut out = vec![S::default(); q.len()];
    let mut log_weights = vec![f32::NEG_INFINITY; q.len() / head_dim];
    let mut rest = (&mut out[..], &mut log_weights[..]);
    let with_rows = parts.into_iter().map(|part| {
        let rows = part.tokens.len() * call.heads;
        let (own, others) = std::mem::take(&mut rest.0).split_at_mut(rows * head_dim);
        let (own_weights, other_weights) = std::mem::take(&mut rest.1).split_at_mut(rows);
        rest = (others, other_weights);
        (part, (own, own_weights))
    });
    let all = Queries { numbers: q, heads: call.heads, head_dim, factor: call.attention.factor() };
    let attend = |queries: &mut F::Queries, (part, rows): (Part<'_>, Rows<'_, S>)| {
        all.prepare::<F>(part.span, &part.tokens, kv_heads, queries);
        let queries = &*queries;
        let run = |scratch: &mut Scratch<F>, (heads, chunks): (Range<usize>, [Range<usize>; 2])| {
            let ids = &call.plan.blocks[part.span.blocks.clone()];
            let task = Task {
                blocks: Blocks { layer, layout: call.layout, ids, span: part.span },
                attention: call.attention,
                queries,
                group: call.heads / kv_heads,
                heads,
                tokens: part.tokens.clone(),
                chunks,
            };
            call.kernel.run(Attend(&task, scratch))
        };
        let tasks: Vec<_> = part.tasks(kv_heads).collect();
        let states: Vec<State> = if alone {
            let mut scratch = Scratch::default();
            tasks.into_iter().map(|task| run(&mut scratch, task)).collect()
        } else {
            tasks.into_par_iter().map_init(Scratch::default, run).collect()
        };
        put_together(&part, states, rows, call);
    };
    if alone {
        let mut queries = F::Queries::default();
        with_rows.for_each(|part| attend(&mut queries, part));
    } else {
        with_rows.collect::<Vec<_>>().into_par_iter().for_each_init(F::Queries::default, attend);
    }
    (out, log_weights)
}

/// Some rows of the result, and of the logarithms of their weights.
type Rows<'a, S> = (&'a mut [S], &'a mut [f32]);

/// Cuts a step into parts, in the order of their rows.
fn parts<'a>(call: &Call<'a>) -> Vec<Part<'a>> {
    let kv_heads = call.layout.kv_heads;
    let tokens_per_task = (TASK_ROWS * kv_heads / call.heads).max(1);
    let mut parts = Vec::new();
    for span in &call.plan.spans {
        let by_chunk = span.rows.len() <= tokens_per_task;
        for first in (0..span.rows.len()).step_by(tokens_per_task) {
            let tokens = first..span.rows.len().min(first + tokens_per_task);
            // The first token looks back furthest, the last one sees furthest.
            let [first, last] = [tokens.start, tokens.end - 1].map(|token| span.sight(token, call.attention));
            let sinks = last.sinks.div_ceil(CHUNK);
            let recent = sinks.max(first.recent.start / CHUNK)..last.recent.end.div_ceil(CHUNK);
            let chunks = [0..sinks, recent];
            let heads = if by_chunk { kv_heads } else { 1 };
            parts.push(Part { span, tokens, heads, chunks, by_chunk });
        }
    }
    let tasks: usize = parts.iter().map(|part| if part.by_chunk { part.chunks() } else { kv_heads }).sum();
    let more = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(tasks.max(1));
    for part in parts.iter_mut().filter(|part| part.by_chunk) {
        part.heads = kv_heads.div_ceil(more);
    }
    parts
}

/// Merges the states of a part's tasks, chunk after chunk, and writes its rows of the result.
fn put_together<S: Number>(part: &Part<'_>, states: Vec<State>, (out, log_weights): Rows<'_, S>, call: &Call<'_>) {
    let KvLayout { kv_heads, head_dim, .. } = *call.layout;
    let group = call.heads / kv_heads;
    let mut mean = vec![0f32; head_dim];
    let mut states = part.tasks(kv_heads).zip(states).peekable();
    while let Some(((heads, _), mut total)) = states.next() {
        while let Some((_, state)) = states.next_if(|((others, _), _)| *others == heads) {
            total.merge(&state);
        }
        let mut row = 0;
        for head in heads {
            for token in 0..part.tokens.len() {
                for member in 0..group {
                    let at = token * call.heads + head * group + member;
                    total.mean(row, &mut mean);
                    S::narrow(&mean, &mut out[at * head_dim..][..head_dim]);
                    log_weights[at] = total.log_weight(row);
                    row += 1;
                }
            }
        }
    }
}
