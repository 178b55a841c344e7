//! Blocks that several sequences share are read once for all of them: each result is the same to the last bit as if every
//! sequence had been computed alone.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use paged_attention::{Attention, BlockTable, KvCache, KvDtype, KvShape};

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
        let attention = self.case.attention().shared_reads_from(0);
        let (q, k, v) = self.case.tensors(&numbers, &(0..rows));
        let (out, lse) = step.attend_with_lse(0, &q, &k, v.as_ref(), &attention).unwrap();
        let (alone, alone_lse) =
            step.attend_cached_with_lse(0, &q, &attention.clone().shared_reads_from(usize::MAX)).unwrap();
        let bits = |tensor: &Tensor| numbers_of(tensor).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert!(
            bits(&out) == bits(&alone) && bits(&lse) == bits(&alone_lse),
            "{}, seed of numbers {}",
            self.case.name,
            self.numbers
        );
        self.shared += step.shared_tokens(0, &attention).unwrap();
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
        // A window without sink tokens sees the last tokens only, which are each sequence's own.
        let sees_what_is_shared = case.window.is_none_or(|window| window.sink_tokens() > 0);
        assert_eq!(shared > 1000, sees_what_is_shared, "{}: {shared} tokens", case.name);
    }
}

/// More heads, rows and threads than the histories have: tasks of several sequences have fewer heads than those of one,
/// are split into parts, and threads go from the ones to the others in any order.
#[test]
fn many_sequences_over_one_prompt_are_the_same_as_alone() {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(6).build().unwrap();
    for (heads, kv_heads, sequences) in [(32, 8, 32), (8, 8, 40), (48, 4, 20), (16, 1, 3)] {
        let cache = KvCache::builder(KvShape::new(1, kv_heads, 16)).blocks(2000).build().unwrap();
        let random = |tokens, heads| Tensor::randn(0f32, 1., (tokens, heads, 16), &Device::Cpu).unwrap();
        let grow = |table: &mut BlockTable, tokens: Range<u32>| {
            let mut step = cache.step();
            let (k, v) = (random(tokens.len(), kv_heads), random(tokens.len(), kv_heads));
            step.push(table, &tokens.collect::<Vec<_>>()).unwrap();
            step.write(0, &k, &v).unwrap();
            step.commit().unwrap();
        };
        // The prompt ends in a chunk, and what the sequences have of their own reaches the next.
        let mut prompt = cache.table();
        grow(&mut prompt, 0..2100);
        let mut tables: Vec<_> = (0..sequences).map(|_| prompt.fork()).collect();
        for (table, ids) in tables.iter_mut().zip((1..).map(|i| 1000 * i)) {
            grow(table, ids..ids + 500);
        }
        let (q, k) = (random(sequences, heads), random(sequences, kv_heads));
        let mut step = cache.step();
        for table in &mut tables {
            step.push(table, &[1]).unwrap();
        }
        // Four chunks of 512 tokens, for all but the first.
        let attention = Attention::scaled_by(16);
        assert_eq!(step.shared_tokens(0, &attention).unwrap(), (sequences - 1) * 2048);
        let attend = |attention: &Attention| {
            let y = threads.install(|| step.attend(0, &q, &k, &k, attention)).unwrap();
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let alone = attend(&attention.clone().shared_reads_from(usize::MAX));
        for round in 0..40 {
            let together = attend(&attention);
            let same = alone.iter().zip(&together).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{heads}/{kv_heads}, {sequences} sequences, round {round}");
        }
    }
}

#[test]
fn sequences_that_are_pushed_later_share_too() {
    let cache = KvCache::builder(KvShape::new(1, 1, 16)).blocks(160).build().unwrap();
    let mut tables = vec![cache.table()];
    let mut step = cache.step();
    step.push(&mut tables[0], &(0..2100).collect::<Vec<_>>()).unwrap();
    step.write(0, &zeros(2100), &zeros(2100)).unwrap();
    step.commit().unwrap();
    tables.extend([tables[0].fork(), tables[0].fork()]);
    let mut step = cache.step();
    for (table, shared) in tables.iter_mut().zip([0, 2048, 4096]) {
        step.push(table, &[1]).unwrap();
        assert_eq!(step.shared_tokens(0, &Attention::scaled_by(16)).unwrap(), shared);
    }
}

fn zeros(tokens: usize) -> Tensor {
    Tensor::zeros((tokens, 1, 16), DType::F32, &Device::Cpu).unwrap()
}
