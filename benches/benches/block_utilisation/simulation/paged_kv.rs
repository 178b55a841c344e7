//! This project, not a model of it: the pool, the tables, prefix matching and admission are the shipped types. Only the
//! tensors are missing.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use paged_attention::{
    Admission, Admitted, BlockPool, BlockTable, Need, PrefixKey, ReserveError, Room, preemption_victim,
};

use super::allocator::{Allocator, Step, Usage};
use super::request::Request;

struct Job<'a> {
    request: &'a Request,
    /// The tokens to compute before the next one can be generated: the prompt, and after a preemption also the
    /// generated tokens.
    tokens: Vec<u32>,
    generated: usize,
    /// Tokens that were computed before it was preempted, and lost.
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

impl<'a> PagedKv<'a> {
    /// # Errors
    ///
    /// If [`BlockPool::new`] fails.
    pub(crate) fn new(tokens: usize, block_size: usize) -> Result<Self> {
        Self::with(tokens, block_size, Admission::new())
    }

    /// The same with requests that start first come, first served, even if more is cached of another.
    ///
    /// # Errors
    ///
    /// As [`PagedKv::new`].
    pub(crate) fn first_come(tokens: usize, block_size: usize) -> Result<Self> {
        Self::with(tokens, block_size, Admission::new().prefix_ahead(0))
    }

    fn with(tokens: usize, block_size: usize, waiting: Admission<Job<'a>>) -> Result<Self> {
        let pool = BlockPool::new(tokens / block_size, block_size)?;
        Ok(Self { pool, waiting, running: Vec::new() })
    }

    /// The pool, for a test to count its blocks.
    pub(crate) fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The tables of the running sequences.
    pub(crate) fn tables(&self) -> impl Iterator<Item = &BlockTable> {
        self.running.iter().map(|running| &running.table)
    }

    /// Removes the finished sequences, which frees their blocks.
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

    /// Reserves one more token for each running sequence. If there is no block left, the sequence with the fewest
    /// computed tokens is preempted.
    fn grow(&mut self, step: &mut Step) -> Result<()> {
        let mut at = 0;
        while let Some(running) = self.running.get_mut(at) {
            match running.table.reserve(1) {
                Ok(()) => at += 1,
                Err(ReserveError::OutOfBlocks(_)) => {
                    // Sequences after the removed one move forward by one.
                    at -= usize::from(self.preempt()? < at);
                    step.preempted += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Preempts one sequence and puts it back into the queue; returns the index in `running` that it had.
    fn preempt(&mut self) -> Result<usize> {
        let computed = self.running.iter().map(|running| running.table.len());
        let victim = preemption_victim(computed).context("the pool is full and no sequence is running")?;
        let Running { table, mut job } = self.running.remove(victim);
        job.lost = table.len();
        drop(table);
        let Job { request, generated, .. } = job;
        let known = job.tokens.len()..request.input + generated;
        job.tokens.extend(known.map(|position| request.token(position)));
        self.waiting.requeue(job);
        Ok(victim)
    }

    /// Starts the waiting requests that there is room for.
    fn admit(&mut self, step: &mut Step) -> Result<()> {
        let pool = &self.pool;
        let key = PrefixKey::new();
        let need = |job: &Job<'_>| Need::from(pool.lookup_prefix(&key, &job.tokens));
        loop {
            let room = Room { available: pool.available(), running: self.running.len() };
            let job = match self.waiting.admit(pool, room, need) {
                Some(Admitted::Start(job)) => job,
                Some(Admitted::Never(job)) => {
                    bail!(
                        "a request of {} tokens is larger than the pool of {} tokens",
                        job.tokens.len(),
                        pool.blocks() * pool.block_size()
                    )
                }
                None => return Ok(()),
            };
            step.skipped = step.skipped.max(self.waiting.most_skipped());
            let mut table = BlockTable::new(pool);
            let matched = table.match_prefix(&job.tokens);
            let rest = job.tokens.len() - matched;
            table.reserve(rest)?;
            table.commit_tokens(&job.tokens[matched..])?;
            step.started += 1;
            if job.lost == 0 {
                step.first_started.push(job.request.number);
            }
            step.prefilled += rest;
            step.recomputed += job.lost.saturating_sub(matched);
            if job.lost == 0 {
                step.prompt_tokens += job.request.input;
                step.matched += matched;
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
        let reserved = self.pool().in_use() * block_size;
        // Only the last block of a table is not full, and no other table uses that block.
        let empty: usize = self.tables().map(|table| table.capacity() - table.len()).sum();
        Usage {
            live: reserved - empty,
            reserved,
            logical: self.tables().map(BlockTable::len).sum(),
            evictable: self.pool.evictable() * block_size,
            running: self.running.len(),
        }
    }
}
