//! Computes sequences that join at different steps, and compares all their logits.

use candle_core::quantized::GgmlDType;
use inference::engine::{Request, Settings, generate};
use inference::model::{Gguf, Model};
use inference::sampling::Sampling;
use inference::weights::Weights;
use paged_attention::{BlockTable, KvCache, Logits, PushOptions};
use test_support::Random;

use crate::candle::Candle;
use crate::files::{ModelFile, VOCABULARY};
use crate::naive::{Naive, Spec};

/// The bound of the difference of logits, as a part of the largest logit: rounding errors of f32, for each layer.
const BOUND: f32 = 2e-5;
/// Tokens that each sequence computes one by one after its prompt, whatever the model would say.
const FORCED: usize = 64;
/// The prompt of each sequence, and the step in which it joins. The longest come in chunks.
const SEQUENCES: [(usize, usize); 4] = [(3, 0), (40, 0), (17, 5), (1, 9)];
const CHUNK: usize = 13;

/// Loads the model of a file.
pub(crate) fn load(file: &ModelFile, matrices: GgmlDType, weights: Weights, longest: usize) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    file.write(&path, matrices);
    Model::load(&mut Gguf::open(&path).unwrap(), weights, longest).unwrap()
}

/// Checks the model of `file` against the naive model that `spec` describes, and against candle's.
pub(crate) fn check(spec: &Spec, file: &ModelFile, candle: impl Fn() -> Option<Candle>) {
    let model = load(file, GgmlDType::F32, Weights::F32, spec.context);
    let sequences: Vec<Vec<u32>> = SEQUENCES.iter().map(|&(prompt, _)| tokens(prompt + FORCED)).collect();
    let mut most = 0f32;
    let expected: Vec<Vec<Vec<f32>>> = sequences
        .iter()
        .map(|tokens| {
            let mut naive = Naive::new(spec, file);
            let logits: Vec<_> = tokens.iter().map(|&token| naive.next(token)).collect();
            if let Some(mut candle) = candle() {
                for (position, (&token, expected)) in tokens.iter().zip(&logits).enumerate() {
                    most = most.max(compared(&candle(token, position), expected, bound(spec), "candle"));
                }
            }
            logits
        })
        .collect();
    let mut worst = 0f32;
    for block_size in [1, 16] {
        worst = worst.max(teacher_forced(&model, block_size, &sequences, &expected, bound(spec)));
    }
    println!("{}: {worst:.1e} of the largest logit; candle and the naive model: {most:.1e}", spec.architecture);
    engine_answers(&model, spec, file);
    // In many random layers, rounding errors grow without bounds.
    if spec.windows.len() <= 8 {
        eight_bits(spec, file);
    }
}

fn bound(spec: &Spec) -> f32 {
    BOUND * spec.windows.len() as f32
}

/// Arbitrary tokens.
fn tokens(n: usize) -> Vec<u32> {
    let mut random = Random::new(n as u64);
    (0..n).map(|_| random.below(VOCABULARY) as u32).collect()
}

/// The difference, as a part of the largest logit. The most likely token is the same, unless the second is as near.
fn compared(got: &[f32], expected: &[f32], bound: f32, what: &str) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let difference = got.iter().zip(expected).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest;
    assert!(difference < bound, "{what}: logits differ by {difference:.1e} of the largest");
    let (best, gap) = best(expected);
    assert!(self::best(got).0 == best || gap < 2.0 * bound * largest, "{what}: another token");
    difference
}

/// The most likely token, and how far the next one is behind.
fn best(logits: &[f32]) -> (usize, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    (order[0], logits[order[0]] - logits[order[1]])
}

/// All rows of all sequences through one cache. Returns the largest difference.
fn teacher_forced(
    model: &Model,
    block_size: usize,
    sequences: &[Vec<u32>],
    expected: &[Vec<Vec<f32>>],
    bound: f32,
) -> f32 {
    let cache = KvCache::builder_of(model.groups()).block_size(block_size).blocks(640 / block_size).build().unwrap();
    let mut tables: Vec<BlockTable> = sequences.iter().map(|_| cache.table()).collect();
    let mut worst = 0f32;
    for step_index in 0.. {
        let mut step = cache.step();
        let mut pushed = Vec::new();
        for (i, table) in tables.iter_mut().enumerate() {
            let (prompt, joins) = SEQUENCES[i];
            let start = table.len();
            let n = if start < prompt { (prompt - start).min(CHUNK) } else { 1 };
            if step_index < joins || start == sequences[i].len() {
                continue;
            }
            let options = PushOptions::default().logits(Logits::All);
            step.push_with(table, &sequences[i][start..start + n], &options).unwrap();
            pushed.push((i, start..start + n));
        }
        if pushed.is_empty() {
            break;
        }
        let logits = model.forward(&step).unwrap().to_vec2::<f32>().unwrap();
        step.commit().unwrap();
        let rows = pushed.into_iter().flat_map(|(i, range)| range.map(move |position| (i, position)));
        for (got, (i, position)) in logits.iter().zip(rows) {
            let what = format!("blocks of {block_size}, sequence {i}, position {position}");
            worst = worst.max(compared(got, &expected[i][position], bound, &what));
        }
    }
    assert!(tables.iter().zip(sequences).all(|(table, tokens)| table.len() == tokens.len()));
    worst
}

/// The engine's answers, in a pool in which sequences wait and are preempted, are the naive model's most likely tokens.
fn engine_answers(model: &Model, spec: &Spec, file: &ModelFile) {
    const MAX_TOKENS: usize = 24;
    let requests: Vec<Request> = [30, 5, 12, 1].map(|n| Request { prompt: tokens(n), max_tokens: MAX_TOKENS }).into();
    let cache = KvCache::builder_of(model.groups()).block_size(4).blocks(24).build().unwrap();
    let sampling = Sampling::greedy();
    let settings = Settings { max_batch: 4, step_tokens: 16, samples: 1, seed: 0, sampling };
    let outcome = generate(model, &cache, &requests, &settings, |_| false, |_| ()).unwrap();
    for (request, answer) in requests.iter().zip(&outcome.answers) {
        let mut naive = Naive::new(spec, file);
        let mut logits = request.prompt.iter().map(|&token| naive.next(token)).last().unwrap();
        for (i, &token) in answer.tokens.iter().enumerate() {
            let largest = logits.iter().fold(0f32, |most, x| most.max(x.abs()));
            let (best, gap) = best(&logits);
            assert!(best == token as usize || gap < 2.0 * bound(spec) * largest, "token {i} of an answer");
            logits = naive.next(token);
        }
        assert_eq!(answer.tokens.len(), MAX_TOKENS);
    }
}

/// From a file with matrices of 8 bits: in f32, all logits are those of the rounded matrices; with activations of 8
/// bits, most rows are near them. (A rounded row can go to another expert.)
fn eight_bits(spec: &Spec, file: &ModelFile) {
    let tokens = tokens(20);
    let mut naive = Naive::new(spec, &file.rounded(GgmlDType::Q8_0));
    let exact: Vec<Vec<f32>> = tokens.iter().map(|&token| naive.next(token)).collect();
    for weights in [Weights::F32, Weights::Int8, Weights::Stored] {
        let model = load(file, GgmlDType::Q8_0, weights, spec.context);
        let cache = KvCache::builder_of(model.groups()).blocks(8).build().unwrap();
        let mut table = cache.table();
        let mut step = cache.step();
        step.push_with(&mut table, &tokens, &PushOptions::default().logits(Logits::All)).unwrap();
        let got = model.forward(&step).unwrap().to_vec2::<f32>().unwrap();
        if weights == Weights::F32 {
            for (got, exact) in got.iter().zip(&exact) {
                compared(got, exact, bound(spec), "8 bits");
            }
            continue;
        }
        let norm = |xs: &mut dyn Iterator<Item = f32>| xs.map(|x| x * x).sum::<f32>().sqrt();
        let difference = |(got, exact): (&Vec<f32>, &Vec<f32>)| {
            norm(&mut got.iter().zip(exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied())
        };
        let mut differences: Vec<f32> = got.iter().zip(&exact).map(difference).collect();
        differences.sort_by(f32::total_cmp);
        assert!(differences[10] < 0.1, "{weights:?}: {differences:?}");
    }
}
