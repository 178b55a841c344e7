//! The state of each sequence, and its update after a step.

use std::sync::Arc;

use anyhow::{Result, bail};
use paged_attention::{Admission, KvCache, Salt, SequenceId, Sequences, TableOptions, Tier, preemption_victim};
use slab::Slab;

use super::logprobs::Logprobs;
use super::pace::Pace;
use super::tier::{Loading, Loads};
use super::{Answer, Event, FinishReason, Limits, Request, RequestOptions, Statistics, Work};
use crate::sampling::{Random, Sampling};

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) answer: Answer,
    /// Prompt and answer so far.
    pub(super) tokens: Vec<u32>,
    max_tokens: usize,
    random: Random,
    sampling: Sampling,
    /// Its table is made with it.
    pub(super) salt: Salt,
    /// Of how many alternatives the log probabilities are wanted.
    logprobs: Option<usize>,
    /// It is removed as soon as its group is looked at.
    pub(super) cancelled: bool,
}

impl Sequence {
    /// With what its table is made.
    pub(super) fn table_options(&self) -> TableOptions {
        TableOptions::default().salt(self.salt.clone())
    }

    /// Counts tokens that were matched in the cache, so that they are not computed.
    pub(super) fn count_matched(&mut self, tokens: usize, stats: &mut Statistics) {
        let first = self.answer.preemptions == 0;
        *if first { &mut self.answer.cached_tokens } else { &mut stats.resumed_tokens } += tokens;
    }
}

/// Sequences that have the same tokens so far, and so are computed once: the samples of a prompt, until they diverge.
pub(super) type Group = Vec<usize>;

pub(super) struct Running {
    pub(super) id: SequenceId,
    pub(super) group: Group,
    pub(super) loading: Loading,
}

/// Answers requests that come at any time.
pub struct Engine<'a> {
    pub(super) cache: &'a KvCache,
    /// What is read from the tier below the cache, if there is one.
    pub(super) loads: Option<Loads>,
    pub(super) limits: Limits,
    pub(super) pace: Pace,
    /// By the numbers that [`submit`](Self::submit) returned.
    pub(super) sequences: Slab<Sequence>,
    pub(super) tables: Sequences,
    pub(super) waiting: Admission<Group>,
    /// In the order of admission.
    pub(super) running: Vec<Running>,
    /// Whether a sequence did not fit into the last step.
    pub(super) full: bool,
    /// What has happened since the last step was reported.
    pub(super) events: Vec<Event>,
    submitted: usize,
    /// The sum over all steps, for the mean in [`Statistics`].
    pub(super) utilisation: f64,
    pub(super) stats: Statistics,
}

impl std::fmt::Debug for Engine<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (running, waiting) = (self.running(), self.waiting());
        f.debug_struct("Engine").field("running", &running).field("waiting", &waiting).finish_non_exhaustive()
    }
}

impl<'a> Engine<'a> {
    /// An engine that has nothing to do.
    pub fn new(cache: &'a KvCache, limits: Limits) -> Self {
        Self {
            cache,
            loads: None,
            limits,
            pace: Pace::new(limits.step_time),
            sequences: Slab::new(),
            tables: Sequences::new(cache.pool()),
            waiting: Admission::new(),
            running: Vec::new(),
            full: false,
            events: Vec::new(),
            submitted: 0,
            utilisation: 0.0,
            stats: Statistics::default(),
        }
    }

    /// The same with a tier below the cache.
    #[must_use]
    pub fn over(self, tier: Arc<dyn Tier>) -> Self {
        Self { loads: Some(Loads::new(tier)), ..self }
    }

    /// Puts a request into the queue. Returns a number for each of its answers. A request that can never be answered
    /// makes a later [`step`](Self::step) fail: [`why_never`](super::why_never) finds it before.
    pub fn submit(&mut self, request: Request, options: RequestOptions) -> Vec<usize> {
        let RequestOptions { samples, seed, sampling, salt, logprobs } = options;
        let number = self.submitted;
        self.submitted += 1;
        let sequence = |sample| Sequence {
            answer: Answer {
                request: number,
                tokens: Vec::new(),
                prompt_tokens: request.prompt.len(),
                cached_tokens: 0,
                preemptions: 0,
            },
            tokens: request.prompt.clone(),
            max_tokens: request.max_tokens,
            random: Random::new(seed.wrapping_add(sample as u64), 0),
            sampling,
            salt: salt.clone(),
            logprobs,
            cancelled: false,
        };
        let group: Group = (0..samples).map(|sample| self.sequences.insert(sequence(sample))).collect();
        if !group.is_empty() {
            self.waiting.enqueue(group.clone());
        }
        group
    }

    /// Ends sequences, whose blocks are freed at once. Nothing is reported of them any more, and their numbers may be
    /// given to others. Those that are complete, or not known, are left out.
    pub fn cancel(&mut self, sequences: &[usize]) -> Result<()> {
        for &sequence in sequences {
            if let Some(sequence) = self.sequences.get_mut(sequence) {
                sequence.cancelled = true;
            }
        }
        let mut running = std::mem::take(&mut self.running);
        for Running { group, .. } in &mut running {
            self.drop_cancelled(group);
        }
        let gone: Vec<Running> = running.extract_if(.., |running| running.group.is_empty()).collect();
        self.running = running;
        for Running { id, .. } in gone {
            self.tables.remove(id)?;
        }
        let all = &self.sequences;
        let gone = self.waiting.remove_if(|group| group.iter().all(|&member| all[member].cancelled));
        for mut group in gone {
            self.drop_cancelled(&mut group);
        }
        Ok(())
    }

    /// Removes the sequences of a group that are cancelled.
    pub(super) fn drop_cancelled(&mut self, group: &mut Group) {
        group.retain(|&member| match self.sequences[member].cancelled {
            true => {
                self.sequences.remove(member);
                false
            }
            false => true,
        });
    }

    /// The answer of a sequence so far, unless it is complete.
    pub fn answer(&self, sequence: usize) -> Option<&Answer> {
        self.sequences.get(sequence).map(|sequence| &sequence.answer)
    }

    /// Whether no request runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// The number of running sequences. Each member of a group counts.
    pub fn running(&self) -> usize {
        self.running.iter().map(|running| running.group.len()).sum()
    }

    /// The number of waiting sequences.
    pub fn waiting(&self) -> usize {
        self.waiting.iter().flatten().filter(|&&member| !self.sequences[member].cancelled).count()
    }

    /// Draws the next token of each sequence in the group `running[i]`. The first sequence keeps the table; each of the
    /// others continues in a fork of it.
    pub(super) fn extend(&mut self, i: usize, logits: &[f32]) -> Result<()> {
        let others = self.running[i].group.split_off(1);
        let first = self.running[i].group[0];
        let computed = self.sequences[first].tokens.len();
        for &member in [first].iter().chain(&others) {
            let sequence = &mut self.sequences[member];
            let token = sequence.sampling.draw(logits, &mut sequence.random)?;
            sequence.tokens.push(token);
            sequence.answer.tokens.push(token);
            let logprobs = sequence.logprobs.map(|most| Logprobs::of(logits, token, most));
            self.events.push(Event::Token { sequence: member, token, logprobs });
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
            let number = self.running[i].group[0];
            let sequence = &self.sequences[number];
            let reason = match sequence.answer.tokens.last() {
                Some(&token) if is_end(token) => FinishReason::Stop,
                _ if sequence.answer.tokens.len() == sequence.max_tokens => FinishReason::Length,
                _ => continue,
            };
            self.tables.remove(self.running.remove(i).id)?;
            let Sequence { answer, .. } = self.sequences.remove(number);
            self.events.push(Event::Finished { sequence: number, answer, reason });
        }
        Ok(before - self.running.len())
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

    /// What all steps so far have done.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            read_from_tier: self
                .loads
                .as_ref()
                .map(|loads| Work { tokens: loads.tokens, time: loads.time })
                .unwrap_or_default(),
            mean_utilisation: self.utilisation / self.stats.steps.max(1) as f64,
            ..self.stats.clone()
        }
    }
}
