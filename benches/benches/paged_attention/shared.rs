//! One new token for each of several sequences that begin alike, compared with one sequence, with sharing switched off,
//! and with the limits of the machine: reading each block once, and as many multiply-adds in registers.

use std::cell::Cell;
use std::hint::black_box;

use anyhow::Result;
use benches::{Contender, Race, Record, Rounds};
use candle_core::Tensor;
use paged_attention::{Attention, BlockTable, KvCache, KvShape, Step};

use crate::case::{COLD, Case};
use crate::{SECONDS, decode, floor};

/// Tokens of each sequence that no other has.
const TAIL: usize = 128;

/// What sequences share.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tree {
    /// All sequences share the whole prefix.
    OneLevel,
    /// All share a half of it, each quarter of the sequences another quarter, and each eighth the rest.
    ThreeLevels,
}

impl Tree {
    /// The parts of the prefix, and how many sequences share each.
    fn levels(self, sequences: usize, prefix: usize) -> Vec<(usize, usize)> {
        match self {
            Tree::OneLevel => vec![(prefix, sequences)],
            Tree::ThreeLevels => {
                let rest = prefix / 4;
                vec![(prefix / 2, sequences), (rest, sequences.div_ceil(4)), (rest, sequences.div_ceil(8))]
            }
        }
    }
}

/// Measures `case.batch` sequences with a prefix of `case.context` tokens.
pub(crate) fn shared(case: &Case, tree: Tree, record: &mut Record) -> Result<()> {
    let Case { heads, kv_heads, head_dim, batch, context, dtype, threads, .. } = *case;
    let levels = tree.levels(batch, context);
    let unique: usize = levels.iter().map(|(tokens, shared_by)| tokens * batch.div_ceil(*shared_by)).sum();
    let tokens = unique + (batch + 1) * (TAIL + case.block_size);
    let bytes = KvShape::new(1, kv_heads, head_dim).bytes_per_block(1, dtype).expect("a token's bytes can be counted");
    let layers = if benches::is_smoke_test() { 1 } else { COLD.div_ceil(tokens * bytes) };
    let shape = KvShape::new(layers, kv_heads, head_dim);
    let cache = KvCache::builder(shape).blocks(tokens.div_ceil(case.block_size) + batch).dtype(dtype).build()?;
    let mut fill = Fill { case, cache: &cache, next: 0 };
    let mut tables = fill.tree(cache.table(), &levels, batch)?;
    let mut one = vec![tables[0].fork()];
    for table in tables.iter_mut().chain(&mut one) {
        fill.append(table, TAIL - 1)?;
    }

    let q = case.random(&[batch, heads, head_dim])?;
    let k = case.random(&[batch, kv_heads, head_dim])?;
    let of_one = [q.narrow(0, 0, 1)?, k.narrow(0, 0, 1)?];
    let (step, one) = (step_of(&cache, &mut tables)?, step_of(&cache, &mut one)?);
    let turn = Cell::new(0);
    let layer = || {
        turn.set((turn.get() + 1) % layers);
        turn.get()
    };
    let attend = |step: &Step<'_>, q: &Tensor, k: &Tensor, attention: &Attention| {
        black_box(step.attend(layer(), q, k, k, attention).expect("the shapes fit"));
    };
    let mut order: Vec<u32> = step.metadata(0)?.kv_indices()?.to_vec1()?;
    order.sort_unstable();
    order.dedup();
    let block = cache.bytes_per_block() / layers / 4;
    let multiply_adds = 2 * batch * (context + TAIL) * heads * head_dim;
    let chains = multiply_adds / benches::CHAINS / threads;
    let attention = Attention::new(case.scale());
    let apart = attention.clone().shared_reads_from(usize::MAX);
    let mut contenders: Vec<Contender<'_>> = vec![
        Contender::timed("shared", |_| attend(&step, &q, &k, &attention)),
        Contender::timed("apart", |_| attend(&step, &q, &k, &apart)),
        Contender::timed("one", |_| attend(&one, &of_one[0], &of_one[1], &attention)),
        Contender::timed("reading", |_| {
            let layer = cache.tensor(layer()).expect("the layer exists");
            let read = |words: &[u32]| floor::four_streams(words, block, &order);
            black_box(decode::with_words(layer, read).expect("it is on a CPU"));
        }),
        Contender::timed("multiply-adds", |_| {
            black_box(floor::multiply_adds(chains));
        }),
    ];
    let race = Race::run(Rounds::for_seconds(SECONDS), &mut contenders)?;
    drop(contenders);
    let kind = if tree == Tree::OneLevel { "" } else { " three levels" };
    let name = format!("shared/{heads}/{kv_heads}x{head_dim}/{dtype}/{context}/{batch}/{threads}{kind}");
    record.value(&name, "time", race.time(0), "ns");
    record.value(&name, "of_one", race.ratio(0, 2), "x");
    record.value(&name, "of_apart", race.ratio(0, 1), "x");
    record.value(&name, "of_floor", race.ratio(3, 0).max(race.ratio(4, 0)), "x");
    Ok(())
}

/// A step with a new token for each of these tables.
fn step_of<'a>(cache: &'a KvCache, tables: &'a mut [BlockTable]) -> Result<Step<'a>> {
    let mut step = cache.step();
    for table in tables {
        step.push(table, &[0])?;
    }
    Ok(step)
}

/// Fills tables with random keys and values.
struct Fill<'a> {
    case: &'a Case,
    cache: &'a KvCache,
    /// The id of the next token: each is new.
    next: u32,
}

impl Fill<'_> {
    /// Forks of `base` for this many sequences, with the tokens that they share.
    fn tree(&mut self, base: BlockTable, levels: &[(usize, usize)], sequences: usize) -> Result<Vec<BlockTable>> {
        let Some(((tokens, shared_by), deeper)) = levels.split_first() else {
            return Ok((0..sequences).map(|_| base.fork()).collect());
        };
        let mut tables = Vec::new();
        for first in (0..sequences).step_by(*shared_by) {
            let mut table = base.fork();
            self.append(&mut table, *tokens)?;
            tables.extend(self.tree(table, deeper, sequences.min(first + shared_by) - first)?);
        }
        Ok(tables)
    }

    fn append(&mut self, table: &mut BlockTable, tokens: usize) -> Result<()> {
        let mut step = self.cache.step();
        step.push(table, &(self.next..).take(tokens).collect::<Vec<_>>())?;
        self.next += tokens as u32;
        let history = self.case.random(&[tokens, self.case.kv_heads, self.case.head_dim])?;
        for layer in 0..self.cache.layers() {
            step.write(layer, &history, &history)?;
        }
        Ok(step.commit()?)
    }
}
