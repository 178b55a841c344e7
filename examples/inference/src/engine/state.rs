//! The state of each sequence, and its update after a step.

use anyhow::{Result, bail};
use paged_attention::{Admission, KvCache, SequenceId, Sequences, preemption_victim};

use super::tier::{Loading, Loads};
use super::{Answer, Outcome, Progress, Request, Settings, Work};
use crate::sampling::Random;

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) answer: Answer,
    /// Prompt and answer so far.
    pub(super) tokens: Vec<u32>,
    max_tokens: usize,
    /// Tokens that were matched in the cache after a preemption.
    resumed: usize,
    random: Random,
    pub(super) finished: bool,
}

impl Sequence {
    /// Counts tokens that were matched in the cache, so that they are not computed.
    pub(super) fn count_matched(&mut self, tokens: usize) {
        let counter = if self.answer.preemptions == 0 { &mut self.answer.cached_tokens } else { &mut self.resumed };
        *counter += tokens;
    }
}

/// Sequences that have the same tokens so far, and so are computed once: the samples of a prompt, until they diverge.
pub(super) type Group = Vec<usize>;

pub(super) struct Running {
    pub(super) id: SequenceId,
    pub(super) group: Group,
    pub(super) loading: Loading,
}

pub(super) struct Engine<'a> {
    pub(super) cache: &'a KvCache,
    /// What is read from the tier below the cache, if there is one.
    pub(super) loads: Option<Loads>,
    pub(super) settings: &'a Settings,
    pub(super) sequences: Vec<Sequence>,
    pub(super) tables: Sequences,
    pub(super) waiting: Admission<Group>,
    /// In the order of admission.
    pub(super) running: Vec<Running>,
    /// Whether a sequence did not fit into the last step.
    pub(super) full: bool,
    finished: usize,
    /// The sum over all steps, for the mean in [`Outcome`].
    pub(super) utilisation: f64,
    pub(super) outcome: Outcome,
}

impl<'a> Engine<'a> {
    pub(super) fn new(cache: &'a KvCache, requests: &[Request], settings: &'a Settings) -> Self {
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
                resumed: 0,
                random: Random::new(settings.seed.wrapping_add(sample as u64), i),
                finished: false,
            }));
            waiting.enqueue((first..sequences.len()).collect());
        }
        Self {
            cache,
            loads: None,
            settings,
            sequences,
            tables: Sequences::new(cache.pool()),
            waiting,
            running: Vec::new(),
            full: false,
            finished: 0,
            utilisation: 0.0,
            outcome: Outcome::default(),
        }
    }

    /// The number of running sequences. Each member of a group counts.
    pub(super) fn batch(&self) -> usize {
        self.running.iter().map(|running| running.group.len()).sum()
    }

    /// Draws the next token of each sequence in the group `running[i]`. The first sequence keeps the table; each of the
    /// others continues in a fork of it.
    pub(super) fn extend(&mut self, i: usize, logits: &[f32]) -> Result<()> {
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
            // The whole prompt, if this is the first token.
            let answer = &mut self.sequences[member].answer;
            answer.cached_tokens = computed.min(answer.prompt_tokens);
            let id = self.tables.fork(self.running[i].id)?;
            self.running.push(Running { id, group: vec![member], loading: Loading::No });
        }
        Ok(())
    }

    /// Removes the finished sequences and frees their blocks. Returns their number.
    pub(super) fn retire(&mut self, is_end: &impl Fn(u32) -> bool) -> Result<usize> {
        let before = self.running.len();
        for i in (0..before).rev() {
            let sequence = &mut self.sequences[self.running[i].group[0]];
            let tokens = &sequence.answer.tokens;
            if tokens.len() == sequence.max_tokens || tokens.last().is_some_and(|&token| is_end(token)) {
                sequence.finished = true;
                self.tables.remove(self.running.remove(i).id)?;
            }
        }
        let finished = before - self.running.len();
        self.finished += finished;
        Ok(finished)
    }

    /// Preempts the sequence with the fewest computed tokens: frees its blocks, and puts it at the front of the queue.
    pub(super) fn preempt(&mut self) -> Result<()> {
        let computed = |running: &Running| self.tables.check_out(running.id).map(|table| table.len());
        let lengths = self.running.iter().map(computed).collect::<Result<Vec<_>, _>>()?;
        let Some(victim) = preemption_victim(lengths).filter(|_| self.running.len() > 1) else {
            let pool = self.cache.pool();
            bail!(
                "one sequence alone does not fit into the pool: {} of {} blocks are available",
                pool.available(),
                pool.blocks()
            );
        };
        let Running { id, group, .. } = self.running.remove(victim);
        self.tables.remove(id)?;
        for &member in &group {
            self.sequences[member].answer.preemptions += 1;
        }
        self.waiting.requeue(group);
        Ok(())
    }

    pub(super) fn progress(&self) -> Progress<'_> {
        Progress {
            generated: self.sequences.iter().map(|sequence| sequence.answer.tokens.len()).sum(),
            finished: self.finished,
            running: self.batch(),
            waiting: self.waiting.iter().map(Vec::len).sum(),
            in_use: self.cache.pool().in_use(),
            sequences: &self.sequences,
        }
    }

    pub(super) fn outcome(self) -> Outcome {
        let read = |loads: &Loads| Work { tokens: loads.tokens, time: loads.time };
        Outcome {
            read_from_tier: self.loads.as_ref().map(read).unwrap_or_default(),
            resumed_tokens: self.sequences.iter().map(|sequence| sequence.resumed).sum(),
            answers: self.sequences.into_iter().map(|sequence| sequence.answer).collect(),
            mean_utilisation: self.utilisation / self.outcome.steps.max(1) as f64,
            ..self.outcome
        }
    }
}
