//! The measured steps compute the same tokens as the engine, in every call.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use batch_generate::engine::{Request, STEP_TOKENS, Settings, generate};
use batch_generate::measure::{Filled, Measured, Rates, prompt};
use batch_generate::sampling::Sampling;
use paged_attention::{KvCache, KvDtype};

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
            let decoded = filled.decode(tokens).unwrap();
            assert_eq!(decoded.tokens, vec![expected[1..=tokens].to_vec(); batch], "{batch} x {context}");
            assert!(!decoded.time.is_zero());
            assert_eq!(filled.decode_shared(tokens).unwrap().tokens, decoded.tokens, "{batch} x {context}");
        }
        assert!(filled.decode(64).is_err(), "there is room for 8 tokens, rounded up to a block");
        assert_eq!(filled.decode(1).unwrap().tokens[0], expected[1..2], "an error leaves no tokens behind");
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
