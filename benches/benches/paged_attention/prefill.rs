//! The prefill of a whole prompt, compared with the machine's limit of multiply-adds.

use std::hint::black_box;

use anyhow::Result;
use benches::{Contender, Race, Record, Rounds};
use paged_attention::{Attention, KvCache, KvShape};

use crate::case::Case;
use crate::{SECONDS, floor};

/// Measures the prefill of one causal sequence of `case.context` tokens, compared with the same number of multiply-adds
/// in registers. Runs on the threads of the current pool.
pub(crate) fn prefill(case: &Case, record: &mut Record) -> Result<()> {
    let shape = KvShape::new(1, case.kv_heads, case.head_dim);
    let cache = KvCache::builder(shape).memory(case.bytes() + (1 << 20)).dtype(case.dtype).build()?;
    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &vec![0; case.context])?;
    let q = case.random(&[case.context, case.heads, case.head_dim])?;
    let k = case.random(&[case.context, case.kv_heads, case.head_dim])?;
    let attention = Attention::new(case.scale());
    // Each token sees itself and the tokens before it, with one multiply-add per number of the key and of the value.
    let multiply_adds = 2 * case.context * (case.context + 1) / 2 * case.heads * case.head_dim;
    let chains = multiply_adds / benches::CHAINS / case.threads;
    let mut contenders: Vec<Contender<'_>> = vec![
        Contender::timed("paged", |_| {
            black_box(step.attend(0, &q, &k, &k, &attention).expect("the shapes fit"));
        }),
        Contender::timed("floor", |_| {
            black_box(floor::multiply_adds(chains));
        }),
    ];
    let race = Race::run(Rounds::for_seconds(SECONDS), &mut contenders)?;
    drop(contenders);
    let name = format!("prefill {}", case.name());
    record.compared(&name, "time", race.time(0), "ns", Some(race.ratio(1, 0)), []);
    record.value(&name, "useful", 2.0 * multiply_adds as f64 / race.time(0), "GFLOP/s");
    Ok(())
}
