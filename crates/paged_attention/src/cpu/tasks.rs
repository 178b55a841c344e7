//! How a step is split into tasks.
//!
//! A sequence with few new tokens is bound by memory bandwidth: each chunk of its tokens is a task, for all key heads
//! or, if that gives too few tasks, for some. Sequences that read the same blocks in a chunk are one task there. A
//! sequence with many new tokens is bound by arithmetic: a few new tokens and one key head are a task, over all chunks.

use std::ops::Range;

use block_pool::KvLayout;

use super::Call;
use super::algorithm::{CHUNK, chunks};
use crate::plan::Planned;

/// The most rows of a task over the tokens of one sequence, unless the group of one token has more: few enough that the
/// data of a task fits a core's cache.
const TASK_ROWS: usize = 32;

/// The same if the values are in the keys: every task transposes the keys that it reads.
const TASK_ROWS_OF_KEYS: usize = 128;

/// The most rows of a task of several sequences, which bounds the memory for its states. (A part of them is computed at a
/// time: see `algorithm`.)
const MOST_SHARED_ROWS: usize = 512;

/// The fewest, if the threads have too few tasks otherwise.
const FEWEST_SHARED_ROWS: usize = 16;

/// The fewest tasks per thread, if heads can be split: some threads start late.
const TASKS_PER_THREAD: usize = 8;

/// Some consecutive new tokens of a sequence.
pub(super) struct QueryTile<'a> {
    /// The index of the sequence in the plan.
    sequence: usize,
    pub(super) planned: &'a Planned,
    pub(super) tokens: Range<usize>,
    /// The positions that the tokens see: sink tokens, and recent ones.
    seen: [Range<usize>; 2],
    /// The chunks that contain these positions, each once.
    chunks: [Range<usize>; 2],
    /// Whether each chunk is a task of its own.
    by_chunk: bool,
    /// How many tasks it is a member of.
    pub(super) tasks: usize,
}

/// The query tiles, heads and chunks that one task computes.
pub(super) struct TaskSpec {
    /// In [`Tasks::members`].
    pub(super) members: Range<usize>,
    pub(super) heads: Range<usize>,
    /// If there are several members, one chunk.
    pub(super) chunks: [Range<usize>; 2],
    /// The work of all tasks up to and including this one: new tokens times the tokens that they see, over all key
    /// heads.
    work_until: usize,
}

/// A query tile's part in a task.
#[derive(Clone, Copy)]
pub(super) struct Member {
    pub(super) query_tile: usize,
    /// The place of the task among those of the query tile in its key heads, in the order of their chunks.
    pub(super) turn: usize,
}

/// The tasks of a step.
pub(super) struct Tasks<'a> {
    pub(super) query_tiles: Vec<QueryTile<'a>>,
    pub(super) specs: Vec<TaskSpec>,
    pub(super) members: Vec<Member>,
}

impl<'a> Tasks<'a> {
    /// The tasks of a call. However they are split, the chunks of a row are merged one by one in their order.
    pub(super) fn of(call: &Call<'a>) -> Self {
        let query_tiles = split_queries(call);
        let mut tasks = Self { query_tiles, specs: Vec::new(), members: Vec::new() };
        let kv_heads = call.layout.kv_heads;
        let runs = tasks.shared_runs(call);
        // For each query tile, which of its chunks are read together with others.
        let mut together: Vec<Vec<usize>> = Vec::new();
        for run in &runs {
            together.resize_with(tasks.query_tiles.len(), Vec::new);
            run.members.iter().for_each(|&tile| together[tile].extend(run.chunks.clone()));
        }
        together.iter_mut().for_each(|chunks| chunks.sort_unstable());
        let together = |tile: usize| together.get(tile).map_or(&[][..], Vec::as_slice);
        let alone = tasks.query_tiles.iter().enumerate().map(|(i, tile)| match tile.by_chunk {
            true => tile.chunks.iter().map(Range::len).sum::<usize>() - together(i).len(),
            false => kv_heads,
        });
        let count = runs.iter().map(|run| run.chunks.len()).sum::<usize>() + alone.sum::<usize>();
        let enough = TASKS_PER_THREAD * rayon::current_num_threads();
        let step = kv_heads.div_ceil(enough.div_ceil(count.max(1)));
        let shared_step = step.min(tasks.shared_step(&runs, kv_heads, enough));
        for run in &runs {
            for heads in steps(kv_heads, shared_step) {
                for chunk in run.chunks.clone() {
                    tasks.push(&run.members, heads.clone(), [chunk..chunk + 1, 0..0]);
                }
            }
        }
        for i in 0..tasks.query_tiles.len() {
            let QueryTile { by_chunk, ref chunks, .. } = tasks.query_tiles[i];
            let chunks = chunks.clone();
            for heads in steps(kv_heads, if by_chunk { step } else { 1 }) {
                if !by_chunk {
                    tasks.push(&[i], heads, chunks.clone());
                    continue;
                }
                for chunk in chunks.iter().cloned().flatten().filter(|chunk| together(i).binary_search(chunk).is_err())
                {
                    tasks.push(&[i], heads.clone(), [chunk..chunk + 1, 0..0]);
                }
            }
        }
        tasks
    }

    /// How many key heads a task of several sequences has: each is as much work as many others.
    fn shared_step(&self, runs: &[SharedRun], kv_heads: usize, enough: usize) -> usize {
        let work = |run: &SharedRun| -> usize {
            let chunks = [run.chunks.start..run.chunks.start + 1, 0..0];
            run.members.iter().map(|&tile| self.query_tiles[tile].work(&chunks)).sum()
        };
        let largest = runs.iter().map(work).max().unwrap_or(0);
        kv_heads.div_ceil(largest.div_ceil((self.all_work() / enough).max(1)).max(1))
    }

    /// The work of all query tiles in one key head.
    fn all_work(&self) -> usize {
        self.query_tiles.iter().map(|tile| tile.work(&tile.chunks)).fold(0, usize::saturating_add)
    }

    /// The work of these tasks: new tokens times the tokens that they see, over all key heads.
    pub(super) fn work(&self, tasks: Range<usize>) -> usize {
        let until = |task: usize| task.checked_sub(1).map_or(0, |last| self.specs[last].work_until);
        until(tasks.end) - until(tasks.start)
    }

    /// The tasks from `start` on that are at least this much work together; at least one.
    pub(super) fn claim(&self, start: usize, work: usize) -> Range<usize> {
        let enough = self.work(0..start) + work;
        start..(start + 1).max(self.specs.partition_point(|task| task.work_until <= enough))
    }

    /// What query tiles read together.
    fn shared_runs(&self, call: &Call<'_>) -> Vec<SharedRun> {
        let mut runs: Vec<SharedRun> = Vec::new();
        let fewest_tokens = call.attention.shared_reads_from;
        if fewest_tokens == usize::MAX || self.query_tiles.len() < 2 {
            return runs;
        }
        // Sequences with few new tokens have one query tile.
        let mut tile_of = vec![None; call.plan.sequences.len()];
        for (i, tile) in self.query_tiles.iter().enumerate().filter(|(_, tile)| tile.by_chunk) {
            tile_of[tile.sequence] = Some(i);
        }
        let rows = self.shared_rows(call);
        let group = call.heads / call.layout.kv_heads;
        for run in &call.plan.shared(call.layout.block_size, fewest_tokens).runs {
            let tiles: Vec<usize> = run.sequences.iter().filter_map(|&sequence| tile_of[sequence]).collect();
            let seeing = |chunk: &usize| -> Vec<usize> {
                let sees = |tile: &usize| self.query_tiles[*tile].index_of(*chunk).is_some();
                tiles.iter().copied().filter(sees).collect()
            };
            let chunks: Vec<(usize, Vec<usize>)> = run.chunks.clone().map(|chunk| (chunk, seeing(&chunk))).collect();
            for alike in chunks.chunk_by(|a, b| a.1 == b.1) {
                let chunks = alike[0].0..alike[0].0 + alike.len();
                let parts = self.parts_of(&alike[0].1, group, rows);
                runs.extend(parts.into_iter().map(|members| SharedRun { members, chunks: chunks.clone() }));
            }
        }
        runs
    }

    /// How many rows a task of several sequences may have: so few that one head of a chunk is one of enough tasks.
    fn shared_rows(&self, call: &Call<'_>) -> usize {
        let KvLayout { kv_heads, .. } = *call.layout;
        let of_task = self.all_work().saturating_mul(kv_heads) / (TASKS_PER_THREAD * rayon::current_num_threads());
        (of_task / CHUNK).saturating_mul(call.heads / kv_heads).clamp(FEWEST_SHARED_ROWS, MOST_SHARED_ROWS)
    }

    /// Query tiles that have whole chunks in common, in parts of two or more, with about `most` rows.
    fn parts_of(&self, tiles: &[usize], group: usize, most: usize) -> Vec<Vec<usize>> {
        let rows = |tile: &usize| self.query_tiles[*tile].tokens.len() * group;
        let all: usize = tiles.iter().map(rows).sum();
        let enough = all.div_ceil(all.div_ceil(most).max(1));
        let mut parts = Vec::new();
        let mut left = tiles;
        while left.len() > 1 {
            let mut rows_of_part = 0;
            let fits = left.iter().take_while(|tile| {
                let fits = rows_of_part < enough;
                rows_of_part += rows(tile);
                fits
            });
            // Two or more, and none is left over alone.
            let n = fits.count().max(2);
            let n = if left.len() - n == 1 { left.len() } else { n };
            parts.push(left[..n].to_vec());
            left = &left[n..];
        }
        parts
    }

    /// Adds a task.
    fn push(&mut self, members: &[usize], heads: Range<usize>, chunks: [Range<usize>; 2]) {
        let first = self.members.len();
        let mut work = 0usize;
        for &query_tile in members {
            let tile = &mut self.query_tiles[query_tile];
            let turn = tile.index_of(chunks[0].start).filter(|_| tile.by_chunk).unwrap_or(0);
            debug_assert!(
                !tile.by_chunk || tile.index_of(chunks[0].start).is_some(),
                "a task has chunks that its tiles see"
            );
            tile.tasks += 1;
            work = work.saturating_add(tile.work(&chunks).saturating_mul(heads.len()));
            self.members.push(Member { query_tile, turn });
        }
        let members = first..self.members.len();
        let work_until = self.work(0..self.specs.len()).saturating_add(work);
        self.specs.push(TaskSpec { members, heads, chunks, work_until });
    }
}

/// The key heads in parts of `step`.
fn steps(kv_heads: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..kv_heads).step_by(step).map(move |head| head..kv_heads.min(head + step))
}

/// Two or more query tiles that read these chunks together.
struct SharedRun {
    members: Vec<usize>,
    chunks: Range<usize>,
}

impl QueryTile<'_> {
    /// The index of a chunk among those it sees.
    fn index_of(&self, chunk: usize) -> Option<usize> {
        let [sinks, recent] = &self.chunks;
        match sinks.contains(&chunk) {
            true => Some(chunk - sinks.start),
            false => recent.contains(&chunk).then(|| sinks.len() + chunk - recent.start),
        }
    }

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

/// Splits the new tokens of a step into query tiles, in the order of their rows.
fn split_queries<'a>(call: &Call<'a>) -> Vec<QueryTile<'a>> {
    let task_rows = if call.layout.values_in_keys { TASK_ROWS_OF_KEYS } else { TASK_ROWS };
    let tokens_per_task = (task_rows * call.layout.kv_heads / call.heads).max(1);
    let mut query_tiles = Vec::new();
    for (sequence, planned) in call.plan.sequences.iter().enumerate() {
        let by_chunk = planned.rows.len() <= tokens_per_task;
        for first in (0..planned.rows.len()).step_by(tokens_per_task) {
            let tokens = first..planned.rows.len().min(first + tokens_per_task);
            // The first token's window begins first, the last token's visible range ends last.
            let [first, last] = [tokens.start, tokens.end - 1].map(|token| planned.visible(token, call.attention));
            let seen = [0..last.sink_tokens, first.recent.start..last.recent.end];
            let chunks = chunks(&seen);
            query_tiles.push(QueryTile { sequence, planned, tokens, seen, chunks, by_chunk, tasks: 0 });
        }
    }
    query_tiles
}
