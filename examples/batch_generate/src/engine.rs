//! Continuous batching: sequences join the running ones when blocks allow, and leave when they finish.
//!
//! When the pool is full, the sequence with the fewest computed tokens goes back to the front of the queue and is
//! computed again later: nothing it has said is lost.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use paged_attention::{KvCache, PushError, SequenceId, Sequences};

use crate::model::Model;
use crate::sampling::{Random, Sampling};

/// New tokens of one step, at most: long prompts are computed in pieces, so that the others go on talking.
const STEP_TOKENS: usize = 512;

/// A prompt in tokens, and how long its answer may be.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Tokens of the answer, at most.
    pub max_tokens: usize,
}

/// How to answer.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Sequences that run together, at most.
    pub max_batch: usize,
    /// Answers for each prompt.
    pub samples: usize,
    /// Sample `i` draws with `seed + i`.
    pub seed: u64,
    /// How tokens are drawn.
    pub sampling: Sampling,
}

/// One answer to one prompt.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Which request it answers.
    pub request: usize,
    /// The generated tokens, the end token included if the model came to an end.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that it did not have to compute, because another answer to the same prompt had.
    pub cached_tokens: usize,
    /// How often it had to make room for others.
    pub preemptions: usize,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Request after request, sample after sample.
    pub answers: Vec<Answer>,
    /// Forward passes.
    pub steps: usize,
    /// The most blocks held at once.
    pub peak_blocks: usize,
    /// Tokens per reserved slot, the mean over all steps; more than 1 when sequences share blocks.
    pub mean_utilisation: f64,
    /// New tokens in steps that computed some prompt, and the time of these steps.
    pub prefill: Work,
    /// New tokens in all other steps, and their time.
    pub decode: Work,
}

/// Tokens, and the time they took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    /// Tokens.
    pub tokens: usize,
    /// Time.
    pub time: Duration,
}

impl Work {
    /// Tokens per second, or nothing if there were none.
    pub fn rate(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.tokens as f64 / self.time.as_secs_f64())
    }
}

/// How far it has come, told after every step.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Tokens generated so far, of all answers.
    pub generated: usize,
    /// Answers that are complete.
    pub finished: usize,
    /// Sequences running.
    pub running: usize,
    /// Sequences waiting.
    pub waiting: usize,
    /// Blocks held.
    pub held: usize,
}

/// Answers all requests.
///
/// # Errors
///
/// If a request can never be answered with this model and pool: then nothing is computed. If a step fails.
pub fn generate(
    model: &Model,
    cache: &KvCache,
    requests: &[Request],
    settings: &Settings,
    is_end: impl Fn(u32) -> bool,
    mut progress: impl FnMut(Progress),
) -> Result<Outcome> {
    check(model, cache, requests, settings)?;
    let mut engine = Engine::new(cache, requests, settings);
    while engine.admit() {
        engine.step(model, &is_end)?;
        progress(engine.progress());
    }
    Ok(engine.outcome())
}

/// Refuses at once what could only fail later.
fn check(model: &Model, cache: &KvCache, requests: &[Request], settings: &Settings) -> Result<()> {
    ensure!(settings.samples > 0, "0 samples were asked for, at least one answer is needed");
    ensure!(
        settings.samples <= settings.max_batch,
        "{} samples of a prompt do not fit into a batch of {}",
        settings.samples,
        settings.max_batch
    );
    let pool = cache.pool();
    for (i, Request { prompt, max_tokens }) in requests.iter().enumerate() {
        let (i, n) = (i + 1, prompt.len());
        ensure!(n > 0, "prompt {i} has no tokens");
        ensure!(*max_tokens > 0, "0 tokens of answer were asked for, at least one is needed");
        let total = n.saturating_add(*max_tokens);
        ensure!(
            total <= model.context(),
            "prompt {i} has {n} tokens and may get {max_tokens} more, the model's context is {} tokens",
            model.context()
        );
        // The last token is never computed, so it needs no slot.
        let needed = pool.blocks_for(total - 1);
        ensure!(
            needed <= pool.blocks(),
            "prompt {i} has {n} tokens and may get {max_tokens} more: that takes {needed} blocks of {} tokens, the \
             pool has {}",
            pool.block_size(),
            pool.blocks()
        );
    }
    Ok(())
}

struct Sequence {
    answer: Answer,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    max_tokens: usize,
    random: Random,
}

/// Sequences that start with the same tokens, and so are computed once: the samples of a prompt, until they part.
type Group = Vec<usize>;

struct Running {
    id: SequenceId,
    group: Group,
}

struct Engine<'a> {
    cache: &'a KvCache,
    settings: &'a Settings,
    sequences: Vec<Sequence>,
    tables: Sequences,
    waiting: VecDeque<Group>,
    running: Vec<Running>,
    finished: usize,
    utilisation: f64,
    outcome: Outcome,
}

impl<'a> Engine<'a> {
    fn new(cache: &'a KvCache, requests: &[Request], settings: &'a Settings) -> Self {
        let mut sequences = Vec::new();
        let mut waiting = VecDeque::new();
        for (i, request) in requests.iter().enumerate() {
            let first = sequences.len();
            sequences.extend((0..settings.samples).map(|sample| Sequence {
                answer: Answer {
                    request: i,
                    tokens: Vec::new(),
                    prompt_tokens: request.prompt.len(),
                    cached_tokens: 0,
                    preemptions: 0,
                },
                tokens: request.prompt.clone(),
                max_tokens: request.max_tokens,
                random: Random::new(settings.seed.wrapping_add(sample as u64), i),
            }));
            waiting.push_back((first..sequences.len()).collect());
        }
        Self {
            cache,
            settings,
            sequences,
            tables: Sequences::new(cache.pool()),
            waiting,
            running: Vec::new(),
            finished: 0,
            utilisation: 0.0,
            outcome: Outcome::default(),
        }
    }

    fn batch(&self) -> usize {
        self.running.iter().map(|running| running.group.len()).sum()
    }

    /// Lets the waiting start, first come first served, as long as there is room. Says whether anybody runs.
    fn admit(&mut self) -> bool {
        let pool = self.cache.pool();
        let mut available = pool.available();
        while let Some(group) = self.waiting.front() {
            // Blocks for its tokens, one for each sample to part with, and one for each that runs to grow into.
            let needed = pool.blocks_for(self.sequences[group[0]].tokens.len()) + group.len() - 1;
            let room = needed + self.running.len() <= available || self.running.is_empty();
            if !room || self.batch() + group.len() > self.settings.max_batch {
                break;
            }
            available = available.saturating_sub(needed);
            let id = self.tables.create();
            self.running.extend(self.waiting.pop_front().map(|group| Running { id, group }));
        }
        !self.running.is_empty()
    }

    /// One forward pass over everybody who runs.
    fn step(&mut self, model: &Model, is_end: &impl Fn(u32) -> bool) -> Result<()> {
        let started = Instant::now();
        let mut tables = self.tables.take_all(self.running.iter().map(|running| running.id))?;
        let mut step = self.cache.step();
        let mut budget = STEP_TOKENS;
        let mut prefill = false;
        let mut live = 0;
        // For each sequence of the step: its place in `running`, and whether its last token is computed.
        let mut rows = Vec::new();
        let mut full = false;
        for (i, (running, table)) in self.running.iter().zip(&mut tables).enumerate() {
            let (group, computed) = (&running.group, table.len());
            let tokens = &self.sequences[group[0]].tokens;
            let n = (tokens.len() - computed).min(budget);
            live += computed + n;
            if n == 0 {
                continue;
            }
            match step.push(table, &tokens[computed..computed + n]) {
                Ok(()) => {}
                Err(PushError::OutOfBlocks(_)) => {
                    full = true;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
            budget -= n;
            prefill |= n > 1;
            rows.push((i, computed + n == tokens.len()));
        }
        if full {
            // Dropped, the step gives back what it took; the next one finds the room.
            drop(step);
            drop(tables);
            return self.preempt();
        }
        let held = self.cache.pool().held();
        self.outcome.peak_blocks = self.outcome.peak_blocks.max(held);
        self.utilisation += live as f64 / (held * self.cache.pool().block_size()) as f64;

        let logits = model.forward(&step)?.to_vec2::<f32>()?;
        let new_tokens = step.tokens();
        step.commit();
        drop(tables);
        let complete = rows.iter().zip(&logits).filter(|((_, complete), _)| *complete);
        for ((i, _), logits) in complete {
            self.extend(*i, logits)?;
        }
        self.retire(is_end)?;

        self.outcome.steps += 1;
        let work = if prefill { &mut self.outcome.prefill } else { &mut self.outcome.decode };
        work.tokens += new_tokens;
        work.time += started.elapsed();
        Ok(())
    }

    /// Draws the next token of everybody in a group; those behind the first go on in a fork of its table.
    fn extend(&mut self, i: usize, logits: &[f32]) -> Result<()> {
        let others = self.running[i].group.split_off(1);
        let first = self.running[i].group[0];
        let computed = self.sequences[first].tokens.len();
        for &member in [first].iter().chain(&others) {
            let sequence = &mut self.sequences[member];
            let token = self.settings.sampling.draw(logits, &mut sequence.random)?;
            sequence.tokens.push(token);
            sequence.answer.tokens.push(token);
        }
        for member in others {
            self.sequences[member].answer.cached_tokens = computed;
            let id = self.tables.fork(self.running[i].id)?;
            self.running.push(Running { id, group: vec![member] });
        }
        Ok(())
    }

    /// Lets those go who have come to an end, and gives their blocks back.
    fn retire(&mut self, is_end: &impl Fn(u32) -> bool) -> Result<()> {
        for i in (0..self.running.len()).rev() {
            let sequence = &self.sequences[self.running[i].group[0]];
            let tokens = &sequence.answer.tokens;
            if tokens.len() == sequence.max_tokens || tokens.last().is_some_and(|&token| is_end(token)) {
                self.tables.remove(self.running.remove(i).id)?;
                self.finished += 1;
            }
        }
        Ok(())
    }

    /// Sends the one with the least computed back to the queue.
    fn preempt(&mut self) -> Result<()> {
        let computed = |running: &Running| self.tables.take(running.id).map(|table| table.len());
        let lengths = self.running.iter().map(computed).collect::<Result<Vec<_>, _>>()?;
        let Some(victim) = (0..lengths.len()).rev().min_by_key(|&i| lengths[i]).filter(|_| lengths.len() > 1) else {
            bail!("one sequence alone does not fit into the pool");
        };
        let Running { id, group } = self.running.remove(victim);
        self.tables.remove(id)?;
        for &member in &group {
            self.sequences[member].answer.preemptions += 1;
        }
        self.waiting.push_front(group);
        Ok(())
    }

    fn progress(&self) -> Progress {
        Progress {
            generated: self.sequences.iter().map(|sequence| sequence.answer.tokens.len()).sum(),
            finished: self.finished,
            running: self.batch(),
            waiting: self.waiting.iter().map(Vec::len).sum(),
            held: self.cache.pool().held(),
        }
    }

    fn outcome(self) -> Outcome {
        Outcome {
            answers: self.sequences.into_iter().map(|sequence| sequence.answer).collect(),
            mean_utilisation: self.utilisation / self.outcome.steps.max(1) as f64,
            ..self.outcome
        }
    }
}
