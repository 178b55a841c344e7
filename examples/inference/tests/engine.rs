//! For every pool and batch, each prompt gets the same answer as alone, where every token is computed from scratch.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use inference::engine::{Answer, Outcome, Progress, Request, STEP_TOKENS, Settings, generate};
use inference::model::Model;
use inference::sampling::{Random, Sampling};
use paged_attention::{KvCache, KvDtype};

fn requests() -> Vec<Request> {
    let request = |seed: u32, n: u32, max_tokens| Request {
        prompt: (0..n).map(|i| (i * 7 + seed * 13) % common::VOCABULARY as u32).collect(),
        max_tokens,
    };
    vec![request(1, 5, 20), request(2, 40, 12), request(3, 1, 30), request(4, 17, 1), request(5, 33, 25)]
}

fn settings(samples: usize, temperature: f32) -> Settings {
    let sampling = Sampling::new(temperature, 0.9).unwrap();
    Settings { max_batch: 8, step_tokens: STEP_TOKENS, samples, seed: 11, sampling }
}

fn cache(model: &Model, blocks: usize, block_size: usize) -> KvCache {
    KvCache::builder_of(model.groups()).blocks(blocks).block_size(block_size).dtype(KvDtype::F32).build().unwrap()
}

fn run(model: &Model, cache: &KvCache, requests: &[Request], settings: &Settings) -> Outcome {
    let outcome = generate(model, cache, requests, settings, |id| id == 95, |_| ()).unwrap();
    assert_eq!(cache.pool().in_use(), 0, "all blocks are freed");
    outcome
}

/// Computes the whole sequence again for each token: nothing is cached, batched or forked.
fn from_scratch(model: &Model, request: &Request, settings: &Settings, prompt: usize, sample: usize) -> Vec<u32> {
    let mut random = Random::new(settings.seed + sample as u64, prompt);
    let mut tokens = request.prompt.clone();
    while tokens.len() < request.prompt.len() + request.max_tokens {
        let cache = cache(model, 64, 4);
        let mut table = cache.table();
        let mut step = cache.step();
        step.push(&mut table, &tokens).unwrap();
        let logits = model.forward(&step).unwrap().to_vec2::<f32>().unwrap();
        tokens.push(settings.sampling.draw(&logits[0], &mut random).unwrap());
        if tokens.last() == Some(&95) {
            break;
        }
    }
    tokens.split_off(request.prompt.len())
}

#[test]
fn answers_do_not_depend_on_the_pool_or_the_batch() {
    let (_folder, model) = common::tiny();
    let requests = requests();
    for temperature in [0.0, 0.8] {
        let settings = settings(1, temperature);
        let expected: Vec<_> =
            requests.iter().enumerate().map(|(i, r)| from_scratch(&model, r, &settings, i, 0)).collect();
        for (blocks, block_size, max_batch) in [(100, 4, 8), (100, 1, 8), (8, 32, 8), (16, 4, 8), (100, 4, 1)] {
            let settings = Settings { max_batch, ..settings };
            let outcome = run(&model, &cache(&model, blocks, block_size), &requests, &settings);
            let answers: Vec<_> = outcome.answers.iter().map(|answer| answer.tokens.clone()).collect();
            assert_eq!(answers, expected, "{blocks} blocks of {block_size}, batch {max_batch}");
            if blocks == 16 {
                assert!(outcome.answers.iter().map(|a| a.preemptions).sum::<usize>() > 0, "the pool was too large");
            }
        }
    }
}

#[test]
fn samples_share_their_prompt_and_equal_separate_runs() {
    let (_folder, model) = common::tiny();
    let requests = requests();
    let settings = settings(4, 0.8);
    for blocks in [100, 20] {
        let outcome = run(&model, &cache(&model, blocks, 4), &requests, &settings);
        for (i, Answer { request, tokens, cached_tokens, prompt_tokens, preemptions }) in
            outcome.answers.iter().enumerate()
        {
            let sample = i % 4;
            let expected = from_scratch(&model, &requests[*request], &settings, *request, sample);
            assert_eq!(*tokens, expected, "prompt {request}, sample {sample}, {blocks} blocks");
            if *preemptions == 0 {
                assert_eq!(*cached_tokens, if sample == 0 { 0 } else { *prompt_tokens });
            }
        }
    }
}

#[test]
fn the_prompt_of_all_samples_is_stored_once() {
    let (_folder, model) = common::tiny();
    let request = Request { prompt: (0..40).collect(), max_tokens: 2 };
    let outcome = run(&model, &cache(&model, 100, 4), &[request], &settings(8, 1.0));
    // 10 blocks of prompt, and one for each sample's own tokens.
    assert_eq!(outcome.stats.peak_blocks, 10 + 8);
}

#[test]
fn a_common_prefix_is_computed_once() {
    let (_folder, model) = common::tiny();
    let settings = settings(1, 0.0);
    let common: Vec<u32> = (0..41).map(|i| (i * 5 + 3) % 90).collect();
    let requests: Vec<Request> =
        (0..8).map(|i| Request { prompt: [&common[..], &[i, 2 * i + 1, 7]].concat(), max_tokens: 6 }).collect();
    for block_size in [1, 4, 16] {
        let outcome = run(&model, &cache(&model, 1024 / block_size, block_size), &requests, &settings);
        let whole_blocks = 41 / block_size * block_size;
        for (i, answer) in outcome.answers.iter().enumerate() {
            assert_eq!(answer.tokens, from_scratch(&model, &requests[i], &settings, i, 0));
            assert!(i == 0 || answer.cached_tokens >= whole_blocks, "prompt {i}: {}", answer.cached_tokens);
        }
        assert!(
            outcome.stats.computed_prompt_tokens <= 44 + 7 * (44 - whole_blocks),
            "{}",
            outcome.stats.computed_prompt_tokens
        );
    }
}

#[test]
fn packed_logits_equal_those_of_each_sequence_alone() {
    let (_folder, model) = common::tiny();
    let requests = requests();
    let logits = |requests: &[Request]| {
        let cache = cache(&model, 100, 4);
        let mut tables: Vec<_> = requests.iter().map(|_| cache.table()).collect();
        let mut step = cache.step();
        for (table, request) in tables.iter_mut().zip(requests) {
            step.push(table, &request.prompt).unwrap();
        }
        model.forward(&step).unwrap().to_vec2::<f32>().unwrap()
    };
    let packed = logits(&requests);
    for (request, packed) in requests.iter().zip(&packed) {
        let alone = &logits(std::slice::from_ref(request))[0];
        let largest = alone.iter().fold(0f32, |m, x| m.max(x.abs()));
        let worst = alone.iter().zip(packed).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst / largest < 1e-4, "{}", worst / largest);
    }
}

#[test]
fn requests_that_can_never_be_answered_are_refused_at_once_with_the_numbers() {
    let (_folder, model) = common::tiny();
    let refused = |request: Request, settings: Settings| {
        let never = |_: Progress<'_>| panic!("nothing is computed");
        generate(&model, &cache(&model, 4, 4), &[request], &settings, |_| false, never).unwrap_err().to_string()
    };
    let request = |n: u32, max_tokens| Request { prompt: vec![1; n as usize], max_tokens };
    assert_eq!(
        refused(request(10, 8), settings(1, 0.0)),
        "prompt 1 has 10 tokens and may get 8 more: that takes 5 blocks of 4 tokens, the pool has 4"
    );
    assert_eq!(
        refused(request(250, 8), settings(1, 0.0)),
        "prompt 1 has 250 tokens and may get 8 more, the model's context is 256 tokens"
    );
    assert_eq!(refused(request(0, 8), settings(1, 0.0)), "prompt 1 has no tokens");
    assert_eq!(refused(request(1, 0), settings(1, 0.0)), "prompt 1 may get 0 tokens of answer, at least one is needed");
    assert_eq!(refused(request(1, 1), settings(9, 0.0)), "9 samples of a prompt do not fit into a batch of 8");
}

#[test]
fn two_equal_prompts_in_a_pool_with_room_for_one_finish() {
    let (_folder, model) = common::tiny();
    let prompt: Vec<u32> = (0..42).map(|i| (i * 7 + 13) % common::VOCABULARY as u32).collect();
    let requests = vec![Request { prompt, max_tokens: 4 }; 2];
    let settings = settings(1, 0.0);
    let cache = cache(&model, 7, 7);
    let mut steps = 0;
    let count = |progress: Progress| {
        steps += 1;
        assert!(steps <= 200, "step {steps}, {progress:?}");
    };
    let outcome = generate(&model, &cache, &requests, &settings, |id| id == 95, count).unwrap();
    let expected = from_scratch(&model, &requests[0], &settings, 0, 0);
    assert!(outcome.answers.iter().all(|answer| answer.tokens == expected), "{:?}", outcome.answers);
    assert_eq!(cache.pool().in_use(), 0);
}
