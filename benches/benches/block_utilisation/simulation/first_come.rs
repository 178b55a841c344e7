//! First come, first served, and the last admitted yields: how vLLM schedules (Kwon et al., "Efficient Memory Management
//! for Large Language Model Serving with PagedAttention", SOSP 2023, section 4.5), over any kind of memory.

use std::collections::VecDeque;

use anyhow::Result;

use super::allocator::{Allocator, Step, Usage};
use super::request::Request;

/// Memory that sequences are given.
pub(crate) trait Memory {
    /// What one sequence holds.
    type Held;

    /// Room for a sequence that starts with `tokens` and will have `total` in the end; none where there is no room. How
    /// much of the future the memory may know is its own matter.
    fn start(&mut self, tokens: usize, total: usize) -> Option<Self::Held>;

    /// Room for `tokens` in all; says whether there is.
    fn grow(&mut self, held: &mut Self::Held, tokens: usize) -> bool;

    /// The sequence is gone.
    fn end(&mut self, held: Self::Held);

    /// Token places that are set aside.
    fn reserved(&self) -> usize;
}

struct Waiting<'a> {
    request: &'a Request,
    /// Tokens generated before it had to yield.
    generated: usize,
    /// Tokens that were computed before it had to yield.
    lost: usize,
}

struct Running<'a, H> {
    request: &'a Request,
    held: H,
    /// Tokens stored.
    len: usize,
    generated: usize,
}

pub(crate) struct FirstCome<'a, M: Memory> {
    memory: M,
    waiting: VecDeque<Waiting<'a>>,
    /// In the order of admission.
    running: Vec<Running<'a, M::Held>>,
}

impl<M: Memory> FirstCome<'_, M> {
    pub(crate) fn new(memory: M) -> Self {
        Self { memory, waiting: VecDeque::new(), running: Vec::new() }
    }

    fn retire(&mut self) {
        for done in self.running.extract_if(.., |running| running.generated >= running.request.output) {
            self.memory.end(done.held);
        }
    }

    /// Everybody who runs gets room for one token more, in the order of admission; where there is none, the last yields.
    fn grow(&mut self, step: &mut Step) {
        let mut at = 0;
        while let Some(running) = self.running.get_mut(at) {
            if self.memory.grow(&mut running.held, running.len + 1) {
                running.len += 1;
                at += 1;
            } else if let Some(last) = self.running.pop() {
                // It may have been given room in this very step, for a token that is not computed.
                let lost = last.request.input + last.generated - 1;
                self.memory.end(last.held);
                self.waiting.push_front(Waiting { request: last.request, generated: last.generated, lost });
                step.preempted += 1;
            }
        }
    }

    /// Nobody starts in a step in which somebody had to yield.
    fn admit(&mut self, step: &mut Step) {
        while let Some(&Waiting { request, generated, lost }) = self.waiting.front() {
            let tokens = request.input + generated;
            let Some(held) = self.memory.start(tokens, request.total()) else { return };
            self.waiting.pop_front();
            step.started += 1;
            step.prefilled += tokens;
            step.recomputed += lost;
            step.prompt_tokens += if lost == 0 { request.input } else { 0 };
            self.running.push(Running { request, held, len: tokens, generated });
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
        Usage { live, reserved, logical: live, remembered: 0, running }
    }
}
