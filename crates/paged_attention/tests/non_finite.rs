//! Numbers that are not finite, or too large for sums in f32, called poisons. The result of a row that does not see a
//! poison is the same, to the last bit, as without it. The result of a row that sees one is that of dense attention in
//! f64. For every backend and kernel, and every storage type.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::ops::Range;

use candle_core::{DType, Tensor};
use common::{Configure, Random, agrees, backends, dense, poison, stored_as, tensor};
use paged_attention::{
    Attention, BlockTable, KvCache, KvDtype, KvShape, Segment, TableOptions, Window, attend_segments,
};

const POISONS: [f32; 5] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38, -1e30];
const SCALE: f32 = 0.3;

/// Queries, keys and values of one sequence, `(tokens, heads, head_dim)`.
#[derive(Clone)]
struct Numbers {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// What is poisoned.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Keys,
    Values,
    Both,
}

#[derive(Debug, Clone)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    dtype: KvDtype,
    block_size: usize,
    causal: bool,
    /// The window of the table.
    window: Option<Window>,
    /// The window of the layer.
    layer_window: Option<Window>,
    /// Whether the layer has a soft cap and ALiBi slopes.
    options: bool,
    /// The number of new tokens of each step.
    steps: Vec<usize>,
}

impl Case {
    fn new(dtype: KvDtype) -> Self {
        Self {
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            dtype,
            block_size: 16,
            causal: true,
            window: None,
            layer_window: None,
            options: false,
            steps: vec![90, 1],
        }
    }

    fn tokens(&self) -> usize {
        self.steps.iter().sum()
    }

    fn numbers(&self, seed: u64) -> Numbers {
        let mut random = Random::new(seed);
        let own = self.tokens() * self.kv_heads * self.head_dim;
        let q = random.numbers(self.tokens() * self.heads * self.head_dim);
        Numbers { q, k: random.numbers(own), v: random.numbers(own) }
    }

    /// The same numbers, with `x` in some dimensions of the tokens at `positions`, in the first and the last key head.
    fn poisoned(&self, numbers: &Numbers, positions: &[usize], place: Place, x: f32) -> Numbers {
        let mut numbers = numbers.clone();
        for (i, position) in positions.iter().enumerate() {
            // The poisons differ, so that no two huge scores are too close to be told apart in f32.
            let x = x * (1.0 - i as f32 / 8.0);
            for (head, dim) in [(self.kv_heads - 1, 1), (0, self.head_dim - 1), (0, 2)] {
                let at = (position * self.kv_heads + head) * self.head_dim + dim;
                if place != Place::Values {
                    numbers.k[at] = x;
                }
                if place != Place::Keys {
                    numbers.v[at] = x;
                }
            }
        }
        numbers
    }

    fn attention(&self) -> Attention {
        let mut attention = Attention::new(SCALE).causal(self.causal);
        if let Some(window) = self.layer_window {
            attention = attention.window(window);
        }
        if self.options {
            attention = attention.soft_cap(3.0).alibi(&Attention::alibi_slopes(self.heads));
        }
        attention
    }

    fn sees(&self, position: usize, at: usize, len: usize) -> bool {
        let windows = [self.window, self.layer_window].into_iter().flatten();
        let sees = |window: Window| at < window.sink_tokens() || at + window.tokens() > position;
        at < len && (!self.causal || at <= position) && windows.into_iter().all(sees)
    }

    fn cache(&self, configure: &Configure) -> KvCache {
        let shape = KvShape::new(1, self.kv_heads, self.head_dim);
        let blocks = self.tokens().div_ceil(self.block_size) + 8;
        let cache = configure(KvCache::builder(shape).blocks(blocks).block_size(self.block_size).dtype(self.dtype));
        let cache = cache.build().unwrap();
        poison(&cache);
        cache
    }

    /// The results of all rows of one sequence, step after step.
    fn run(&self, configure: &Configure, numbers: &Numbers) -> Vec<f32> {
        let cache = self.cache(configure);
        let options = TableOptions::default();
        let mut table = cache.table_with(&self.window.map_or(options.clone(), |window| options.window(window)));
        let mut out = Vec::new();
        let mut at = 0;
        for &n in &self.steps {
            let mut step = cache.step();
            step.push(&mut table, &(at as u32..(at + n) as u32).collect::<Vec<_>>()).unwrap();
            let rows = |numbers: &[f32], heads: usize| {
                let width = heads * self.head_dim;
                tensor(&numbers[at * width..(at + n) * width], heads, self.head_dim, DType::F32)
            };
            let (q, k, v) =
                (rows(&numbers.q, self.heads), rows(&numbers.k, self.kv_heads), rows(&numbers.v, self.kv_heads));
            out.extend(floats(&step.attend(0, &q, &k, &v, &self.attention()).unwrap()));
            step.commit().unwrap();
            at += n;
        }
        out
    }

    /// Dense attention of row `position` in a step that ends with token `len - 1`.
    fn expected(&self, stored: &Numbers, position: usize, len: usize) -> Vec<f64> {
        let seen: Vec<usize> = (0..len).filter(|&at| self.sees(position, at, len)).collect();
        let q = &stored.q[position * self.heads * self.head_dim..][..self.heads * self.head_dim];
        let slopes = Attention::alibi_slopes(self.heads);
        let score = |head: usize, at: usize, product: f64| {
            if !self.options {
                return product;
            }
            3.0 * (product / 3.0).tanh() + f64::from(slopes[head]) * (at as f64 - position as f64)
        };
        dense(q, &stored.k, &stored.v, &seen, self.kv_heads, self.head_dim, SCALE.into(), score)
    }

    fn stored(&self, numbers: &Numbers) -> Numbers {
        let stored = |x: &[f32]| stored_as(x, self.head_dim, self.dtype);
        Numbers { q: numbers.q.clone(), k: stored(&numbers.k), v: stored(&numbers.v) }
    }

    /// Compares the result of each row with dense attention if the row sees one of `positions`, otherwise with its
    /// result without the poison.
    fn check(&self, name: &str, configure: &Configure, positions: &[usize], place: Place, x: f32) {
        let numbers = self.numbers(5);
        let ordinary = self.run(configure, &numbers);
        let poisoned = self.poisoned(&numbers, positions, place, x);
        let got = self.run(configure, &poisoned);
        let stored = self.stored(&poisoned);
        let width = self.heads * self.head_dim;
        let bound = if self.dtype == KvDtype::Int8 { 1e-3 } else { 1e-5 };
        let mut len = 0;
        for n in &self.steps {
            len += n;
            for position in len - n..len {
                let row = |of: &[f32]| of[position * width..][..width].to_vec();
                let at = format!("{name} {self:?}, {x} in {place:?} of {positions:?}, row {position}");
                if positions.iter().any(|&at| self.sees(position, at, len)) {
                    // Most rows are skipped: dense attention of every row would take most of the time.
                    if position % 8 != 0 && positions.iter().all(|&at| position < at || position > at + 1) {
                        continue;
                    }
                    let expected = self.expected(&stored, position, len);
                    // Each head is compared alone, because only some heads are poisoned.
                    for (head, expected) in expected.chunks(self.head_dim).enumerate() {
                        let got = &row(&got)[head * self.head_dim..][..self.head_dim];
                        assert!(agrees(got, expected, bound), "{at}, head {head}: {got:?} instead of {expected:?}");
                    }
                } else {
                    assert_eq!(bits(&row(&got)), bits(&row(&ordinary)), "{at}: {:?}", row(&got));
                }
            }
        }
    }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

fn dtypes(name: &str) -> impl Iterator<Item = KvDtype> {
    let fused = name != "gather";
    KvDtype::ALL.into_iter().filter(move |dtype| fused || *dtype != KvDtype::Int8)
}

/// The smallest case: the value of token 1 is a poison, and row 0 sees only itself.
#[test]
fn the_first_row_of_a_prefill_does_not_see_the_second_token() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            for x in POISONS {
                let shape = KvShape::new(1, 1, 4);
                let cache = configure(KvCache::builder(shape).blocks(4).dtype(dtype)).build().unwrap();
                let mut table = cache.table();
                let mut step = cache.step();
                step.push(&mut table, &[1, 2]).unwrap();
                let one = tensor(&[0.5; 8], 1, 4, DType::F32);
                let v = tensor(&[0.5, 0.5, 0.5, 0.5, x, x, x, x], 1, 4, DType::F32);
                let y = floats(&step.attend(0, &one, &one, &v, &Attention::new(1.0)).unwrap());
                assert_eq!(y[..4], [0.5; 4], "{name} {dtype} {x}");
            }
        }
    }
}

#[test]
fn future_tokens_are_not_seen_in_a_prefill() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            for (x, place) in
                POISONS.into_iter().flat_map(|x| [Place::Keys, Place::Values, Place::Both].map(|p| (x, p)))
            {
                Case::new(dtype).check(name, &configure, &[3, 70], place, x);
            }
        }
    }
}

#[test]
fn tokens_outside_a_window_are_not_seen() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            for (tokens, sink_tokens) in [(2, 0), (20, 0), (20, 3)] {
                let window = Some(Window::new(tokens).with_sink_tokens(sink_tokens));
                for x in [f32::NAN, f32::INFINITY, 3e38] {
                    let case = Case { steps: vec![70, 1, 5, 1], ..Case::new(dtype) };
                    Case { window, ..case.clone() }.check(name, &configure, &[1, 44], Place::Both, x);
                    Case { layer_window: window, ..case.clone() }.check(name, &configure, &[1, 44], Place::Both, x);
                    let options = Case { layer_window: window, options: true, causal: false, ..case };
                    options.check(name, &configure, &[4, 44], Place::Values, x);
                }
            }
        }
    }
}

#[test]
fn every_block_size_and_geometry() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            for block_size in [1, 7, 16, 32] {
                for (heads, kv_heads, head_dim) in [(1, 1, 8), (3, 1, 33), (6, 2, 80), (5, 5, 16)] {
                    let layer_window = Some(Window::new(9).with_sink_tokens(2));
                    let case = Case { heads, kv_heads, head_dim, block_size, layer_window, ..Case::new(dtype) };
                    let case = Case { steps: vec![40, 30, 1, 1], ..case };
                    case.check(name, &configure, &[3, 35, 69], Place::Both, f32::INFINITY);
                    case.check(name, &configure, &[3, 35, 69], Place::Values, f32::NAN);
                }
            }
        }
    }
}

/// Several chunks of tokens, of which a row sees some, with one thread and with three.
#[test]
fn long_sequences_with_any_number_of_threads() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            let case = Case {
                heads: 1,
                kv_heads: 1,
                head_dim: 16,
                layer_window: Some(Window::new(530).with_sink_tokens(2)),
                steps: vec![1100, 1, 1],
                ..Case::new(dtype)
            };
            let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool(1).install(|| case.check(name, &configure, &[5, 700], Place::Both, f32::NAN));
            pool(3).install(|| case.check(name, &configure, &[700, 1050], Place::Values, f32::INFINITY));
        }
    }
}

/// All tokens that a row sees in a chunk have a weight of zero or NaN. The sums of the chunk are merged with those of
/// the next chunk.
#[test]
fn a_chunk_of_which_a_single_token_is_seen() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            // Token 1,024 begins the third chunk. It sees the first token of the first chunk and the last of the
            // second.
            let layer_window = Some(Window::new(2).with_sink_tokens(1));
            let case = Case { heads: 2, head_dim: 16, layer_window, steps: vec![1024, 1], ..Case::new(dtype) };
            for (place, x) in [(Place::Keys, f32::NAN), (Place::Both, f32::NEG_INFINITY)] {
                case.check(name, &configure, &[0], place, x);
                case.check(name, &configure, &[1023], place, x);
            }
        }
    }
}

/// The result of a row does not depend on the rows that it is computed with, also when it sees numbers that are not
/// finite.
#[test]
fn rows_alone_and_together_are_the_same() {
    for (name, configure) in backends().into_iter().filter(|(name, _)| *name != "gather") {
        for dtype in KvDtype::ALL {
            for x in POISONS {
                let together = Case { steps: vec![70, 1, 1], ..Case::new(dtype) };
                let alone = Case { steps: vec![1; 72], ..together.clone() };
                let numbers = together.poisoned(&together.numbers(8), &[2, 50], Place::Both, x);
                let (a, b) = (together.run(&configure, &numbers), alone.run(&configure, &numbers));
                let same = a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
                assert!(same, "{name} {dtype} {x}");
            }
        }
    }
}

/// A query that is not finite changes the result of its own row and head only.
#[test]
fn queries_that_are_not_finite() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            for x in POISONS {
                let case = Case { steps: vec![70], ..Case::new(dtype) };
                let numbers = case.numbers(9);
                let ordinary = case.run(&configure, &numbers);
                let mut poisoned = numbers.clone();
                let (row, head) = (20, 2);
                poisoned.q[(row * 4 + head) * 32 + 5] = x;
                let got = case.run(&configure, &poisoned);
                let expected = case.expected(&case.stored(&poisoned), row, 70);
                for (i, (got, ordinary)) in got.chunks(32).zip(ordinary.chunks(32)).enumerate() {
                    if i == row * 4 + head {
                        let expected = &expected[head * 32..][..32];
                        let bound = if dtype == KvDtype::Int8 { 1e-3 } else { 1e-5 };
                        assert!(agrees(got, expected, bound), "{name} {dtype} {x}: {got:?} instead of {expected:?}");
                    } else {
                        assert_eq!(bits(got), bits(ordinary), "{name} {dtype} {x}, row {}, head {}", i / 4, i % 4);
                    }
                }
            }
        }
    }
}

/// The sign of an unseen value does not change the sign of a zero result, even if all values that are seen are zero or
/// the smallest possible number.
#[test]
fn unseen_values_do_not_change_the_sign_of_a_zero() {
    for (name, configure) in backends() {
        let case = Case { steps: vec![40], heads: 2, kv_heads: 1, head_dim: 16, ..Case::new(KvDtype::F32) };
        let mut numbers = case.numbers(3);
        // Token 0 has by far the largest weight, and its value is zero. The weighted values of the others are below the
        // smallest number.
        numbers.q.fill(1.0);
        numbers.k.fill(0.0);
        numbers.k[..16].fill(1.0);
        numbers.v.fill(-f32::from_bits(1));
        numbers.v[..16].fill(0.0);
        let [up, down] = [1.0, -1.0].map(|x| {
            let mut numbers = numbers.clone();
            numbers.v[20 * 16..].fill(x);
            case.run(&configure, &numbers)[..20 * 32].to_vec()
        });
        assert_eq!(bits(&up), bits(&down), "{name}");
    }
}

/// Another sequence matches a prefix whose first tokens are outside its window.
#[test]
fn unseen_tokens_of_a_shared_prefix_change_nothing() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            let case = Case { layer_window: Some(Window::new(8)), steps: vec![48, 9], ..Case::new(dtype) };
            let numbers = case.numbers(4);
            let run = |numbers: &Numbers| {
                let cache = case.cache(&configure);
                let tokens: Vec<u32> = (0..57).collect();
                let rows = |of: &[f32], heads: usize, at: Range<usize>| {
                    tensor(&of[at.start * heads * 32..at.end * heads * 32], heads, 32, DType::F32)
                };
                let attend = |table: &mut BlockTable, at: Range<usize>| {
                    let mut step = cache.step();
                    step.push(table, &tokens[at.clone()]).unwrap();
                    let (q, k) = (rows(&numbers.q, 4, at.clone()), rows(&numbers.k, 2, at.clone()));
                    let y = step.attend(0, &q, &k, &rows(&numbers.v, 2, at), &case.attention()).unwrap();
                    step.commit().unwrap();
                    floats(&y)
                };
                let mut first = cache.table();
                attend(&mut first, 0..48);
                let mut other = cache.table();
                assert_eq!(other.match_prefix(&tokens), 48, "{name}");
                let mut out = attend(&mut other, 48..57);
                // A fork that shares a block of which it uses the first tokens only.
                let mut third = first.fork_at(20).unwrap();
                out.extend(attend(&mut third, 20..21));
                out
            };
            for x in POISONS {
                let poisoned = case.poisoned(&numbers, &[1, 9, 25, 31], Place::Both, x);
                assert_eq!(bits(&run(&poisoned)), bits(&run(&numbers)), "{name} {dtype} {x}");
            }
        }
    }
}

/// Sequences in two caches: poisons that are not seen, poisons that are seen, and a segment whose weight is zero as a
/// whole.
#[test]
fn segments_equal_one_cache() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            let case = Case { steps: vec![60], ..Case::new(dtype) };
            let numbers = case.numbers(6);
            let rows = 20;
            for (cut, layer_window) in
                [(33, None), (59, None), (33, Some(Window::new(25))), (40, Some(Window::new(10)))]
            {
                let case = Case { layer_window, ..case.clone() };
                let run = |numbers: &Numbers| {
                    let rows = rows.min(60 - cut);
                    let segment = |range: Range<usize>| {
                        let cache = case.cache(&configure);
                        let of = |of: &[f32]| tensor(&of[range.start * 64..range.end * 64], 2, 32, DType::F32);
                        let mut tables = [cache.table()];
                        tables[0].reserve(range.len()).unwrap();
                        cache.write(0, &mut tables, 0, &of(&numbers.k), &of(&numbers.v)).unwrap();
                        (cache, tables, range)
                    };
                    let caches = [segment(0..cut), segment(cut..60)];
                    let segments: Vec<_> = caches
                        .iter()
                        .map(|(cache, tables, range)| Segment { cache, tables, start: range.start, end: range.end })
                        .collect();
                    let q = tensor(&numbers.q[(60 - rows) * 128..], 4, 32, DType::F32);
                    floats(&attend_segments(&segments, 0, 60 - rows, &q, &case.attention()).unwrap())
                };
                let ordinary = run(&numbers);
                for (positions, x) in [[1, 35], [8, 59], [59, 59]].into_iter().flat_map(|p| POISONS.map(|x| (p, x))) {
                    for place in [Place::Keys, Place::Values] {
                        let poisoned = case.poisoned(&numbers, &positions, place, x);
                        let (got, stored) = (run(&poisoned), case.stored(&poisoned));
                        for (i, (got, ordinary)) in got.chunks(128).zip(ordinary.chunks(128)).enumerate() {
                            let position = 60 - queries_after(cut, rows) + i;
                            let at = format!(
                                "{name} {case:?} cut at {cut}, {x} in {place:?} of {positions:?}, row {position}"
                            );
                            if positions.iter().any(|&at| case.sees(position, at, 60)) {
                                let expected = case.expected(&stored, position, 60);
                                let bound = if dtype == KvDtype::Int8 { 1e-3 } else { 1e-5 };
                                for (got, expected) in got.chunks(32).zip(expected.chunks(32)) {
                                    assert!(agrees(got, expected, bound), "{at}: {got:?} instead of {expected:?}");
                                }
                            } else {
                                assert_eq!(bits(got), bits(ordinary), "{at}");
                            }
                        }
                    }
                }
            }
        }
    }
}

fn queries_after(cut: usize, rows: usize) -> usize {
    rows.min(60 - cut)
}

/// A row that sees no token of a segment gets zeros, with every backend.
#[test]
fn rows_that_see_nothing_are_zeros() {
    for (name, configure) in backends() {
        let case = Case { block_size: 4, steps: vec![40], ..Case::new(KvDtype::F32) };
        let cache = case.cache(&configure);
        let mut table = cache.table_with(&TableOptions::default().private());
        table.append(40).unwrap();
        let tables = [table];
        let q = tensor(&Random::new(6).numbers(4 * 32), 4, 32, DType::F32);
        let attention = Attention::new(SCALE).window(Window::new(3));
        let segments = [Segment { cache: &cache, tables: &tables, start: 0, end: 20 }];
        let got = floats(&attend_segments(&segments, 0, 39, &q, &attention).unwrap());
        assert!(got.iter().all(|x| *x == 0.0), "{name}: {got:?}");
    }
}

/// Sums whose result is within the range of f32, but whose intermediate sums are not.
#[test]
fn sums_out_of_the_range_of_f32_are_computed_in_f64() {
    for (name, configure) in backends() {
        for dtype in dtypes(name).filter(|dtype| *dtype != KvDtype::F16) {
            let case = Case { steps: vec![8], heads: 1, kv_heads: 1, head_dim: 16, ..Case::new(dtype) };
            let mut numbers = case.numbers(7);
            for x in [1e38, 3.38e38, f32::MAX] {
                numbers.v.fill(x);
                // First all scores are within the range of f32, then one is not.
                for q in [0.5, 1e20] {
                    (numbers.q[7 * 16], numbers.k[2 * 16]) = (q, q);
                    let last = case.run(&configure, &numbers)[7 * 16..].to_vec();
                    let expected = case.expected(&case.stored(&numbers), 7, 8);
                    assert!(agrees(&last, &expected, 1e-3), "{name} {dtype} {x}: {last:?} instead of {expected:?}");
                }
            }
        }
    }
}
