//! The cost of paging: the same sequences in blocks of 16 in order, in one block each, and in blocks of 16 in random
//! order, in turns.
//!
//! The cache that is created first is up to 5 % slower to read, whatever its blocks are, because of where the system
//! places its pages. So the three caches are created three times, each time with a different one first, and the ratios
//! are geometric means.

use std::hint::black_box;

use anyhow::Result;
use benches::{Contender, Race, Record, Rounds};
use paged_attention::Attention;

use crate::SECONDS;
use crate::case::Case;

/// The number of orders: in order, one block, random order.
const ORDERS: usize = 3;

/// Measures the new token of each sequence in every order of blocks. Runs on the threads of the current pool.
pub(crate) fn orders(case: &Case, record: &mut Record) -> Result<()> {
    let one_block = Case { block_size: case.capacity(), ..*case };
    let random_order = Case { shuffled: true, ..*case };
    let cases = [*case, one_block, random_order];
    let races = (0..ORDERS).map(|first| race(&cases, first)).collect::<Result<Vec<_>>>()?;
    let mean = |of: &dyn Fn(&[f64; ORDERS]) -> f64| {
        (races.iter().map(|times| of(times).ln()).sum::<f64>() / races.len() as f64).exp()
    };
    let name = format!("orders {}", case.name());
    record.value(&name, "in order", mean(&|times| times[0]), "ns");
    record.value(&name, "one block", mean(&|times| times[1]), "x");
    record.value(&name, "random order", mean(&|times| times[2]), "x");
    Ok(())
}

/// The time of the first case, and the times of the others divided by it. The caches are created in turn, beginning
/// with case `first`.
fn race(cases: &[Case; ORDERS], first: usize) -> Result<[f64; ORDERS]> {
    let case = &cases[0];
    let mut filled = (0..ORDERS).map(|turn| cases[(first + turn) % ORDERS].filled()).collect::<Result<Vec<_>>>()?;
    filled.rotate_right(first);
    let q = case.random(&[case.batch, case.heads, case.head_dim])?;
    let k = case.random(&[case.batch, case.kv_heads, case.head_dim])?;
    let (attention, layers) = (Attention::new(case.scale()), case.layers());
    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for (cache, tables) in &mut filled {
        let mut step = cache.step();
        for table in tables {
            step.push(table, &[0])?;
        }
        let (q, k, attention, mut layer) = (&q, &k, &attention, 0);
        contenders.push(Contender::timed("paged", move |_| {
            layer = (layer + 1) % layers;
            black_box(step.attend(layer, q, k, k, attention).expect("the shapes fit"));
        }));
    }
    let race = Race::run(Rounds::for_seconds(SECONDS), &mut contenders)?;
    Ok([race.time(0), race.ratio(1, 0), race.ratio(2, 0)])
}
