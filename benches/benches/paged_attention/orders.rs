//! The same sequences in blocks of 16 in order, in one block each, and in blocks of 16 in random order, in turns: what paging
//! costs.

use std::hint::black_box;

use anyhow::Result;
use benches::{Contender, Race, Record};
use paged_attention::Attention;

use crate::SECONDS;
use crate::case::Case;

/// Measures the new token of each sequence in every order of blocks. Runs on the threads of the current pool.
pub(crate) fn orders(case: &Case, record: &mut Record) -> Result<()> {
    let one_block = Case { block_size: case.capacity(), ..*case };
    let random_order = Case { shuffled: true, ..*case };
    let mut filled = [*case, one_block, random_order].iter().map(Case::filled).collect::<Result<Vec<_>>>()?;
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
        contenders.push(Box::new(move || {
            layer = (layer + 1) % layers;
            black_box(step.attend(layer, q, k, k, attention).expect("the shapes fit"));
        }));
    }
    let race = Race::run_for(2.0 * SECONDS, &mut contenders);
    let name = format!("orders {}", case.name());
    record.value(&name, "in order", race.time(0), "ns");
    record.value(&name, "one block", race.ratio(1, 0), "x");
    record.value(&name, "random order", race.ratio(2, 0), "x");
    Ok(())
}
