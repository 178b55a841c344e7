//! Two callers at once, each with its own thread and its own sequence in one cache: the work of both together divided
//! by the work of one alone, and the same for two callers that only read.

use std::cell::RefCell;
use std::hint::black_box;
use std::thread;

use anyhow::Result;
use benches::{Contender, Race, Record, Rounds};
use paged_attention::{Attention, Step};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::case::Case;
use crate::{SECONDS, decode, floor};

/// Layers that a caller attends over in a turn: enough to make the time to start its thread negligible.
const LAYERS: usize = 32;

/// A caller with its own thread and its own step.
struct Caller<'a> {
    pool: ThreadPool,
    step: Step<'a>,
    /// The blocks of its sequence.
    order: Vec<u32>,
    /// The layer of its last call; the next call takes the one after it.
    next: usize,
}

/// All callers at once do `work` for [`LAYERS`] layers, one layer after the other.
fn run(callers: &mut [Caller<'_>], layers: usize, work: &(impl Fn(&Step<'_>, &[u32], usize) + Sync)) {
    thread::scope(|scope| {
        for Caller { pool, step, order, next } in callers {
            scope.spawn(move || {
                pool.install(|| {
                    for _ in 0..LAYERS {
                        *next = (*next + 1) % layers;
                        work(step, order, *next);
                    }
                });
            });
        }
    });
}

/// Measures attention of the new token for one caller and for two at once, and one and two readers of the same blocks.
pub(crate) fn together(case: &Case, record: &mut Record) -> Result<()> {
    let (cache, mut tables) = case.filled()?;
    let layers = case.layers();
    let block = cache.bytes_per_block() / layers / 4;
    let q = case.random(&[1, case.heads, case.head_dim])?;
    let k = case.random(&[1, case.kv_heads, case.head_dim])?;
    let attention = Attention::new(case.scale());
    let pool = || ThreadPoolBuilder::new().num_threads(1).build();
    let mut callers = Vec::new();
    for (i, table) in tables.iter_mut().enumerate() {
        let order = table.blocks().iter().map(|id| id.index() as u32).collect();
        let mut step = cache.step();
        step.push(table, &[0])?;
        callers.push(Caller { pool: pool()?, step, order, next: i * layers / 2 });
    }
    let attend = |step: &Step<'_>, _: &[u32], layer: usize| {
        black_box(step.attend(layer, &q, &k, &k, &attention).expect("the shapes fit"));
    };
    let read = |_: &Step<'_>, order: &[u32], layer: usize| {
        let layer = cache.tensor(layer).expect("the layer exists");
        black_box(decode::with_words(layer, |words| floor::plain(words, block, order)).expect("it is on a CPU"));
    };
    let callers = RefCell::new(callers);
    let mut contenders: Vec<Contender<'_>> = vec![
        Contender::timed("one attends", |_| run(&mut callers.borrow_mut()[..1], layers, &attend)),
        Contender::timed("two attend", |_| run(&mut callers.borrow_mut(), layers, &attend)),
        Contender::timed("one reads", |_| run(&mut callers.borrow_mut()[..1], layers, &read)),
        Contender::timed("two read", |_| run(&mut callers.borrow_mut(), layers, &read)),
    ];
    let race = Race::run(Rounds::for_seconds(SECONDS), &mut contenders)?;
    drop(contenders);
    let name = format!("two callers {}", case.name());
    record.value(&name, "work of one", 2.0 * race.ratio(0, 1), "x");
    record.value(&name, "reading of one", 2.0 * race.ratio(2, 3), "x");
    Ok(())
}
