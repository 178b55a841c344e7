//! Requests that come and go while others run, as in a server.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::HashMap;

use inference::engine::{
    Answer, Engine, Event, FinishReason, Limits, Logprobs, Request, RequestOptions, STEP_TOKENS, Settings, generate,
};
use inference::model::Model;
use inference::sampling::Sampling;
use paged_attention::{KvCache, Salt};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const LIMITS: Limits = Limits { max_batch: 6, step_tokens: STEP_TOKENS, step_time: None };

fn cache(model: &Model, blocks: usize) -> KvCache {
    KvCache::builder_of(model.groups()).blocks(blocks).block_size(4).build().unwrap()
}

fn is_end(token: u32) -> bool {
    token == 95
}

/// The answers to a request alone.
fn alone(model: &Model, request: &Request, options: &RequestOptions) -> Vec<Vec<u32>> {
    let RequestOptions { samples, seed, sampling, .. } = options.clone();
    let settings = Settings { max_batch: samples, step_tokens: STEP_TOKENS, samples, seed, sampling };
    let cache = cache(model, 200);
    let outcome = generate(model, &cache, std::slice::from_ref(request), &settings, is_end, |_| {}).unwrap();
    outcome.answers.into_iter().map(|answer| answer.tokens).collect()
}

/// What is known of a sequence, and what its answer must be.
struct Expected {
    tokens: Vec<u32>,
    so_far: Vec<u32>,
    started: bool,
}

#[test]
fn requests_come_and_go_and_each_complete_answer_is_that_of_the_request_alone() {
    let (_folder, model) = common::tiny();
    for (seed, blocks) in [(1, 100), (2, 14), (3, 11)] {
        let mut random = StdRng::seed_from_u64(seed);
        let cache = cache(&model, blocks);
        let mut engine = Engine::new(&cache, LIMITS);
        let mut expected: HashMap<usize, Expected> = HashMap::new();
        let (mut complete, mut cancelled, mut preempted) = (0, 0, 0);
        for turn in 0..400 {
            if turn < 300 && random.random_bool(0.5) {
                let prompt = (0..random.random_range(1..20)).map(|_| random.random_range(0..3)).collect();
                let request = Request { prompt, max_tokens: random.random_range(1..24) };
                let options = RequestOptions {
                    samples: random.random_range(1..4),
                    seed: random.random(),
                    sampling: Sampling::new([0.0, 0.9][random.random_range(0..2)], 1.0).unwrap(),
                    salt: if random.random_bool(0.5) { Salt::new(b"a") } else { Salt::none() },
                    logprobs: None,
                };
                let answers = alone(&model, &request, &options);
                for (sequence, tokens) in engine.submit(request, options).into_iter().zip(answers) {
                    let before = expected.insert(sequence, Expected { tokens, so_far: Vec::new(), started: false });
                    assert!(before.is_none(), "two sequences have the same number");
                }
            }
            if random.random_bool(0.1) {
                let all: Vec<usize> = expected.keys().copied().collect();
                let gone: Vec<usize> = all.into_iter().filter(|_| random.random_bool(0.3)).collect();
                engine.cancel(&gone).unwrap();
                gone.iter().for_each(|sequence| drop(expected.remove(sequence)));
                cancelled += gone.len();
            }
            for event in engine.step(&model, &is_end).unwrap() {
                match event {
                    Event::Started { sequence } => {
                        let first = !std::mem::replace(&mut expected.get_mut(&sequence).unwrap().started, true);
                        assert!(first, "it starts once");
                    }
                    Event::Token { sequence, token, logprobs } => {
                        assert!(logprobs.is_none());
                        let expected = expected.get_mut(&sequence).unwrap();
                        assert!(expected.started);
                        expected.so_far.push(token);
                    }
                    Event::Finished { sequence, answer, reason } => {
                        let Expected { tokens, so_far, .. } = expected.remove(&sequence).unwrap();
                        assert_eq!((&answer.tokens, &so_far), (&tokens, &tokens), "seed {seed}, turn {turn}");
                        let ends = tokens.last().is_some_and(|&token| is_end(token));
                        assert_eq!(reason, if ends { FinishReason::Stop } else { FinishReason::Length });
                        complete += 1;
                        preempted += answer.preemptions;
                    }
                }
            }
            assert_eq!(engine.running() + engine.waiting(), expected.len());
        }
        while !engine.is_idle() {
            engine.step(&model, &is_end).unwrap();
        }
        assert_eq!(cache.pool().in_use(), 0);
        assert!(complete > 50 && cancelled > 20, "{complete} complete, {cancelled} cancelled");
        assert_eq!(preempted > 0, blocks < 50, "{preempted} preemptions in {blocks} blocks");
    }
}

/// Runs until nothing is left, and returns the answers in the order in which they were completed.
fn run(engine: &mut Engine<'_>, model: &Model) -> Vec<Answer> {
    let mut answers = Vec::new();
    while !engine.is_idle() {
        let events = engine.step(model, &is_end).unwrap();
        answers.extend(events.into_iter().filter_map(|event| match event {
            Event::Finished { answer, .. } => Some(answer),
            _ => None,
        }));
    }
    answers
}

#[test]
fn only_requests_with_the_same_salt_share_a_prefix() {
    let (_folder, model) = common::tiny();
    let cache = cache(&model, 100);
    let mut engine = Engine::new(&cache, LIMITS);
    let mut cached = |salt: Option<&str>| {
        let options = RequestOptions {
            salt: salt.map_or_else(Salt::none, |salt| Salt::new(salt.as_bytes())),
            ..RequestOptions::default()
        };
        engine.submit(Request { prompt: (0..41).collect(), max_tokens: 1 }, options);
        run(&mut engine, &model)[0].cached_tokens
    };
    assert_eq!([None, Some("a"), Some("b")].map(&mut cached), [0, 0, 0]);
    assert_eq!([None, Some("a"), Some("b")].map(&mut cached), [40, 40, 40]);
    // Two at once: the second is computed with the first, and does not wait to match its blocks.
    let options = |salt: &str| RequestOptions { salt: Salt::new(salt.as_bytes()), ..RequestOptions::default() };
    for salt in ["c", "d"] {
        engine.submit(Request { prompt: (0..41).collect(), max_tokens: 1 }, options(salt));
    }
    assert!(run(&mut engine, &model).iter().all(|answer| answer.cached_tokens == 0));
}

#[test]
fn the_log_probability_of_the_most_likely_token_is_the_highest() {
    let (_folder, model) = common::tiny();
    let cache = cache(&model, 100);
    let mut engine = Engine::new(&cache, LIMITS);
    let options = RequestOptions { logprobs: Some(3), ..RequestOptions::default() };
    engine.submit(Request { prompt: vec![1, 2, 3], max_tokens: 5 }, options);
    let mut seen = 0;
    while !engine.is_idle() {
        for event in engine.step(&model, &is_end).unwrap() {
            if let Event::Token { token, logprobs, .. } = event {
                let Logprobs { drawn, top } = logprobs.unwrap();
                assert_eq!((top[0].token, top[0].logprob, top.len()), (token, drawn, 3));
                assert!(drawn < 0.0 && top[1].logprob <= drawn);
                seen += 1;
            }
        }
    }
    assert!(seen > 0);
}

#[test]
fn steps_with_a_bound_compute_long_prompts_in_small_chunks() {
    let (_folder, model) = common::tiny();
    let request = Request { prompt: (0..200).map(|i| i % 90).collect(), max_tokens: 3 };
    let steps = |step_time| {
        let cache = cache(&model, 100);
        let mut engine = Engine::new(&cache, Limits { step_time, ..LIMITS });
        engine.submit(request.clone(), RequestOptions::default());
        let answers = run(&mut engine, &model);
        (engine.statistics().steps, answers[0].tokens.clone())
    };
    let (free, expected) = steps(None);
    // So short that each step has as few tokens as it may.
    let (bound, tokens) = steps(Some(std::time::Duration::from_nanos(1)));
    assert_eq!(tokens, expected);
    assert!(free <= 3 && bound > 15, "{free} and {bound} steps");
}
