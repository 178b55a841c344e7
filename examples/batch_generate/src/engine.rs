//! Continuous batching: sequences join the running ones when blocks allow, and leave when they finish.
//!
//! What several prompts have in common is computed once. When the pool is full, the sequence with the fewest computed
//! tokens goes back to the front of the queue; nothing it has said is lost, and what it had computed is found again if
//! its memory was not needed meanwhile.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use paged_attention::{
    Admission, Admitted, KvCache, Need, PrefixKey, PushError, Room, SequenceId, Sequences, Snapshot,
};

use crate::model::Model;
use crate::sampling::{Random, Sampling};

/// New tokens of one step, at most: long prompts are computed in pieces, so that the others go on talking.
pub(crate) const STEP_TOKENS: usize = 512;

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
    /// Tokens of the prompt that it did not have to compute, because another had.
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
    /// Tokens of prompts that were computed, those computed again after a preemption included.
    pub computed_prompt_tokens: usize,
    /// Tokens that were found again after a preemption.
    pub resumed_tokens: usize,
    /// The pool when it was fullest.
    pub fullest: Option<Snapshot>,
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
    while engine.admit()? {
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
    waiting: Admission<Group>,
    running: Vec<Running>,
    finished: usize,
    utilisation: f64,
    outcome: Outcome,
}

impl<'a> Engine<'a> {
    fn new(cache: &'a KvCache, requests: &[Request], settings: &'a Settings) -> Self {
        let mut sequences = Vec::new();
        let mut waiting = Admission::new();
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
            waiting.enqueue((first..sequences.len()).collect());
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

    /// Lets the waiting start as long as there is room. Says whether anybody runs.
    fn admit(&mut self) -> Result<bool> {
        let pool = self.cache.pool();
        // What those who run will take to compute the tokens they have is promised to them.
        let mut promised = 0;
        for Running { id, group } in &self.running {
            let held = self.tables.take(*id)?.blocks().len();
            promised += pool.blocks_for(self.sequences[group[0]].tokens.len()).saturating_sub(held);
        }
        loop {
            let places = self.settings.max_batch - self.batch();
            let sequences = &self.sequences;
            let need = |group: &Group| {
                if group.len() > places {
                    return Need::NotNow;
                }
                // Blocks for its tokens, less those that others hold, and one for each sample to part with.
                let tokens = &sequences[group[0]].tokens;
                let shared = pool.find(&PrefixKey::new(), tokens).held;
                Need::Blocks((pool.blocks_for(tokens.len()) - shared + group.len() - 1).min(pool.blocks()))
            };
            let available = pool.available().saturating_sub(promised);
            let group = match self.waiting.admit(pool, Room { available, running: self.running.len() }, need) {
                Some(Admitted::Start(group)) => group,
                Some(Admitted::Never(group)) => {
                    bail!("prompt {} does not fit into the pool", self.sequences[group[0]].answer.request + 1)
                }
                None => break,
            };
            let tokens = &self.sequences[group[0]].tokens;
            let mut table = self.cache.table();
            let found = table.reuse(tokens);
            promised += pool.blocks_for(tokens.len()) + group.len() - 1 - table.blocks().len();
            self.count_found(group[0], found);
            self.running.push(Running { id: self.tables.insert(table), group });
        }
        Ok(!self.running.is_empty())
    }

    fn count_found(&mut self, sequence: usize, found: usize) {
        let answer = &mut self.sequences[sequence].answer;
        if answer.preemptions == 0 {
            answer.cached_tokens += found;
        } else {
            self.outcome.resumed_tokens += found;
        }
    }

    /// One forward pass over everybody who runs.
    fn step(&mut self, model: &Model, is_end: &impl Fn(u32) -> bool) -> Result<()> {
        let started = Instant::now();
        let block_size = self.cache.pool().block_size();
        let mut tables = self.tables.take_all(self.running.iter().map(|running| running.id))?;
        // Another may have computed what comes next since this one was admitted.
        let mut found = Vec::new();
        for (running, table) in self.running.iter().zip(&mut tables) {
            found.push((running.group[0], table.reuse(&self.sequences[running.group[0]].tokens)));
        }
        let mut step = self.cache.step();
        let mut budget = STEP_TOKENS;
        let mut prefill = false;
        let mut live = 0;
        // For each sequence of the step: its place in `running`, and whether its last token is computed.
        let mut rows = Vec::new();
        // The prefixes whose next block is computed in this step.
        let mut under_way = HashSet::new();
        let mut prompt_tokens = 0;
        let mut full = false;
        for (i, (running, table)) in self.running.iter().zip(&mut tables).enumerate() {
            let (group, computed) = (&running.group, table.len());
            let Sequence { tokens, answer, .. } = &self.sequences[group[0]];
            let rest = tokens.len() - computed;
            // A prompt is computed in pieces that end with a block, so that the rest can still be found elsewhere.
            let mut n = match (computed + budget) / block_size * block_size {
                end if rest > budget && end > computed => end - computed,
                _ => rest.min(budget),
            };
            // Who would compute the same block beside another waits, and finds it in the next step.
            let next_block = &tokens[..(computed + block_size).min(tokens.len())];
            if rest > 1 && !under_way.insert(next_block) {
                n = 0;
            }
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
            prompt_tokens += answer.prompt_tokens.saturating_sub(computed).min(n);
            rows.push((i, computed + n == tokens.len()));
        }
        if full {
            // Dropped, the step gives back what it took; the next one finds the room.
            drop(step);
            drop(tables);
            for (sequence, found) in found {
                self.count_found(sequence, found);
            }
            return self.preempt();
        }
        let held = self.cache.pool().held();
        if held > self.outcome.peak_blocks {
            self.outcome.peak_blocks = held;
            self.outcome.fullest = Some(self.cache.pool().snapshot());
        }
        self.utilisation += live as f64 / (held * self.cache.pool().block_size()) as f64;

        let logits = model.forward(&step)?.to_vec2::<f32>()?;
        let new_tokens = step.tokens();
        step.commit()?;
        drop(tables);
        self.outcome.computed_prompt_tokens += prompt_tokens;
        for (sequence, found) in found {
            self.count_found(sequence, found);
        }
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
            // All of the prompt, if this is the first token.
            let answer = &mut self.sequences[member].answer;
            answer.cached_tokens = computed.min(answer.prompt_tokens);
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
        let Some(victim) = Admission::<Group>::who_yields(lengths).filter(|_| self.running.len() > 1) else {
            bail!("one sequence alone does not fit into the pool");
        };
        let Running { id, group } = self.running.remove(victim);
        self.tables.remove(id)?;
        for &member in &group {
            self.sequences[member].answer.preemptions += 1;
        }
        self.waiting.requeue(group);
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
