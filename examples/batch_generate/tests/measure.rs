//! The measured steps compute the same tokens as the engine, in every call.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../inference/tests/common/mod.rs"]
mod common;

use batch_generate::measure::{Blocks, Filled, Measured, Rates, prompt};
use inference::engine::{Request, STEP_TOKENS, Settings, generate};
use inference::sampling::Sampling;
use paged_attention::{KvCache, KvDtype};

const BLOCKS: [Blocks; 3] = [Blocks::Own, Blocks::Shared, Blocks::SharedReadApart];

#[test]
fn copies_of_a_prompt_continue_as_in_the_engine() {
    let (_folder, model) = common::tiny();
    for (batch, context) in [(1, 1), (3, 16), (2, 45)] {
        let cache = KvCache::builder_of(model.groups()).blocks(16).build().unwrap();
        let request = Request { prompt: prompt(context, common::VOCABULARY), max_tokens: 9 };
        let settings =
            Settings { max_batch: 1, step_tokens: STEP_TOKENS, samples: 1, seed: 0, sampling: Sampling::greedy() };
        let outcome = generate(&model, &cache, &[request], &settings, |_| false, |_| ()).unwrap();
        let expected = &outcome.answers[0].tokens;

        let filled = Filled::new(&model, KvDtype::F32, batch, context, 8).unwrap();
        assert_eq!((filled.batch(), filled.context(), filled.prefill().tokens), (batch, context, context));
        for tokens in [8, 3, 8] {
            // The prefill gives the first token of the answer.
            for blocks in BLOCKS {
                let decoded = filled.decode(blocks, tokens).unwrap();
                assert_eq!(
                    decoded.tokens,
                    vec![expected[1..=tokens].to_vec(); batch],
                    "{batch} x {context} {blocks:?}"
                );
                assert!(!decoded.time.is_zero());
            }
        }
        assert!(filled.decode(Blocks::Own, 9).is_err(), "there is room for 8 tokens");
    }
}

#[test]
fn prompts_behind_a_system_prompt_continue_as_in_the_engine() {
    let (_folder, model) = common::tiny();
    let (batch, system, tail, tokens) = (3, 90, 7, 4);
    let all = prompt(system + batch * tail, common::VOCABULARY);
    let requests: Vec<_> = all[system..]
        .chunks(tail)
        .map(|tail| Request { prompt: [&all[..system], tail].concat(), max_tokens: tokens + 1 })
        .collect();
    let cache = KvCache::builder_of(model.groups()).blocks(32).build().unwrap();
    let settings =
        Settings { max_batch: batch, step_tokens: STEP_TOKENS, samples: 1, seed: 0, sampling: Sampling::greedy() };
    let outcome = generate(&model, &cache, &requests, &settings, |_| false, |_| ()).unwrap();

    // The prompts wait for the first to compute what they share.
    let decoded = batch * tokens * (system + tail);
    assert!(outcome.stats.read_tokens > decoded, "{}", outcome.stats.read_tokens);

    let filled = Filled::behind(&model, KvDtype::F32, batch, system, tail, tokens).unwrap();
    assert_eq!((filled.context(), filled.prefill().tokens), (system + tail, system));
    for blocks in BLOCKS {
        let decoded = filled.decode(blocks, tokens).unwrap();
        for (answer, tokens) in outcome.answers.iter().zip(&decoded.tokens) {
            assert_eq!(answer.tokens[1..], tokens[..], "{blocks:?}");
        }
    }
}

#[test]
fn every_batch_is_measured_at_every_context() {
    let (_folder, model) = common::tiny();
    let measured = Measured::take(&model, KvDtype::Bf16, &[1, 4], &[16, 3], |_| ()).unwrap();
    let cases: Vec<_> = measured.rates().iter().map(|rates| (rates.batch, rates.context)).collect();
    assert_eq!(cases, [(1, 16), (1, 3), (4, 16), (4, 3)]);
    let rates = |rates: &Rates| [rates.decode, rates.of_first, rates.shared, rates.prefill];
    assert!(measured.rates().iter().flat_map(rates).all(|rate| rate > 0.0));
    assert_eq!(measured.rates()[2].of_first, 1.0);
}
