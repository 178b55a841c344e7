//! Bookkeeping without tensors: allocating and freeing blocks, appending a token to a table, and forking a table.

use std::hint::black_box;

use benches::{Record, Stopwatch};
use criterion::Criterion;
use paged_attention::{BlockPool, BlockTable};

fn main() -> anyhow::Result<()> {
    let mut criterion = Criterion::default().configure_from_args();
    let c = &mut criterion;
    let mut record = Record::default();
    let pool = BlockPool::new(4096, 16)?;

    // A hundred calls per sample: one call takes no longer than reading the clock.
    const TIMES: usize = 100;
    for n in [1, 64] {
        let time = Stopwatch::time(c, &format!("allocate {n} and free"), || {
            for _ in 0..TIMES {
                drop(black_box(pool.allocate(n)));
            }
        });
        record.time(&format!("allocate {n} and free, per block"), time.map(|t| t / (TIMES * n) as f64), None, &[]);
    }

    for context in [512, 4096, 16_384] {
        let mut table = BlockTable::new(&pool);
        let prompt: Vec<u32> = (0..context as u32).collect();
        table.reserve(context)?;
        table.commit_tokens(&prompt)?;
        // Never the same tokens twice: full blocks stay cached after `truncate` and are evicted, as in a pool that has
        // been in use for long.
        let mut token = 0u32;
        let time = Stopwatch::time(c, &format!("append at {context}"), || {
            for _ in 0..TIMES {
                token = token.wrapping_add(1);
                table.reserve(1).expect("the pool has room");
                black_box(table.commit_tokens(&[token])).expect("there is room");
            }
            table.truncate(context).expect("there is no window");
        });
        record.time(&format!("append 1 token at {context}, bookkeeping"), time.map(|t| t / TIMES as f64), None, &[]);
    }

    let mut table = BlockTable::new(&pool);
    table.append(64 * 16)?;
    let time = Stopwatch::time(c, "fork 64", || {
        for _ in 0..TIMES {
            drop(black_box(table.fork()));
        }
    });
    record.time("fork 64 blocks and drop, per block", time.map(|t| t / (TIMES * 64) as f64), None, &[]);

    criterion.final_summary();
    record.write("allocate")
}
