//! A scheduler over any kind of memory: first come, first served, and the last admitted sequence is preempted, as in
//! vLLM (Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023,
//! section 4.5).

use std::collections::VecDeque;

use anyhow::Result;

use super::allocator::{Allocator, Step, Usage};
use super::request::Request;

/// The memory of the sequences.
pub(crate) trait Memory {
    /// The memory of one sequence.
    type Allocation;

    /// Allocates memory for a sequence that starts with `tokens` tokens and will have `total` in the end; `None` if
    /// there is no room. A model that does not know the final length ignores `total`.
    fn start(&mut self, tokens: usize, total: usize) -> Option<Self::Allocation>;

    /// Grows an allocation to `tokens` tokens in total; returns whether there is room.
    fn grow(&mut self, allocation: &mut Self::Allocation, tokens: usize) -> bool;

    /// Frees an allocation.
    fn end(&mut self, allocation: Self::Allocation);

    /// Slots that are set aside.
    fn reserved(&self) -> usize;
}

struct Waiting<'a> {
    request: &'a Request,
    /// Tokens generated before it was preempted.
    generated: usize,
    /// Tokens that were computed before it was preempted, and lost.
    lost: usize,
}

struct Running<'a, A> {
    request: &'a Request,
    allocation: A,
    /// Tokens stored.
    len: usize,
    generated: usize,
}

pub(crate) struct FirstCome<'a, M: Memory> {
    memory: M,
    waiting: VecDeque<Waiting<'a>>,
    /// In the order of admission.
    running: Vec<Running<'a, M::Allocation>>,
}

impl<M: Memory> FirstCome<'_, M> {
    pub(crate) fn new(memory: M) -> Self {
        Self { memory, waiting: VecDeque::new(), running: Vec::new() }
    }

    /// Removes the finished sequences and frees their memory.
    fn retire(&mut self) {
        for done in self.running.extract_if(.., |running| running.generated >= running.request.output) {
            self.memory.end(done.allocation);
        }
    }

    /// Makes room for one more token in each running sequence, in the order of admission. If there is none, the last
    /// admitted sequence is preempted.
    fn grow(&mut self, step: &mut Step) {
        let mut at = 0;
        while let Some(running) = self.running.get_mut(at) {
            if self.memory.grow(&mut running.allocation, running.len + 1) {
                running.len += 1;
                at += 1;
            } else if let Some(last) = self.running.pop() {
                // Not `last.len`: that may include a slot from this step, for a token that is not computed.
                let lost = last.request.input + last.generated - 1;
                self.memory.end(last.allocation);
                self.waiting.push_front(Waiting { request: last.request, generated: last.generated, lost });
                step.preempted += 1;
            }
        }
    }

    /// Starts waiting requests, in order, while there is room. Not called in a step with a preemption.
    fn admit(&mut self, step: &mut Step) {
        while let Some(&Waiting { request, generated, lost }) = self.waiting.front() {
            let tokens = request.input + generated;
            let Some(allocation) = self.memory.start(tokens, request.total()) else { return };
            self.waiting.pop_front();
            step.started += 1;
            step.prefilled += tokens;
            step.recomputed += lost;
            if lost == 0 {
                step.prompt_tokens += request.input;
                step.first_started.push(request.number);
            }
            self.running.push(Running { request, allocation, len: tokens, generated });
        }
    }
}

impl<'a, M: Memory> Allocator<'a> for FirstCome<'a, M> {
    fn enqueue(&mut self, request: &'a Request) {
        self.waiting.push_back(Waiting { request, generated: 0, lost: 0 });
    }

    fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn step(&mut self) -> Result<Step> {
        let mut step = Step::default();
        self.retire();
        self.grow(&mut step);
        if step.preempted == 0 {
            self.admit(&mut step);
        }
        step.generated = self.running.len();
        self.running.iter_mut().for_each(|running| running.generated += 1);
        Ok(step)
    }

    fn usage(&self) -> Usage {
        let live = self.running.iter().map(|running| running.len).sum();
        let (reserved, running) = (self.memory.reserved(), self.running.len());
        Usage { live, reserved, logical: live, evictable: 0, running }
    }
}
