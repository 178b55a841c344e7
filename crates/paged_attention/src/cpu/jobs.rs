//! How a step is cut into tasks, and what the threads have computed put together.
//!
//! Where a sequence has few new tokens, the work is reading: each chunk of its tokens is a task of its own, for all key
//! heads or, if that gives too few tasks, for some. Where it has many, the work is multiplying: a few new tokens and one
//! key head are a task, over all chunks.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use block_pool::KvLayout;

use super::Call;
use super::algorithm::{Attend, CHUNK, Scratch, Task, chunks};
use super::careful::{Rows, Source};
use super::format::{Format, Number};
use super::queries::Queries;
use super::state::State;
use crate::plan::Span;

/// Rows that a task has at most, unless one token's group has more: as many as keep what it works on in a core's cache.
const TASK_ROWS: usize = 32;

/// Tasks for each thread, at least, if heads can be shared out: some threads come late.
const TASKS_PER_THREAD: usize = 8;

/// Products of a query's number and a key's that are worth another thread: waking one takes tens of microseconds.
const WORTH_A_THREAD: usize = 1 << 17;

/// The work of one call: any number of threads can run it together.
pub(super) struct Job<'a, S> {
    call: &'a Call<'a>,
    parts: Vec<Part<'a>>,
    /// Those of each part behind those of the part before.
    shares: Vec<Share>,
    /// How many of them have been taken up.
    taken: AtomicUsize,
    threads: usize,
    /// For each part.
    results: Vec<Mutex<Results<'a, S>>>,
}

/// Some new tokens of a sequence.
struct Part<'a> {
    span: &'a Span,
    tokens: Range<usize>,
    /// The positions that the tokens see: sinks, and recent ones.
    seen: [Range<usize>; 2],
    /// The chunks that these are in, each once.
    chunks: [Range<usize>; 2],
    /// Whether each chunk is a task of its own.
    by_chunk: bool,
    /// Its tasks.
    shares: Range<usize>,
}

/// What a task is of its part: heads, and chunks.
struct Share {
    part: usize,
    heads: Range<usize>,
    chunks: [Range<usize>; 2],
    /// The work of all tasks up to its end: new tokens times what they see, in each key head.
    until: usize,
}

/// What is known of a part so far.
struct Results<'a, S> {
    /// A state for each task.
    states: Vec<Option<State>>,
    missing: usize,
    /// Where the part's rows go, and the logarithms of their weights.
    rows: (&'a mut [S], &'a mut [f32]),
}

impl<'a, S: Number> Job<'a, S> {
    /// Attention of `q (tokens, heads, head_dim)`. The result goes to `out`, of which there is as much, and the logarithm, to
    /// base two, of the weight that each row has seen to `log_weights (tokens, heads)`.
    pub(super) fn new(call: &'a Call<'a>, mut out: &'a mut [S], mut log_weights: &'a mut [f32]) -> Self {
        let KvLayout { kv_heads, head_dim, .. } = *call.layout;
        let mut parts = parts(call);
        let shares = shares(&mut parts, kv_heads);
        let work = until(&shares).saturating_mul(call.heads / kv_heads * head_dim);
        let threads = (work / WORTH_A_THREAD).min(shares.len()).clamp(1, rayon::current_num_threads());
        let results = parts.iter().map(|part| {
            let rows = part.tokens.len() * call.heads;
            let own = out.split_off_mut(..rows * head_dim).unwrap_or_default();
            let own_weights = log_weights.split_off_mut(..rows).unwrap_or_default();
            let missing = part.shares.len();
            let states = (0..missing).map(|_| None).collect();
            Mutex::new(Results { states, missing, rows: (own, own_weights) })
        });
        let results = results.collect();
        Self { call, parts, shares, taken: AtomicUsize::new(0), threads, results }
    }

    /// How many threads it is worth.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Whether threads have taken up everything.
    pub(super) fn is_taken_up(&self) -> bool {
        self.taken.load(Ordering::Relaxed) >= self.shares.len()
    }

    /// Works until everything is taken up. It is done when all who run it have returned.
    pub(super) fn run<F: Format>(&self, layer: &[F::Number], q: &[S]) {
        let Self { call, .. } = *self;
        let KvLayout { kv_heads, head_dim, .. } = *call.layout;
        let q = Queries { numbers: q, heads: call.heads, head_dim, factor: call.attention.factor() };
        let source = Source { call, layer, queries: q };
        let mut queries = F::Queries::default();
        let mut scratch = Scratch::<F>::default();
        // Whose rows are in `queries`.
        let mut ready = None;
        while let Some(shares) = self.take_up() {
            for i in shares {
                let share = &self.shares[i];
                let part = &self.parts[share.part];
                let rows = (share.part, share.heads.start);
                if ready.replace(rows) != Some(rows) {
                    q.prepare::<F>(part.span, &part.tokens, &share.heads, kv_heads, &mut queries);
                }
                let task = Task {
                    blocks: source.blocks(part.span, false),
                    attention: call.attention,
                    queries: &queries,
                    group: source.group(),
                    heads: share.heads.clone(),
                    tokens: part.tokens.clone(),
                    chunks: share.chunks.clone(),
                };
                let state = call.kernel.run(Attend(&task, &mut scratch));
                self.hand_in(i, state, &source, &mut scratch);
            }
        }
    }

    /// Tasks for one thread, which has them for itself: its share of the work that is left. They are neighbours, which read
    /// faster one behind the other, and fewer each time, so that all threads come to the end together.
    fn take_up(&self) -> Option<Range<usize>> {
        let end = |start: usize| {
            let (before, all) = (until(&self.shares[..start]), until(&self.shares));
            let enough = before + (all - before).div_ceil(self.threads);
            (start + 1).max(self.shares.partition_point(|share| share.until <= enough))
        };
        let more = |start| (start < self.shares.len()).then(|| end(start));
        // Tasks are there since before any thread came; only their numbers are handed out.
        let start = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(start..end(start))
    }

    /// Takes in a task's state; the last of a part puts it together.
    fn hand_in<F: Format>(&self, i: usize, state: State, source: &Source<'_, F, S>, scratch: &mut Scratch<F>) {
        let part = &self.parts[self.shares[i].part];
        // Who panics leaves a state missing, and then nobody puts the part together.
        let mut results = self.results[self.shares[i].part].lock().unwrap_or_else(PoisonError::into_inner);
        results.states[i - part.shares.start] = Some(state);
        results.missing -= 1;
        if results.missing == 0 {
            let states = results.states.drain(..).flatten().collect();
            self.put_together(part, states, &mut results.rows, source, scratch);
        }
    }

    /// Merges the states of a part's tasks, chunk after chunk, and writes its rows of the result. Those that are not finite
    /// are computed again.
    fn put_together<F: Format>(
        &self,
        part: &Part<'_>,
        states: Vec<State>,
        (out, log_weights): &mut (&mut [S], &mut [f32]),
        source: &Source<'_, F, S>,
        scratch: &mut Scratch<F>,
    ) {
        let head_dim = self.call.layout.head_dim;
        let (heads, group) = (self.call.heads, source.group());
        let mut mean = vec![0f32; head_dim];
        let mut states = self.shares[part.shares.clone()].iter().zip(states).peekable();
        while let Some((share, mut total)) = states.next() {
            while let Some((_, state)) = states.next_if(|(other, _)| other.heads == share.heads) {
                total.merge(&state);
            }
            let mut row = 0;
            for head in share.heads.clone() {
                for (i, token) in part.tokens.clone().enumerate() {
                    let mut again = None;
                    for member in 0..group {
                        let at = i * heads + head * group + member;
                        total.mean(row, &mut mean);
                        log_weights[at] = total.log_weight(row);
                        if !total.is_finite(row, &mean) {
                            let rows = Rows { span: part.span, token, head };
                            log_weights[at] = source.again(&rows, member, &mut mean, &mut again, scratch);
                        }
                        S::narrow(&mean, &mut out[at * head_dim..][..head_dim]);
                        row += 1;
                    }
                }
            }
        }
    }
}

impl Part<'_> {
    /// How much some of its chunks are to one of its heads.
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

/// The work of these tasks and of all before them.
fn until(shares: &[Share]) -> usize {
    shares.last().map_or(0, |share| share.until)
}

/// Cuts a step into parts, in the order of their rows.
fn parts<'a>(call: &Call<'a>) -> Vec<Part<'a>> {
    let tokens_per_task = (TASK_ROWS * call.layout.kv_heads / call.heads).max(1);
    let mut parts = Vec::new();
    for span in &call.plan.spans {
        let by_chunk = span.rows.len() <= tokens_per_task;
        for first in (0..span.rows.len()).step_by(tokens_per_task) {
            let tokens = first..span.rows.len().min(first + tokens_per_task);
            // The first token looks back furthest, the last one sees furthest.
            let [first, last] = [tokens.start, tokens.end - 1].map(|token| span.sight(token, call.attention));
            let seen = [0..last.sinks, first.recent.start..last.recent.end];
            let chunks = chunks(&seen);
            parts.push(Part { span, tokens, seen, chunks, by_chunk, shares: 0..0 });
        }
    }
    parts
}

/// Cuts parts into tasks: chunks inside heads. However they are shared out, each chunk is merged into those before it.
fn shares(parts: &mut [Part<'_>], kv_heads: usize) -> Vec<Share> {
    let chunks = |part: &Part<'_>| part.chunks.iter().map(Range::len).sum();
    let tasks: usize = parts.iter().map(|part| if part.by_chunk { chunks(part) } else { kv_heads }).sum();
    let more = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(tasks.max(1));
    let mut shares = Vec::new();
    let mut until = 0;
    for (i, part) in parts.iter_mut().enumerate() {
        let first = shares.len();
        let step = if part.by_chunk { kv_heads.div_ceil(more) } else { 1 };
        for head in (0..kv_heads).step_by(step) {
            let heads = head..kv_heads.min(head + step);
            let mut push = |chunks: [Range<usize>; 2]| {
                until = part.work(&chunks).saturating_mul(heads.len()).saturating_add(until);
                shares.push(Share { part: i, heads: heads.clone(), chunks, until });
            };
            if part.by_chunk {
                part.chunks.iter().cloned().flatten().for_each(|chunk| push([chunk..chunk + 1, 0..0]));
            } else {
                push(part.chunks.clone());
            }
        }
        part.shares = first..shares.len();
    }
    shares
}
