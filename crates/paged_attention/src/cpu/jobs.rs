//! How a step is split into tasks, and how the results of the tasks are merged.
//!
//! A sequence with few new tokens is bound by memory bandwidth: each chunk of its tokens is a task, for all key heads
//! or, if that gives too few tasks, for some. A sequence with many new tokens is bound by arithmetic: a few new tokens
//! and one key head are a task, over all chunks.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use block_pool::KvLayout;

use super::Call;
use super::algorithm::{Attend, CHUNK, Scratch, Task, chunks};
use super::format::{Format, Number};
use super::queries::Queries;
use super::recompute::{Inputs, TokenHead};
use super::state::State;
use crate::plan::Planned;

/// The most rows of a task, unless the group of one token has more: few enough that the data of a task fits a core's
/// cache.
const TASK_ROWS: usize = 32;

/// The same if the values are in the keys: every task transposes the keys that it reads.
const TASK_ROWS_OF_KEYS: usize = 128;

/// The fewest tasks per thread, if heads can be split: some threads start late.
const TASKS_PER_THREAD: usize = 8;

/// Multiply-adds of `q kᵀ` that justify one more thread: waking a thread takes tens of microseconds.
const WORK_PER_THREAD: usize = 1 << 17;

/// The work of one call. Any number of threads can run it together.
pub(super) struct Job<'a, S> {
    call: &'a Call<'a>,
    query_tiles: Vec<QueryTile<'a>>,
    /// The tasks, grouped by query tile, in the order of the query tiles.
    tasks: Vec<TaskSpec>,
    /// How many tasks have been claimed: the index of the next one.
    claimed: AtomicUsize,
    threads: usize,
    /// One entry per query tile.
    results: Vec<Mutex<Results<'a, S>>>,
}

/// Some consecutive new tokens of a sequence.
struct QueryTile<'a> {
    planned: &'a Planned,
    tokens: Range<usize>,
    /// The positions that the tokens see: sink tokens, and recent ones.
    seen: [Range<usize>; 2],
    /// The chunks that contain these positions, each once.
    chunks: [Range<usize>; 2],
    /// Whether each chunk is a task of its own.
    by_chunk: bool,
    /// Its tasks.
    tasks: Range<usize>,
}

/// The heads and chunks of a query tile that one task computes.
struct TaskSpec {
    query_tile: usize,
    heads: Range<usize>,
    chunks: [Range<usize>; 2],
    /// The work of all tasks up to and including this one: new tokens times the tokens that they see, over all key
    /// heads.
    work_until: usize,
}

/// The results of a query tile so far.
struct Results<'a, S> {
    /// One state per task.
    states: Vec<Option<State>>,
    missing: usize,
    /// Where the query tile's rows and their log-sum-exps are written.
    rows: (&'a mut [S], &'a mut [f32]),
}

impl<'a, S: Number> Job<'a, S> {
    /// Attention of `q (tokens, heads, head_dim)`. The result is written to `out (tokens, heads, value_dim)`, and the
    /// log-sum-exp of each row, to base two, to `lse (tokens, heads)`.
    pub(super) fn new(call: &'a Call<'a>, mut out: &'a mut [S], mut lse: &'a mut [f32]) -> Self {
        let KvLayout { kv_heads, head_dim, value_dim, .. } = *call.layout;
        let mut query_tiles = split_queries(call);
        let tasks = split_tasks(&mut query_tiles, kv_heads);
        let work = total_work(&tasks).saturating_mul(call.heads / kv_heads * head_dim);
        let threads = (work / WORK_PER_THREAD).min(tasks.len()).clamp(1, rayon::current_num_threads());
        let results = query_tiles.iter().map(|tile| {
            let rows = tile.tokens.len() * call.heads;
            let tile_out = out.split_off_mut(..rows * value_dim).unwrap_or_default();
            let tile_lse = lse.split_off_mut(..rows).unwrap_or_default();
            let missing = tile.tasks.len();
            let states = (0..missing).map(|_| None).collect();
            Mutex::new(Results { states, missing, rows: (tile_out, tile_lse) })
        });
        let results = results.collect();
        Self { call, query_tiles, tasks, claimed: AtomicUsize::new(0), threads, results }
    }

    /// How many threads are worth waking for this job.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Whether all tasks have been claimed.
    pub(super) fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::Relaxed) >= self.tasks.len()
    }

    /// Claims and computes tasks until none is left. The job is done when this has returned in every thread that called
    /// it.
    pub(super) fn run<F: Format>(&self, layer: &[F::Number], q: &[S]) {
        let Self { call, .. } = *self;
        let KvLayout { kv_heads, head_dim, .. } = *call.layout;
        let q = Queries { numbers: q, heads: call.heads, head_dim, factor: call.attention.factor() };
        let inputs = Inputs { call, layer, queries: q };
        let mut queries = F::Queries::default();
        let mut scratch = Scratch::<F>::default();
        // The query tile and the first key head that `queries` was prepared for.
        let mut ready = None;
        while let Some(claimed) = self.claim() {
            for i in claimed {
                let spec = &self.tasks[i];
                let tile = &self.query_tiles[spec.query_tile];
                let rows = (spec.query_tile, spec.heads.start);
                if ready.replace(rows) != Some(rows) {
                    q.prepare::<F>(tile.planned, &tile.tokens, &spec.heads, kv_heads, &mut queries);
                }
                let task = Task {
                    blocks: inputs.blocks(tile.planned, false),
                    attention: call.attention,
                    queries: &queries,
                    group: inputs.group(),
                    heads: spec.heads.clone(),
                    tokens: tile.tokens.clone(),
                    chunks: spec.chunks.clone(),
                };
                let state = call.kernel.run(Attend(&task, &mut scratch));
                self.submit(i, state, &inputs, &mut scratch);
            }
        }
    }

    /// Claims consecutive tasks for the calling thread: one thread's share of the work that is left. Neighbouring tasks
    /// read memory in sequence, which is faster. Each claim is smaller than the one before, so that all threads finish
    /// at about the same time.
    fn claim(&self) -> Option<Range<usize>> {
        let end = |start: usize| {
            let (before, all) = (total_work(&self.tasks[..start]), total_work(&self.tasks));
            let enough = before + (all - before).div_ceil(self.threads);
            (start + 1).max(self.tasks.partition_point(|task| task.work_until <= enough))
        };
        let more = |start| (start < self.tasks.len()).then(|| end(start));
        // Relaxed suffices: the tasks were created before any thread started, and only their indices are handed out.
        let start = self.claimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(start..end(start))
    }

    /// Stores a task's state. The thread that stores the last state of a query tile finishes the tile.
    fn submit<F: Format>(&self, i: usize, state: State, inputs: &Inputs<'_, F, S>, scratch: &mut Scratch<F>) {
        let tile = &self.query_tiles[self.tasks[i].query_tile];
        // A thread that panics leaves a state missing, and then no thread finishes the query tile.
        let mut results = self.results[self.tasks[i].query_tile].lock().unwrap_or_else(PoisonError::into_inner);
        results.states[i - tile.tasks.start] = Some(state);
        results.missing -= 1;
        if results.missing == 0 {
            let states = results.states.drain(..).flatten().collect();
            self.finish(tile, states, &mut results.rows, inputs, scratch);
        }
    }

    /// Merges the states of a query tile's tasks in the order of their chunks, and writes the tile's rows of the
    /// result. Rows that are not finite are recomputed.
    fn finish<F: Format>(
        &self,
        tile: &QueryTile<'_>,
        states: Vec<State>,
        (out, lse): &mut (&mut [S], &mut [f32]),
        inputs: &Inputs<'_, F, S>,
        scratch: &mut Scratch<F>,
    ) {
        let value_dim = self.call.layout.value_dim;
        let (heads, group) = (self.call.heads, inputs.group());
        let mut output = vec![0f32; value_dim];
        let mut states = self.tasks[tile.tasks.clone()].iter().zip(states).peekable();
        while let Some((spec, mut total)) = states.next() {
            while let Some((_, state)) = states.next_if(|(other, _)| other.heads == spec.heads) {
                total.merge(&state);
            }
            let mut row = 0;
            for head in spec.heads.clone() {
                for (i, token) in tile.tokens.clone().enumerate() {
                    let mut recomputed = None;
                    for member in 0..group {
                        let at = i * heads + head * group + member;
                        if let Some(logit) = self.call.attention.sink_logit(head * group + member) {
                            total.add_sink_logit(row, logit);
                        }
                        total.write_output(row, &mut output);
                        lse[at] = total.lse(row);
                        if !total.is_finite(row, &output) {
                            let rows = TokenHead { planned: tile.planned, token, head };
                            lse[at] = inputs.recompute(&rows, member, &mut output, &mut recomputed, scratch);
                        }
                        S::narrow(&output, &mut out[at * value_dim..][..value_dim]);
                        row += 1;
                    }
                }
            }
        }
    }
}

impl QueryTile<'_> {
    /// The work of these chunks in one key head: new tokens times the tokens that they see there.
    fn work(&self, chunks: &[Range<usize>; 2]) -> usize {
        let seen = |chunks: &Range<usize>| {
            let within = |seen: &Range<usize>| {
                let start = seen.start.max(chunks.start * CHUNK);
                seen.end.min(chunks.end * CHUNK).saturating_sub(start)
            };
            self.seen.iter().map(within).sum::<usize>()
        };
        self.tokens.len().saturating_mul(chunks.iter().map(seen).sum::<usize>())
    }
}

/// The work of these tasks and of all tasks before them.
fn total_work(tasks: &[TaskSpec]) -> usize {
    tasks.last().map_or(0, |task| task.work_until)
}

/// Splits the new tokens of a step into query tiles, in the order of their rows.
fn split_queries<'a>(call: &Call<'a>) -> Vec<QueryTile<'a>> {
    let task_rows = if call.layout.values_in_keys { TASK_ROWS_OF_KEYS } else { TASK_ROWS };
    let tokens_per_task = (task_rows * call.layout.kv_heads / call.heads).max(1);
    let mut query_tiles = Vec::new();
    for planned in &call.plan.sequences {
        let by_chunk = planned.rows.len() <= tokens_per_task;
        for first in (0..planned.rows.len()).step_by(tokens_per_task) {
            let tokens = first..planned.rows.len().min(first + tokens_per_task);
            // The first token's window begins first, the last token's visible range ends last.
            let [first, last] = [tokens.start, tokens.end - 1].map(|token| planned.visible(token, call.attention));
            let seen = [0..last.sink_tokens, first.recent.start..last.recent.end];
            let chunks = chunks(&seen);
            query_tiles.push(QueryTile { planned, tokens, seen, chunks, by_chunk, tasks: 0..0 });
        }
    }
    query_tiles
}

/// Splits query tiles into tasks, by heads and, within heads, by chunks. However they are split, the chunks of a row
/// are merged one by one in their order.
fn split_tasks(query_tiles: &mut [QueryTile<'_>], kv_heads: usize) -> Vec<TaskSpec> {
    let chunks = |tile: &QueryTile<'_>| tile.chunks.iter().map(Range::len).sum();
    let count: usize = query_tiles.iter().map(|tile| if tile.by_chunk { chunks(tile) } else { kv_heads }).sum();
    let more = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(count.max(1));
    let mut tasks = Vec::new();
    let mut work_until = 0;
    for (i, tile) in query_tiles.iter_mut().enumerate() {
        let first = tasks.len();
        let step = if tile.by_chunk { kv_heads.div_ceil(more) } else { 1 };
        for head in (0..kv_heads).step_by(step) {
            let heads = head..kv_heads.min(head + step);
            let mut push = |chunks: [Range<usize>; 2]| {
                work_until = tile.work(&chunks).saturating_mul(heads.len()).saturating_add(work_until);
                tasks.push(TaskSpec { query_tile: i, heads: heads.clone(), chunks, work_until });
            };
            if tile.by_chunk {
                tile.chunks.iter().cloned().flatten().for_each(|chunk| push([chunk..chunk + 1, 0..0]));
            } else {
                push(tile.chunks.clone());
            }
        }
        tile.tasks = first..tasks.len();
    }
    tasks
}
