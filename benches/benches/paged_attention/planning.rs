//! Finding out which blocks sequences share, where they share none, compared with the attention of one layer. It is done
//! once for all layers of a step.

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use benches::{Contender, Race, Record, Rounds};
use paged_attention::Attention;

use crate::SECONDS;
use crate::case::Case;

/// Measures a step with one new token for each sequence.
pub(crate) fn planning(case: &Case, record: &mut Record) -> Result<()> {
    let (cache, tables) = case.filled()?;
    let tables = RefCell::new(tables);
    let q = case.random(&[case.batch, case.heads, case.head_dim])?;
    let k = case.random(&[case.batch, case.kv_heads, case.head_dim])?;
    let attention = Attention::new(case.scale());
    let (layers, turns, of_layer) = (case.layers(), Cell::new(0), Cell::new(0.0));
    let mut contenders: Vec<Contender<'_>> = vec![
        Contender::new("planning", |()| {
            let mut tables = tables.borrow_mut();
            let mut step = cache.step();
            for table in tables.iter_mut() {
                step.push(table, &[0])?;
            }
            let started = Instant::now();
            assert_eq!(black_box(step.shared_tokens(0, &attention)?), 0);
            let planning = started.elapsed();
            turns.set(turns.get() + 1);
            let started = Instant::now();
            black_box(step.attend(turns.get() % layers, &q, &k, &k, &attention)?);
            of_layer.set(started.elapsed().as_nanos() as f64);
            Ok(Some(planning.as_nanos() as f64))
        }),
        Contender::new("attention of the same step", |()| Ok(Some(of_layer.get()))),
    ];
    let race = Race::run(Rounds::for_seconds(SECONDS), &mut contenders)?;
    let Case { heads, kv_heads, head_dim, batch, context, dtype, threads, .. } = case;
    let name = format!("planning/{heads}/{kv_heads}x{head_dim}/{dtype}/{context}/{batch}/{threads}");
    record.value(&name, "time", race.time(0), "ns");
    record.value(&name, "of_layer", 100.0 * race.ratio(0, 1), "%");
    Ok(())
}
