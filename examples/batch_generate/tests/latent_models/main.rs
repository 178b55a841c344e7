//! DeepSeek-V2's attention over a latent cache (27 layers of the Lite model take 31,104 bytes a token in bf16, where
//! keys and padded values would take 62,208): in batches whose sequences join, fork, share prefixes and are computed in
//! chunks, every logit and every greedy token is that of candle's own model, which keeps whole keys and values of each
//! head.

#![allow(clippy::unwrap_used, clippy::panic)]

mod decoder;

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use candle_transformers::models::deepseek2::DeepSeekV2;
use decoder::{CONTEXT, Decoder, SHAPE, VOCABULARY};
use paged_attention::{BlockTable, KvCache, KvDtype, KvShape, Logits, PushOptions};
use test_support::Random;

/// How far logits may be from the reference, in relation to the largest of them.
const TOLERANCE: f32 = 1e-4;

/// candle's model, fed token by token: one for each sequence, by its tokens so far.
struct Reference<'d> {
    decoder: &'d Decoder,
    models: HashMap<Vec<u32>, (DeepSeekV2, Vec<f32>)>,
}

impl Reference<'_> {
    /// The logits after these tokens.
    fn logits(&mut self, tokens: &[u32]) -> Vec<f32> {
        let known = (1..=tokens.len()).rev().find(|&len| self.models.contains_key(&tokens[..len])).unwrap_or(0);
        // A model is used up by its next token. The other branch of a fork is computed from the start.
        let (mut model, mut logits, known) = match self.models.remove(&tokens[..known]) {
            Some((model, logits)) => (model, logits, known),
            None => (self.decoder.candle(), Vec::new(), 0),
        };
        for (position, &token) in tokens.iter().enumerate().skip(known) {
            let id = Tensor::new(&[[token]], &Device::Cpu).unwrap();
            logits = model.forward(&id, position).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        }
        self.models.insert(tokens.to_vec(), (model, logits.clone()));
        logits
    }
}

struct Sequence {
    table: BlockTable,
    tokens: Vec<u32>,
    /// The most tokens that one step computes.
    chunk: usize,
}

fn greedy(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// One step over all sequences. Those whose tokens are all computed get their next token. Logits are checked.
fn step(decoder: &Decoder, cache: &KvCache, sequences: &mut [Sequence], reference: &mut Reference<'_>) {
    let mut step = cache.step();
    let mut complete = Vec::new();
    for (i, Sequence { table, tokens, chunk }) in sequences.iter_mut().enumerate() {
        let start = table.len();
        let end = tokens.len().min(start + *chunk);
        let options = PushOptions::default().logits(if end == tokens.len() { Logits::Last } else { Logits::None });
        step.push_with(table, &tokens[start..end], &options).unwrap();
        if end == tokens.len() {
            complete.push(i);
        }
    }
    let logits = decoder.forward(&step).unwrap().to_vec2::<f32>().unwrap();
    step.commit().unwrap();
    assert_eq!(logits.len(), complete.len());
    for (i, logits) in complete.into_iter().zip(logits) {
        let tokens = &mut sequences[i].tokens;
        let expected = reference.logits(tokens);
        let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        let worst = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst <= TOLERANCE * largest, "{worst} of {largest} after {} tokens", tokens.len());
        assert_eq!(greedy(&logits), greedy(&expected), "after {} tokens", tokens.len());
        tokens.push(greedy(&logits));
    }
}

#[test]
fn tokens_are_those_of_candles_deepseek() {
    for (low_rank_queries, block_size) in [(false, 1), (true, 4), (true, 16), (false, 16)] {
        let decoder = Decoder::random(low_rank_queries);
        let mut reference = Reference { decoder: &decoder, models: HashMap::new() };
        let cache = KvCache::builder(SHAPE).blocks(1024 / block_size).block_size(block_size).build().unwrap();
        let mut random = Random::new(5);
        let mut prompt = |n: usize| (0..n).map(|_| random.below(VOCABULARY) as u32).collect::<Vec<_>>();
        let start = |tokens: Vec<u32>, chunk| Sequence { table: cache.table(), tokens, chunk };
        let first = prompt(40);
        let mut sequences = vec![start(first.clone(), CONTEXT), start(prompt(1), 1), start(prompt(50), 7)];
        for i in 0..64 {
            step(&decoder, &cache, &mut sequences, &mut reference);
            if i == 8 {
                // A fork, which goes on with another token.
                let Sequence { table, tokens, chunk } = &sequences[0];
                let mut tokens = tokens[..table.len()].to_vec();
                tokens.push((tokens[0] + 1) % VOCABULARY as u32);
                sequences.push(Sequence { table: table.fork(), tokens, chunk: *chunk });
            }
            if i == 15 {
                // A prompt whose beginning is cached.
                let mut sequence = start([&first[..33], &prompt(9)].concat(), 16);
                let matched = sequence.table.match_prefix(&sequence.tokens);
                assert_eq!(matched, 33, "blocks match to the token");
                sequences.push(sequence);
            }
        }
        assert!(sequences[..2].iter().all(|sequence| sequence.tokens.len() >= 65));
    }
}

#[test]
fn a_token_of_the_lite_model_takes_half_of_padded_values() {
    let lite = KvShape::new(27, 1, 512 + 64).values_in_keys(512);
    let cache = |shape| KvCache::builder(shape).blocks(1).dtype(KvDtype::Bf16).build().unwrap();
    assert_eq!(cache(lite).bytes_per_block(), 16 * 31_104);
    assert_eq!(cache(KvShape::new(27, 1, 576)).bytes_per_block(), 16 * 62_208);
}
