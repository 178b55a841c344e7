//! Checks the benchmark's figures for `paged_kv` against a second count, slot by slot, over the shipped types.

#![allow(missing_docs, unreachable_pub)]

#[path = "../benches/block_utilisation/simulation/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the benchmark uses more of it than this test")]
mod simulation;

use paged_attention::{BlockState, BlockTable};
use simulation::allocator::{Allocator, Step, Usage};
use simulation::paged_kv::PagedKv;
use simulation::{Arrivals, Outcome, Pool, Request, built_in, replay};

/// Replays into the shipped types, and counts their slots and blocks after every step.
struct Recounted<'a> {
    paged_kv: PagedKv<'a>,
    steps: usize,
    live: f64,
    reserved: f64,
    shared: usize,
}

impl Recounted<'_> {
    fn count(&mut self) {
        let pool = self.paged_kv.pool();
        pool.check_ref_counts(self.paged_kv.tables().map(BlockTable::blocks))
            .expect("the pool's counts agree with the tables");
        let mut live = vec![false; pool.blocks() * pool.block_size()];
        for table in self.paged_kv.tables() {
            for position in 0..table.len() {
                live[table.slot(position).expect("every token has a slot")] = true;
            }
        }
        let slots = live.iter().filter(|&&live| live).count();
        let in_use = |state: &&BlockState| matches!(state, BlockState::InUse(_));
        let blocks = pool.snapshot().blocks.iter().filter(in_use).count();
        let tokens: usize = self.paged_kv.tables().map(BlockTable::len).sum();
        self.steps += 1;
        self.live += slots as f64;
        self.reserved += (blocks * pool.block_size()) as f64;
        self.shared += tokens - slots;
    }
}

impl<'a> Allocator<'a> for Recounted<'a> {
    fn enqueue(&mut self, request: &'a Request) {
        self.paged_kv.enqueue(request);
    }

    fn waiting(&self) -> usize {
        self.paged_kv.waiting()
    }

    fn step(&mut self) -> anyhow::Result<Step> {
        let step = self.paged_kv.step()?;
        self.count();
        Ok(step)
    }

    fn usage(&self) -> Usage {
        self.paged_kv.usage()
    }
}

fn recount(requests: &[Request], pool: Pool, block_size: usize) -> (Outcome, usize) {
    let paged_kv = PagedKv::new(pool.tokens, block_size).expect("the pool can be made");
    let mut recounted = Recounted { paged_kv, steps: 0, live: 0.0, reserved: 0.0, shared: 0 };
    let outcome = replay(requests, Arrivals::Saturated, pool, &mut recounted, |_| {}).expect("it runs");
    assert!(recounted.steps > 100, "only {} steps", recounted.steps);
    let of_pool = recounted.live / (recounted.steps * pool.tokens) as f64;
    let of_reserved = recounted.live / recounted.reserved;
    assert!((outcome.live_over_pool() - of_pool).abs() < 1e-9, "{} is {of_pool}", outcome.live_over_pool());
    assert!(
        (outcome.live_over_reserved() - of_reserved).abs() < 1e-9,
        "{} is {of_reserved}",
        outcome.live_over_reserved()
    );
    (outcome, recounted.shared)
}

#[test]
fn utilisation_equals_a_count_of_the_tables_slots() {
    let [conversation, ..] = built_in();
    let pool = Pool { tokens: 1 << 14, max_len: 1 << 13 };
    for block_size in [1, 16, 128] {
        let (outcome, _) = recount(&conversation.generate(130), pool, block_size);
        assert!(outcome.live_over_pool() > 0.5, "{block_size}: {}", outcome.live_over_pool());
    }
}

#[test]
fn slots_of_shared_prefixes_count_once() {
    let [.., long] = built_in();
    let pool = Pool { tokens: 1 << 15, max_len: 1 << 14 };
    let (outcome, shared) = recount(&long.generate(130), pool, 16);
    assert!(shared > 0 && outcome.logical_over_physical() > 1.0, "{shared} tokens are shared");
    assert!(outcome.prefix_hit() > 0.0);
}
