//! Attention over blocks equals dense attention in f64 over the same tokens: for every backend and kernel, every
//! storage type, block size and head geometry, and whatever blocks hold the tokens.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use block_pool::Blocks;
use candle_core::{DType, Device};
use common::{Configure, Random, backends, dense, difference, poison, rounded, stored_as, tensor};
use paged_attention::{Attention, BlockTable, Kernel, KvCache, KvDtype, KvShape, TableOptions, Window};

/// One sequence, and a contiguous copy of all its keys and values as they are stored.
struct Sequence {
    table: BlockTable,
    k: Vec<f32>,
    v: Vec<f32>,
}

#[derive(Clone)]
struct Case {
    heads: usize,
    shape: KvShape,
    dtype: KvDtype,
    causal: bool,
    /// The window of the tables.
    window: Option<Window>,
    /// The window of the layer.
    layer_window: Option<Window>,
    soft_cap: Option<f32>,
    slopes: Option<Vec<f32>>,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            heads,
            shape: KvShape::new(1, kv_heads, head_dim),
            dtype: KvDtype::F32,
            causal: true,
            window: None,
            layer_window: None,
            soft_cap: None,
            slopes: None,
        }
    }

    /// The promised accuracy: that of f32 arithmetic; for 8-bit storage, that of queries and weights of at least 13
    /// bits.
    fn bound(&self) -> f64 {
        if self.dtype == KvDtype::Int8 { 1e-3 } else { 1e-5 }
    }

    fn attention(&self, scale: f32) -> Attention {
        let mut attention = Attention::new(scale).causal(self.causal);
        if let Some(window) = self.layer_window {
            attention = attention.window(window);
        }
        if let Some(cap) = self.soft_cap {
            attention = attention.soft_cap(cap);
        }
        if let Some(slopes) = &self.slopes {
            attention = attention.alibi(slopes);
        }
        attention
    }

    /// Whether the token at `position` sees the one at `at`.
    fn sees(&self, at: usize, position: usize) -> bool {
        let windows = [self.window, self.layer_window].into_iter().flatten();
        let sees = |window: Window| at < window.sink_tokens() || at + window.tokens() > position;
        (!self.causal || at <= position) && windows.into_iter().all(sees)
    }

    fn cache(&self, configure: &Configure, block_size: usize, tokens: usize) -> KvCache {
        let blocks = tokens.div_ceil(block_size) + 8;
        let cache = configure(KvCache::builder(self.shape).blocks(blocks).block_size(block_size).dtype(self.dtype));
        let cache = cache.build().unwrap();
        poison(&cache);
        cache
    }

    /// Runs one step in which sequence `i` gets `new[i]` tokens. Returns the largest difference from dense attention.
    fn step(&self, free: &mut Scattered<'_>, sequences: &mut [Sequence], new: &[usize], random: &mut Random) -> f64 {
        let KvShape { kv_heads, head_dim, layers, .. } = self.shape;
        let cache = free.cache;
        let scale = 0.3;
        let tokens: usize = new.iter().sum();
        let mut step = cache.step();
        let q = random.numbers(tokens * self.heads * head_dim);
        let k = random.numbers(tokens * kv_heads * head_dim);
        let v = random.numbers(tokens * kv_heads * head_dim);
        let mut at = 0;
        for (sequence, &n) in sequences.iter_mut().zip(new).filter(|(_, n)| **n > 0) {
            // Every token is different, as their keys and values are.
            let ids: Vec<u32> = (0..n).map(|_| random.below(1 << 30) as u32).collect();
            free.reserve(&mut sequence.table, n);
            step.push(&mut sequence.table, &ids).unwrap();
            let own = at * kv_heads * head_dim..(at + n) * kv_heads * head_dim;
            sequence.k.extend(stored_as(&k[own.clone()], head_dim, self.dtype));
            sequence.v.extend(stored_as(&v[own], head_dim, self.dtype));
            at += n;
        }
        let (qt, kt, vt) = (
            tensor(&q, self.heads, head_dim, DType::F32),
            tensor(&k, kv_heads, head_dim, DType::F32),
            tensor(&v, kv_heads, head_dim, DType::F32),
        );
        let got = step.attend(layers - 1, &qt, &kt, &vt, &self.attention(scale)).unwrap();
        assert_eq!(got.dims(), qt.dims());
        let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
        step.commit().unwrap();

        let width = self.heads * head_dim;
        let mut row = 0;
        let mut reference = Vec::new();
        for (sequence, &n) in sequences.iter().zip(new) {
            let len = sequence.table.len();
            for i in 0..n {
                let position = len - n + i;
                let seen: Vec<usize> = (0..len).filter(|&at| self.sees(at, position)).collect();
                let q = &q[row * width..][..width];
                let score = |head: usize, at: usize, product: f64| {
                    let capped =
                        self.soft_cap.map_or(product, |cap| f64::from(cap) * (product / f64::from(cap)).tanh());
                    let slope = self.slopes.as_ref().map_or(0.0, |slopes| f64::from(slopes[head]));
                    capped + slope * (at as f64 - position as f64)
                };
                let scale = f64::from(scale);
                reference.extend(dense(q, &sequence.k, &sequence.v, &seen, kv_heads, head_dim, scale, score));
                row += 1;
            }
        }
        difference(&got, &reference)
    }

    /// Runs steps with these numbers of new tokens, and compares each with dense attention.
    fn run(&self, name: &str, configure: &Configure, block_size: usize, steps: &[Vec<usize>]) {
        let tokens = steps.iter().flatten().sum::<usize>() + steps[0].len() * block_size;
        let cache = self.cache(configure, block_size, tokens);
        let table = || match self.window {
            Some(window) => cache.table_with(&TableOptions::default().window(window)),
            None => cache.table(),
        };
        let mut random = Random::new(7);
        let mut free = Scattered::new(&cache);
        let mut sequences: Vec<_> =
            steps[0].iter().map(|_| Sequence { table: table(), k: vec![], v: vec![] }).collect();
        for new in steps {
            let worst = self.step(&mut free, &mut sequences, new, &mut random);
            let Case { heads, shape: KvShape { kv_heads, head_dim, .. }, dtype, .. } = self;
            assert!(
                worst < self.bound(),
                "{name}, {heads}/{kv_heads}x{head_dim}, blocks of {block_size}, {dtype}, {new:?}: {worst:e}"
            );
        }
    }
}

/// Scatters the blocks of tables over the pool. It allocates all free blocks itself, and frees one of them at random
/// for each block that a table needs, so that the table gets that one. (The allocator would mostly return the lowest
/// free block.)
struct Scattered<'c> {
    cache: &'c KvCache,
    allocated: Vec<Blocks>,
    random: Random,
}

impl<'c> Scattered<'c> {
    fn new(cache: &'c KvCache) -> Self {
        Self { cache, allocated: Vec::new(), random: Random::new(11) }
    }

    /// Reserves slots for `n` tokens in a table.
    fn reserve(&mut self, table: &mut BlockTable, n: usize) {
        let end = table.len() + n;
        while table.capacity() < end {
            self.allocated.extend(std::iter::from_fn(|| self.cache.pool().allocate(1).ok()));
            drop(self.allocated.swap_remove(self.random.below(self.allocated.len())));
            let next = table.capacity() + 1;
            table.reserve(next - table.len()).unwrap();
        }
        let blocks = table.blocks();
        assert!(blocks.len() < 10 || !blocks.is_sorted(), "the blocks are in order, but should be scattered");
    }
}

/// Every storage type that the backend of this name can read.
fn dtypes(name: &str) -> impl Iterator<Item = KvDtype> {
    let fused = name != "gather";
    KvDtype::ALL.into_iter().filter(move |dtype| fused || *dtype != KvDtype::Int8)
}

#[test]
fn every_kernel_geometry_and_storage() {
    for (name, configure) in backends() {
        for (heads, kv_heads, head_dim) in [
            (1, 1, 8),
            (4, 2, 32),
            (9, 3, 64),
            (8, 1, 40),
            (6, 6, 33),
            (8, 2, 128),
            (5, 1, 17),
            (2, 1, 256),
            (6, 2, 80),
            (4, 4, 48),
        ] {
            for block_size in [1, 7, 16, 24, 32] {
                for dtype in dtypes(name) {
                    let b = block_size;
                    // Prefill and decode mixed, with chunks that end near the boundaries of blocks and tiles.
                    let steps = [[b, 1, 0, 3], [1, b, 2 * b + 1, 0], [1, 1, 1, 1], [b + 1, 0, 1, 70], [1, 1, 1, 1]];
                    let case = Case { dtype, ..Case::new(heads, kv_heads, head_dim) };
                    case.run(name, &configure, block_size, &steps.map(Vec::from));
                }
            }
        }
    }
}

#[test]
fn every_length_around_block_boundaries() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            for block_size in [1, 7, 16, 32] {
                for blocks in 1..=3 {
                    for len in [blocks * block_size - 1, blocks * block_size, blocks * block_size + 1] {
                        let case = Case { dtype, ..Case::new(4, 1, 32) };
                        case.run(name, &configure, block_size, &[vec![len.max(1)], vec![1], vec![1]]);
                    }
                }
            }
        }
    }
}

#[test]
fn long_sequences_and_no_mask() {
    for (name, configure) in backends() {
        for (causal, dtype) in dtypes(name).flat_map(|dtype| [(true, dtype), (false, dtype)]) {
            let case = Case { causal, dtype, ..Case::new(6, 2, 64) };
            // Several chunks, whose boundaries are crossed in prefill and in decode.
            case.run(
                name,
                &configure,
                16,
                &[vec![300], vec![1], vec![209], vec![1], vec![1], vec![1], vec![600], vec![1]],
            );
        }
    }
}

#[test]
fn windows_that_leave_out_whole_chunks() {
    for (name, configure) in backends() {
        for (window, sink_tokens) in [(100, 0), (100, 5), (700, 513)] {
            let layer_window = Some(Window::new(window).with_sink_tokens(sink_tokens));
            let case = Case { layer_window, ..Case::new(4, 2, 32) };
            case.run(name, &configure, 16, &[vec![1500], vec![1], vec![40], vec![2], vec![1]]);
        }
    }
}

#[test]
fn every_option_alone_and_all_together() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            let plain = Case { dtype, ..Case::new(6, 2, 32) };
            let soft_cap = Some(2.5);
            let slopes = Some(Attention::alibi_slopes(6));
            let layer_window = Some(Window::new(50).with_sink_tokens(3));
            let window = Some(Window::new(80).with_sink_tokens(5));
            for case in [
                Case { soft_cap, ..plain.clone() },
                Case { slopes: slopes.clone(), ..plain.clone() },
                Case { layer_window, ..plain.clone() },
                Case { soft_cap, slopes: slopes.clone(), layer_window, ..plain.clone() },
                Case { soft_cap, slopes, layer_window, window, ..plain.clone() },
            ] {
                case.run(name, &configure, 16, &[vec![130, 3], vec![1, 1], vec![33, 70], vec![1, 600], vec![1, 1]]);
            }
        }
    }
}

#[test]
fn windows_and_sink_tokens() {
    for (name, configure) in backends() {
        for (block_size, window, sink_tokens) in
            [(1, 5, 2), (4, 9, 3), (16, 40, 4), (16, 1, 0), (7, 200, 20), (64, 70, 65)]
        {
            for causal in [true, false] {
                let window = Window::new(window).with_sink_tokens(sink_tokens);
                let case = Case { causal, window: Some(window), ..Case::new(4, 2, 32) };
                let cache = case.cache(&configure, block_size, 1000);
                let options = TableOptions::default().window(window);
                let mut free = Scattered::new(&cache);
                let sequence = || Sequence { table: cache.table_with(&options), k: vec![], v: vec![] };
                let mut sequences: Vec<_> = (0..2).map(|_| sequence()).collect();
                let mut random = Random::new(5);
                // A prefill longer than the window, then chunks, then single tokens across block boundaries.
                for new in [[150, 3], [1, 1], [33, 70], [1, 64], [90, 1]].into_iter().chain([[1, 1]; 40]) {
                    let worst = case.step(&mut free, &mut sequences, &new, &mut random);
                    assert!(
                        worst < 1e-5,
                        "{name}, blocks of {block_size}, {window:?}, causal {causal}, {new:?}: {worst:e}"
                    );
                }
                let blocks = |tokens: usize| tokens.div_ceil(block_size);
                let most = blocks(window.tokens()) + 1 + blocks(sink_tokens);
                assert!(sequences[0].table.blocks().len() <= most, "{} > {most}", sequences[0].table.blocks().len());
            }
        }
    }
}

#[test]
fn huge_numbers_give_no_nan() {
    for (name, configure) in backends() {
        let shape = KvShape::new(1, 1, 16);
        let cache = configure(KvCache::builder(shape).blocks(8)).build().unwrap();
        poison(&cache);
        let mut table = cache.table();
        let mut step = cache.step();
        step.push(&mut table, &[1; 40]).unwrap();
        let mut random = Random::new(1);
        let huge: Vec<f32> = random.numbers(40 * 16).iter().map(|x| x * 1e4).collect();
        let (q, v) = (tensor(&huge, 1, 16, DType::F32), tensor(&random.numbers(40 * 16), 1, 16, DType::F32));
        let y = step.attend(0, &q, &q, &v, &Attention::new(1.0)).unwrap();
        let y: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
        assert!(y.iter().all(|y| y.abs() <= 1.0), "{name}");
    }
}

/// Token ids that no other sequence has.
fn tokens_of(sequence: usize, at: usize, n: usize) -> Vec<u32> {
    (at..at + n).map(|position| (sequence * 1000 + position) as u32).collect()
}

/// The bits of one sequence's results, computed in steps of `chunks` tokens, together with neighbours that get `others`
/// tokens in each step.
fn bits(
    kernel: Kernel,
    dtype: KvDtype,
    block_size: usize,
    chunks: &[usize],
    others: &[usize],
    threads: usize,
    attention: &Attention,
) -> Vec<u32> {
    let shape = KvShape::new(1, 2, 32);
    let blocks = 4096 / block_size;
    let cache = KvCache::builder(shape).blocks(blocks).block_size(block_size).dtype(dtype).kernel(kernel);
    let cache = cache.build().unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    // The blocks are in order if the sequence is alone, and scattered if it has neighbours.
    let mut free = Scattered::new(&cache);
    let tokens: usize = chunks.iter().sum();
    let mut numbers = Random::new(99);
    let q = tensor(&numbers.numbers(tokens * 4 * 32), 4, 32, DType::F32);
    let k = tensor(&numbers.numbers(tokens * 2 * 32), 2, 32, DType::F32);
    let mut table = cache.table();
    let mut neighbours: Vec<_> = others.iter().map(|_| cache.table()).collect();
    let mut out = Vec::new();
    let mut at = 0;
    for &n in chunks {
        let mut step = cache.step();
        let mut rows = 0;
        for (neighbour, &n) in neighbours.iter_mut().zip(others) {
            free.reserve(neighbour, n);
            step.push(neighbour, &tokens_of(rows + 1, at, n)).unwrap();
            rows += n;
        }
        if !others.is_empty() {
            free.reserve(&mut table, n);
        }
        step.push(&mut table, &tokens_of(0, at, n)).unwrap();
        let with = |own: &candle_core::Tensor, heads| {
            let others = tensor(&Random::new(5).numbers(rows * heads * 32), heads, 32, DType::F32);
            candle_core::Tensor::cat(&[others, own.narrow(0, at, n).unwrap()], 0).unwrap()
        };
        let (q, k) = (with(&q, 4), with(&k, 2));
        let y = pool.install(|| step.attend(0, &q, &k, &k, attention).unwrap());
        let y = y.narrow(0, rows, n).unwrap().flatten_all().unwrap();
        out.extend(y.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits));
        step.commit().unwrap();
        at += n;
    }
    out
}

#[test]
fn fused_results_do_not_depend_on_blocks_neighbours_chunks_or_threads() {
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        for dtype in KvDtype::ALL {
            let attention = Attention::new(0.2);
            let alone = bits(kernel, dtype, 16, &[1150, 1], &[], 1, &attention);
            for (block_size, chunks, others, threads) in [
                (16, &[1150, 1][..], &[][..], 2),
                (16, &[1150, 1], &[3, 40, 1], 2),
                (32, &[7, 600, 543, 1], &[9, 9], 3),
                (8, &[1, 1, 1, 1147, 1], &[], 1),
                (1, &[512, 1, 622, 16], &[2], 2),
            ] {
                let others = &others[..others.len().min(chunks.len())];
                assert!(
                    alone == bits(kernel, dtype, block_size, chunks, others, threads, &attention),
                    "{} {dtype} blocks of {block_size} {chunks:?}",
                    kernel.name()
                );
            }
        }
    }
}

/// With a window, chunks of tokens are skipped; in a prefill, those that none of its tokens sees.
#[test]
fn nor_do_fused_results_with_a_window() {
    for dtype in [KvDtype::F32, KvDtype::Int8] {
        for (window, sink_tokens) in [(700, 0), (700, 5), (100, 5), (700, 513)] {
            let attention = Attention::new(0.2).window(Window::new(window).with_sink_tokens(sink_tokens));
            let bits = |chunks, threads| bits(Kernel::best(), dtype, 16, chunks, &[], threads, &attention);
            let alone = bits(&[1150, 1], 1);
            for (chunks, threads) in [(&[1149, 1, 1][..], 1), (&[1134, 16, 1], 2), (&[7, 600, 543, 1], 3)] {
                assert!(
                    alone == bits(chunks, threads),
                    "{dtype} window {window}, {sink_tokens} sink tokens, {chunks:?}"
                );
            }
        }
    }
}

/// Integer sums are exact, and everything else is computed in one order, so all kernels with fused multiply-add agree.
#[test]
fn kernels_agree_to_the_last_bit() {
    let fused = |kernel: &Kernel| kernel.is_available() && *kernel != Kernel::Portable;
    for dtype in KvDtype::ALL {
        let bits = |kernel| bits(kernel, dtype, 16, &[90, 1], &[3], 2, &Attention::new(0.2));
        let mut all = Kernel::ALL.into_iter().filter(fused).map(bits);
        if let Some(first) = all.next() {
            assert!(all.all(|other| other == first), "{dtype}");
        }
    }
}

#[test]
fn inputs_and_the_result_have_the_type_of_the_caller() {
    for (name, configure) in backends() {
        for dtype in [DType::F16, DType::BF16] {
            let shape = KvShape::new(1, 1, 16);
            let cache = configure(KvCache::builder(shape).blocks(4)).build().unwrap();
            let (mut a, mut b) = (cache.table(), cache.table());
            let numbers = Random::new(2).numbers(20 * 16);
            let run = |table, dtype| {
                let mut step = cache.step();
                step.push(table, &[1; 20]).unwrap();
                let x = tensor(&rounded(&numbers, dtype), 1, 16, dtype);
                let y = step.attend(0, &x, &x, &x, &Attention::new(1.0)).unwrap();
                assert_eq!(y.dtype(), dtype, "{name}");
                y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let half = run(&mut a, dtype);
            let mut step = cache.step();
            step.push(&mut b, &[1; 20]).unwrap();
            let x = tensor(&rounded(&numbers, dtype), 1, 16, DType::F32);
            let full = step.attend(0, &x, &x, &x, &Attention::new(1.0)).unwrap();
            let full: Vec<f32> = full.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(half, rounded(&full, dtype), "{name}: only the result is rounded");
        }
    }
}

#[test]
fn strided_views_of_one_projection_are_accepted() {
    for (name, configure) in backends() {
        let shape = KvShape::new(1, 2, 8);
        let run = |strided: bool| {
            let cache = configure(KvCache::builder(shape).blocks(4)).build().unwrap();
            let mut table = cache.table();
            let mut step = cache.step();
            step.push(&mut table, &[1; 5]).unwrap();
            let all = tensor(&Random::new(8).numbers(5 * 8 * 8), 8, 8, DType::F32);
            let heads = |at, n| {
                let view = all.narrow(1, at, n).unwrap();
                if strided { view } else { view.force_contiguous().unwrap() }
            };
            let y = step.attend(0, &heads(0, 4), &heads(4, 2), &heads(6, 2), &Attention::new(1.0)).unwrap();
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(run(true), run(false), "{name}");
    }
}

#[test]
fn what_is_stored_can_be_read_back() {
    for (name, configure) in backends() {
        let shape = KvShape::new(2, 2, 5);
        let cache = configure(KvCache::builder(shape).blocks(6).block_size(4)).build().unwrap();
        poison(&cache);
        let mut table = cache.table();
        let (k, v) = cache.read(0, &table, 0..table.len()).unwrap();
        assert_eq!((k.dims(), v.dims()), (&[0, 2, 5][..], &[0, 2, 5][..]), "{name}");
        let mut random = Random::new(4);
        let (k, v) = (random.numbers(90), random.numbers(90));
        let mut step = cache.step();
        step.push(&mut table, &[1; 9]).unwrap();
        let (k, v) = (tensor(&k, 2, 5, DType::F32), tensor(&v, 2, 5, DType::F32));
        step.attend(1, &k, &k, &v, &Attention::new(1.0)).unwrap();
        step.leave_unwritten([0]).unwrap();
        step.commit().unwrap();
        let fork = table.fork_at(7).unwrap();
        for (table, len) in [(&table, 9), (&fork, 7)] {
            let (stored_k, stored_v) = cache.read(1, table, 0..table.len()).unwrap();
            for (stored, given) in [(stored_k, &k), (stored_v, &v)] {
                let given = given.narrow(0, 0, len).unwrap();
                assert_eq!(stored.to_vec3::<f32>().unwrap(), given.to_vec3::<f32>().unwrap(), "{name}");
            }
        }
        assert!(cache.read(2, &table, 0..table.len()).is_err());
        assert!(matches!(cache.device(), Device::Cpu));
    }
}
