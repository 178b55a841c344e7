//! Runs the tasks of a step on any number of threads, and merges their results.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use block_pool::KvLayout;

use super::Call;
use super::algorithm::{Attend, NewToken, Scratch, Task};
use super::format::{Format, Number};
use super::merged::{Merged, Part};
use super::queries::{Prepare, Queries};
use super::recompute::{Inputs, TokenHead};
use super::state::State;
use super::tasks::{Member, QueryTile, TaskSpec, Tasks};

/// Multiply-adds of `q kᵀ` that justify one more thread: waking a thread takes tens of microseconds.
const WORK_PER_THREAD: usize = 1 << 17;

/// The work of one call. Any number of threads can run it together.
pub(super) struct Job<'a, S> {
    call: &'a Call<'a>,
    tasks: Tasks<'a>,
    /// How many tasks have been claimed: the index of the next one.
    claimed: AtomicUsize,
    threads: usize,
    /// One entry per query tile.
    results: Vec<Mutex<Results<'a, S>>>,
}

/// The results of a query tile so far.
struct Results<'a, S> {
    merged: Merged,
    /// Where the query tile's rows and their log-sum-exps are written.
    rows: (&'a mut [S], &'a mut [f32]),
}

/// What a thread keeps from task to task.
struct Worker<F: Format> {
    scratch: Scratch<F>,
    /// The query tiles that `tokens` and `queries` were prepared for, and the key heads of `queries`.
    ready: (Vec<usize>, Range<usize>),
    tokens: Vec<NewToken>,
    queries: F::Queries,
    /// Memory for the states of several members.
    spare: Option<State>,
}

impl<F: Format> Default for Worker<F> {
    fn default() -> Self {
        let (ready, tokens, queries) = ((Vec::new(), 0..0), Vec::new(), F::Queries::default());
        Self { scratch: Scratch::default(), ready, tokens, queries, spare: None }
    }
}

impl<'a, S: Number> Job<'a, S> {
    /// Attention of `q (tokens, heads, head_dim)`. The result is written to `out (tokens, heads, value_dim)`, and the
    /// log-sum-exp of each row, to base two, to `lse (tokens, heads)`.
    pub(super) fn new(call: &'a Call<'a>, mut out: &'a mut [S], mut lse: &'a mut [f32]) -> Self {
        let KvLayout { kv_heads, head_dim, value_dim, .. } = *call.layout;
        let tasks = Tasks::of(call);
        let work = tasks.work(0..tasks.specs.len()).saturating_mul(call.heads / kv_heads * head_dim);
        let threads = (work / WORK_PER_THREAD).min(tasks.specs.len()).clamp(1, rayon::current_num_threads());
        let results = tasks.query_tiles.iter().map(|tile| {
            let rows = tile.tokens.len() * call.heads;
            let tile_out = out.split_off_mut(..rows * value_dim).unwrap_or_default();
            let tile_lse = lse.split_off_mut(..rows).unwrap_or_default();
            Mutex::new(Results { merged: Merged::of(tile.tasks), rows: (tile_out, tile_lse) })
        });
        let results = results.collect();
        Self { call, tasks, claimed: AtomicUsize::new(0), threads, results }
    }

    /// How many threads are worth waking for this job.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Whether all tasks have been claimed.
    pub(super) fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::Relaxed) >= self.tasks.specs.len()
    }

    /// Claims and computes tasks until none is left. The job is done when this has returned in every thread that called
    /// it.
    pub(super) fn run<F: Format>(&self, layer: &[F::Number], q: &[S]) {
        let (inputs, mut worker) = (self.inputs::<F>(layer, q), Worker::default());
        while let Some(claimed) = self.claim() {
            for spec in &self.tasks.specs[claimed] {
                self.compute(spec, &inputs, &mut worker);
            }
        }
    }

    fn inputs<'b, F: Format>(&self, layer: &'b [F::Number], q: &'b [S]) -> Inputs<'b, F, S>
    where
        'a: 'b,
    {
        let call = self.call;
        let head_dim = call.layout.head_dim;
        let queries = Queries { numbers: q, heads: call.heads, head_dim, factor: call.attention.factor() };
        Inputs { call, layer, queries }
    }

    /// Claims consecutive tasks for the calling thread: one thread's share of the work that is left. Neighbouring tasks
    /// read memory in sequence, which is faster. Each claim is smaller than the one before, so that all threads finish
    /// at about the same time.
    fn claim(&self) -> Option<Range<usize>> {
        let all = self.tasks.specs.len();
        let range = |start| self.tasks.claim(start, self.tasks.work(start..all).div_ceil(self.threads));
        let more = |start| (start < all).then(|| range(start).end);
        // Relaxed suffices: the tasks were created before any thread started, and only their indices are handed out.
        let start = self.claimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(range(start))
    }

    /// Computes a task: all rows of its members together.
    fn compute<F: Format>(&self, spec: &TaskSpec, inputs: &Inputs<'_, F, S>, worker: &mut Worker<F>) {
        let members = &self.tasks.members[spec.members.clone()];
        let state = self.attend(spec, members, inputs, worker);
        if let &[Member { query_tile, turn }] = members {
            let part = Part { heads: spec.heads.clone(), turn, state };
            self.submit(query_tile, |merged| merged.add(part), inputs, worker);
            return;
        }
        let rows = self.rows(members, inputs.group());
        let mut first = 0;
        for member in members {
            let own = first..first + self.rows(std::slice::from_ref(member), inputs.group());
            first = own.end;
            let part = state.part(rows, own);
            self.submit(member.query_tile, |merged| merged.add_rows(&spec.heads, member.turn, &part), inputs, worker);
        }
        worker.spare = Some(state);
    }

    /// How many rows these members have in a key head.
    fn rows(&self, members: &[Member], group: usize) -> usize {
        members.iter().map(|member| self.tasks.query_tiles[member.query_tile].tokens.len() * group).sum()
    }

    /// Computes the rows of a task's members, which have the same tokens there.
    fn attend<F: Format>(
        &self,
        spec: &TaskSpec,
        members: &[Member],
        inputs: &Inputs<'_, F, S>,
        worker: &mut Worker<F>,
    ) -> State {
        let Call { attention, kernel, .. } = *self.call;
        let tiles = || members.iter().map(|member| member.query_tile);
        let other_tiles = !worker.ready.0.iter().copied().eq(tiles());
        if other_tiles {
            worker.ready.0.clear();
            worker.ready.0.extend(tiles());
            worker.tokens.clear();
            for tile in tiles().map(|tile| &self.tasks.query_tiles[tile]) {
                let new = |token| NewToken::of(tile.planned, token, attention);
                worker.tokens.extend(tile.tokens.clone().map(new));
            }
        }
        if other_tiles || worker.ready.1 != spec.heads {
            worker.ready.1 = spec.heads.clone();
            let (queries, tokens, key_heads, to) = (&inputs.queries, &worker.tokens, &spec.heads, &mut worker.queries);
            kernel.run(Prepare::<F, S> { queries, tokens, key_heads, group: inputs.group(), to });
        }
        let task = Task {
            blocks: inputs.blocks(self.tasks.query_tiles[members[0].query_tile].planned, false),
            attention,
            queries: &worker.queries,
            group: inputs.group(),
            heads: spec.heads.clone(),
            tokens: &worker.tokens,
            chunks: spec.chunks.clone(),
        };
        let rows = spec.heads.len() * worker.tokens.len() * inputs.group();
        let dims = task.blocks.dims();
        let mut state = match worker.spare.take_if(|_| members.len() > 1) {
            Some(mut spare) => {
                spare.reset(rows, dims);
                spare
            }
            None => State::new(rows, dims),
        };
        kernel.run(Attend(&task, &mut worker.scratch, &mut state));
        state
    }

    /// Adds the state of a member of a task to those of its query tile: `add` returns whether it is the last, and then
    /// this thread finishes the tile.
    fn submit<F: Format>(
        &self,
        query_tile: usize,
        add: impl FnOnce(&mut Merged) -> bool,
        inputs: &Inputs<'_, F, S>,
        worker: &mut Worker<F>,
    ) {
        // A thread that panics leaves a state missing, and then no thread finishes the query tile.
        let mut results = self.results[query_tile].lock().unwrap_or_else(PoisonError::into_inner);
        if add(&mut results.merged) {
            let merged = std::mem::replace(&mut results.merged, Merged::of(0));
            let tile = &self.tasks.query_tiles[query_tile];
            self.finish(tile, merged, &mut results.rows, inputs, &mut worker.scratch);
        }
    }

    /// Writes the rows of a query tile. Rows that are not finite are recomputed.
    fn finish<F: Format>(
        &self,
        tile: &QueryTile<'_>,
        merged: Merged,
        (out, lse): &mut (&mut [S], &mut [f32]),
        inputs: &Inputs<'_, F, S>,
        scratch: &mut Scratch<F>,
    ) {
        let value_dim = self.call.layout.value_dim;
        let (heads, group) = (self.call.heads, inputs.group());
        let mut output = vec![0f32; value_dim];
        for Part { heads: key_heads, mut state, .. } in merged.into_parts() {
            let mut row = 0;
            for head in key_heads {
                for (i, token) in tile.tokens.clone().enumerate() {
                    let mut recomputed = None;
                    for member in 0..group {
                        let at = i * heads + head * group + member;
                        if let Some(logit) = self.call.attention.sink_logit(head * group + member) {
                            state.add_sink_logit(row, logit);
                        }
                        state.write_output(row, &mut output);
                        lse[at] = state.lse(row);
                        if !state.is_finite(row, &output) {
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

#[cfg(test)]
mod tests {
    use block_pool::{KvShape, Order};

    use super::super::format::Float;
    use super::*;
    use crate::plan::Plan;
    use crate::{Attention, Kernel};

    const DIM: usize = 16;

    /// Numbers between -1 and 1.
    fn numbers(n: usize) -> Vec<f32> {
        (0..n as u32).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 16) as f32 / 32768.0 - 1.0).collect()
    }

    /// Each order of a job's tasks gives the same numbers as every sequence alone, also if one thread computes them all.
    #[test]
    fn tasks_can_be_computed_in_any_order() {
        let mut random = 1u64;
        let mut below = |n: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % n
        };
        for (heads, kv_heads, sequences) in [(16, 8, 6), (9, 3, 20), (12, 4, 2), (4, 1, 5)] {
            let layout = KvLayout::new(&KvShape::new(1, kv_heads, DIM), 64, Order::Panels);
            // 704 tokens of a prompt, of which the second chunk has some, and 500 of their own.
            let mut plan = Plan::default();
            for sequence in 0..sequences {
                let own = (0..8).map(|block| 11 + sequence * 8 + block);
                plan.push_last(1, 704 + 500, (0..11).chain(own));
            }
            let layer = numbers((11 + sequences as usize * 8) * layout.block_elements());
            let q = numbers(sequences as usize * heads * DIM);
            let mut expected = Vec::new();
            for (round, shared) in (0..12).map(|round| (round, round > 0)) {
                let attention = Attention::scaled_by(DIM).shared_reads_from(if shared { 0 } else { usize::MAX });
                let call =
                    Call { layout: &layout, plan: &plan, heads, attention: &attention, kernel: Kernel::Portable };
                let (mut out, mut lse) = (vec![0f32; q.len()], vec![0f32; sequences as usize * heads]);
                let job = Job::new(&call, &mut out, &mut lse);
                assert_eq!(job.tasks.specs.iter().any(|spec| spec.members.len() > 1), shared);
                let (inputs, mut worker) = (job.inputs::<Float<f32>>(&layer, &q), Worker::default());
                let mut left: Vec<&TaskSpec> = job.tasks.specs.iter().collect();
                while !left.is_empty() {
                    // Most often a task of the same first head, whose query rows may be packed already.
                    let last = worker.ready.1.start;
                    let like = left.iter().position(|spec| spec.heads.start == last).filter(|_| below(4) > 0);
                    let next = like.unwrap_or_else(|| below(left.len()));
                    job.compute(left.swap_remove(next), &inputs, &mut worker);
                }
                drop(job);
                let bits: Vec<u32> = out.iter().chain(&lse).map(|x| x.to_bits()).collect();
                match round {
                    0 => expected = bits,
                    _ => assert!(bits == expected, "{heads}/{kv_heads}, {sequences} sequences, round {round}"),
                }
            }
        }
    }
}
