//! Blocks that several sequences share are read once for all of them: each result is the same to the last bit as if every
//! sequence had been computed alone.

use candle_core::Tensor;
use paged_attention::{BlockTable, KvCache, KvDtype};

use crate::case::{Case, Numbers, cases, stores};
use crate::common::{Configure, Random};
use crate::numbers_of;

const BLOCK_SIZES: [usize; 6] = [16, 1, 7, 32, 64, 600];

/// Compares all results of a random history of forks with what they are without shared reads. Returns how many tokens
/// were read for several sequences at once.
fn history(case: &Case, configure: &Configure, dtype: KvDtype, seed: usize) -> usize {
    let block_size = BLOCK_SIZES[seed % BLOCK_SIZES.len()];
    let cache = case.cache(configure, dtype, block_size, 12_000);
    let mut random = Random::new(seed as u64);
    let mut run = Run { case, cache: &cache, poison: seed % 3 == 1, numbers: seed as u64, shared: 0 };
    // Long enough for the whole of every image, and for two chunks.
    let mut tables = vec![cache.table()];
    let prefix = 600 + random.below(500);
    run.step(&mut tables, |_| prefix);
    for _ in 0..6 {
        for _ in 0..random.below(4) {
            let table = &tables[random.below(tables.len())];
            tables.push(table.fork());
        }
        if tables.len() > 7 || random.below(4) == 0 && tables.len() > 1 {
            drop(tables.swap_remove(random.below(tables.len())));
        }
        let table = random.below(tables.len());
        if random.below(3) == 0 {
            let len = tables[table].len();
            // A window may have freed what the last tokens would see.
            let _ = tables[table].truncate(len - random.below(len - 500).min(70));
        }
        run.step(&mut tables, |_| [1, 1, 1, 0, 2, 5, 40][random.below(7)]);
    }
    run.shared
}

struct Run<'a> {
    case: &'a Case,
    cache: &'a KvCache,
    /// Whether some numbers are not finite.
    poison: bool,
    /// The seed of the next step's numbers.
    numbers: u64,
    shared: usize,
}

impl Run<'_> {
    /// One step, to which each table pushes a number of tokens.
    fn step(&mut self, tables: &mut [BlockTable], mut tokens: impl FnMut(usize) -> usize) {
        let mut step = self.cache.step();
        for (i, table) in tables.iter_mut().enumerate() {
            let n = tokens(i);
            if n > 0 {
                let ids: Vec<u32> = (0..n as u32).map(|token| (self.numbers as u32) << 12 | token).collect();
                let options = self.case.push_options(&(table.len()..table.len() + n));
                step.push_with(table, &ids, &options).unwrap();
            }
        }
        let rows = step.tokens();
        if rows == 0 {
            return;
        }
        let mut numbers = self.case.numbers(rows, self.numbers);
        self.numbers += 1;
        if self.poison {
            self.spoil(&mut numbers);
        }
        let attention = self.case.attention();
        let (q, k, v) = self.case.tensors(&numbers, &(0..rows));
        let (out, lse) = step.attend_with_lse(0, &q, &k, v.as_ref(), &attention).unwrap();
        let (alone, alone_lse) = step.attend_cached_with_lse(0, &q, &attention.shared_reads(false)).unwrap();
        let bits = |tensor: &Tensor| numbers_of(tensor).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert!(
            bits(&out) == bits(&alone) && bits(&lse) == bits(&alone_lse),
            "{}, seed of numbers {}",
            self.case.name,
            self.numbers
        );
        self.shared += step.shared_tokens(0).unwrap();
        step.commit().unwrap();
    }

    /// Makes a key or a value in every third step not finite.
    fn spoil(&self, numbers: &mut Numbers) {
        let mut random = Random::new(self.numbers);
        let spoilt = [f32::NAN, f32::INFINITY, 3e38][random.below(3)];
        match random.below(6) {
            0 => {
                let at = random.below(numbers.k.len());
                numbers.k[at] = spoilt;
            }
            1 => {
                let at = random.below(numbers.v.len());
                numbers.v[at] = spoilt;
            }
            _ => {}
        }
    }
}

#[test]
fn results_are_the_same_as_alone() {
    let stores: Vec<_> = stores().into_iter().filter(|(name, ..)| !name.starts_with("gather")).collect();
    for (i, case) in cases().iter().enumerate() {
        // A third of the kernels and types for each case, in turns.
        let each = stores.iter().zip(i * stores.len()..).skip(i % 3).step_by(3);
        let shared: usize = each.map(|((_, configure, dtype), seed)| history(case, configure, *dtype, seed)).sum();
        assert!(shared > 1000, "{}: {shared} tokens", case.name);
    }
}
