//! This project: nothing here is a model. The pool, the tables, prefix reuse and admission are the shipped types; only the
//! tensors are missing.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use paged_attention::{Admission, Admitted, BlockPool, BlockTable, Need, PrefixKey, ReserveError, Room};

use super::allocator::{Allocator, Step, Usage};
use super::request::Request;

struct Job<'a> {
    request: &'a Request,
    /// The tokens to compute before the next one can be generated: the prompt, and after a preemption what was
    /// generated.
    tokens: Vec<u32>,
    generated: usize,
    /// Tokens that were computed before it had to yield.
    lost: usize,
}

struct Running<'a> {
    table: BlockTable,
    job: Job<'a>,
}

pub(crate) struct PagedKv<'a> {
    pool: BlockPool,
    waiting: Admission<Job<'a>>,
    running: Vec<Running<'a>>,
}

impl PagedKv<'_> {
    /// # Errors
    ///
    /// What the pool refuses.
    pub(crate) fn new(tokens: usize, block_size: usize) -> Result<Self> {
        let pool = BlockPool::new(tokens / block_size, block_size)?;
        Ok(Self { pool, waiting: Admission::new(), running: Vec::new() })
    }

    /// The pool itself, for those who want to count again.
    pub(crate) fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The tables of those who run.
    pub(crate) fn tables(&self) -> impl Iterator<Item = &BlockTable> {
        self.running.iter().map(|running| &running.table)
    }

    /// Those who are done go, and give their blocks back.
    fn retire(&mut self) {
        let mut at = 0;
        while let Some(Running { job, .. }) = self.running.get(at) {
            if job.generated < job.request.output {
                at += 1;
            } else {
                self.running.swap_remove(at);
            }
        }
    }

    /// Room for one token more for everybody who runs. Where there is none, the least computed yields.
    fn grow(&mut self, step: &mut Step) -> Result<()> {
        let mut at = 0;
        while let Some(running) = self.running.get_mut(at) {
            match running.table.reserve(1) {
                Ok(()) => at += 1,
                Err(ReserveError::OutOfBlocks(_)) => {
                    // Those behind the one who goes move up.
                    at -= usize::from(self.preempt()? < at);
                    step.preempted += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn preempt(&mut self) -> Result<usize> {
        let computed = self.running.iter().map(|running| running.table.len());
        let yields = Admission::<Job<'_>>::who_yields(computed).context("nobody runs and the pool is full")?;
        let Running { table, mut job } = self.running.remove(yields);
        job.lost = table.len();
        drop(table);
        let Job { request, generated, .. } = job;
        let known = job.tokens.len()..request.input + generated;
        job.tokens.extend(known.map(|position| request.token(position)));
        self.waiting.requeue(job);
        Ok(yields)
    }

    /// Lets those start for whom there is room.
    fn admit(&mut self, step: &mut Step) -> Result<()> {
        let pool = &self.pool;
        let key = PrefixKey::new();
        let need = |job: &Job<'_>| Need::Blocks(pool.find(&key, &job.tokens).blocks);
        loop {
            let room = Room { available: pool.available(), running: self.running.len() };
            let job = match self.waiting.admit(pool, room, need) {
                Some(Admitted::Start(job)) => job,
                Some(Admitted::Never(job)) => {
                    bail!(
                        "a request of {} tokens is larger than the pool of {}",
                        job.tokens.len(),
                        pool.blocks() * pool.block_size()
                    )
                }
                None => return Ok(()),
            };
            step.skipped = step.skipped.max(self.waiting.most_skipped());
            let mut table = BlockTable::new(pool);
            let found = table.reuse(&job.tokens);
            let rest = job.tokens.len() - found;
            table.reserve(rest)?;
            table.commit_tokens(&job.tokens[found..])?;
            step.started += 1;
            step.prefilled += rest;
            step.recomputed += job.lost.saturating_sub(found);
            if job.lost == 0 {
                step.prompt_tokens += job.request.input;
                step.found += found;
            }
            self.running.push(Running { table, job });
        }
    }
}

impl<'a> Allocator<'a> for PagedKv<'a> {
    fn enqueue(&mut self, request: &'a Request) {
        let tokens = (0..request.input).map(|position| request.token(position)).collect();
        self.waiting.enqueue(Job { request, tokens, generated: 0, lost: 0 });
    }

    fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn step(&mut self) -> Result<Step> {
        let mut step = Step::default();
        let started = Instant::now();
        self.retire();
        self.grow(&mut step)?;
        for Running { table, job } in &mut self.running {
            table.commit_tokens(&[job.request.token(table.len())])?;
            job.generated += 1;
        }
        if step.preempted == 0 {
            let before = self.running.len();
            self.admit(&mut step)?;
            self.running[before..].iter_mut().for_each(|running| running.job.generated += 1);
        }
        step.generated = self.running.len();
        step.bookkeeping = started.elapsed();
        Ok(step)
    }

    fn usage(&self) -> Usage {
        let block_size = self.pool().block_size();
        let reserved = self.pool().held() * block_size;
        // Only the last block of a table is not full, and that one is its own.
        let empty: usize = self.tables().map(|table| table.capacity() - table.len()).sum();
        Usage {
            live: reserved - empty,
            reserved,
            logical: self.tables().map(BlockTable::len).sum(),
            remembered: self.pool.remembered() * block_size,
            running: self.running.len(),
        }
    }
}
