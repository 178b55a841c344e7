//! Soft caps: scores are capped as exactly as in f64, whatever the cap and the scores. For every backend and kernel.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::DType;
use common::{Configure, backends, tensor};
use paged_attention::{Attention, KvCache, KvDtype, KvShape};

/// The weights of two tokens with these scores. Their values are `[1, 0]` and `[0, 1]`, so the result has the two
/// weights.
fn weights(configure: &Configure, dtype: KvDtype, scores: [f32; 2], scale: f32, cap: f32) -> [f64; 2] {
    let shape = KvShape::new(1, 1, 2);
    let cache = configure(KvCache::builder(shape).blocks(4).dtype(dtype)).build().unwrap();
    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &[1, 2]).unwrap();
    let of = |numbers: [f32; 4]| tensor(&numbers, 1, 2, DType::F32);
    let (q, k) = (of([1.0, 0.0, 1.0, 0.0]), of([scores[0] / scale, 0.0, scores[1] / scale, 0.0]));
    let y = step.attend(0, &q, &k, &of([1.0, 0.0, 0.0, 1.0]), &Attention::new(scale).soft_cap(cap)).unwrap();
    let y: Vec<f32> = y.narrow(0, 1, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    [y[0].into(), y[1].into()]
}

/// The storage types of the backend of this name whose range has every score.
fn dtypes(name: &str) -> impl Iterator<Item = KvDtype> {
    let fused = name != "gather";
    [KvDtype::F32, KvDtype::Int8].into_iter().filter(move |dtype| fused || *dtype != KvDtype::Int8)
}

#[test]
fn large_caps_do_not_change_scores() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            for cap in [1e3, 1e6, 1e9, 1e20, 1e38, 3e38, f32::MAX, f32::INFINITY] {
                let [one, two] = weights(&configure, dtype, [1.0, 2.0], 1.0, cap);
                let capped = |x: f64| if cap.is_finite() { f64::from(cap) * (x / f64::from(cap)).tanh() } else { x };
                let expected = 1.0 / (1.0 + (capped(1.0) - capped(2.0)).exp());
                let bound = if dtype == KvDtype::Int8 { 1e-3 } else { 1e-6 };
                assert!((two - expected).abs() < bound, "{name} {dtype}, cap {cap}: {two} instead of {expected}");
                assert!((one + two - 1.0).abs() < bound, "{name} {dtype}, cap {cap}: {one} and {two}");
            }
        }
    }
}

/// One token has the score, the other has score zero. The logarithm of the ratio of their weights is the capped score.
#[test]
fn scores_and_caps_of_every_size() {
    for (name, configure) in backends() {
        for dtype in dtypes(name) {
            for cap in (-38..=38).map(|exponent| 10f32.powi(exponent)).chain([f32::MIN_POSITIVE, 1e-40, 3e38]) {
                for score in (-30..=30).flat_map(|exponent| [1f32, -3.0].map(|x| x * 10f32.powi(exponent))) {
                    let [weight, other] = weights(&configure, dtype, [score, 0.0], 1.0, cap);
                    let exact = f64::from(cap) * (f64::from(score) / f64::from(cap)).tanh();
                    let expected = [1.0 / (1.0 + (-exact).exp()), 1.0 / (1.0 + exact.exp())];
                    let bound = if dtype == KvDtype::Int8 { 1e-3 } else { 1e-6 };
                    let off = (weight - expected[0]).abs().max((other - expected[1]).abs());
                    assert!(off < bound, "{name} {dtype}, cap {cap:e}, score {score:e}: {weight} for {}", expected[0]);
                    // Where the weights determine the capped score, it is as exact as they are.
                    if dtype == KvDtype::F32 && (0.5..30.0).contains(&exact.abs()) {
                        let got = (weight / other).ln();
                        let off = ((got - exact) / exact).abs();
                        assert!(off < 2e-6, "{name}, cap {cap:e}, score {score:e}: {got} instead of {exact}");
                    }
                }
            }
        }
    }
}

/// The cap applies to the score including the scale, however small or large the scale is.
#[test]
fn scales_of_every_size() {
    for (name, configure) in backends() {
        for (scale, cap) in [(1e-30, 1e3), (1e25, 2.0), (1e-20, 1e-5), (1e10, 3e38)] {
            let [weight, _] = weights(&configure, KvDtype::F32, [3.0, 1.0], scale, cap);
            let capped = |x: f64| f64::from(cap) * (x / f64::from(cap)).tanh();
            let expected = 1.0 / (1.0 + (capped(1.0) - capped(3.0)).exp());
            assert!((weight - expected).abs() < 1e-6, "{name}, scale {scale:e}: {weight} instead of {expected}");
        }
    }
}

#[test]
fn an_infinite_cap_is_no_cap_and_invalid_caps_are_refused() {
    assert_eq!(Attention::new(1.0).soft_cap(f32::INFINITY), Attention::new(1.0));
    for (name, configure) in backends() {
        let shape = KvShape::new(1, 1, 2);
        let cache = configure(KvCache::builder(shape).blocks(4)).build().unwrap();
        for cap in [0.0, -0.0, -1.0, f32::NEG_INFINITY, f32::NAN] {
            let mut table = cache.table();
            let mut step = cache.step();
            step.push(&mut table, &[1]).unwrap();
            let x = tensor(&[1.0, 2.0], 1, 2, DType::F32);
            let error = step.attend(0, &x, &x, &x, &Attention::new(1.0).soft_cap(cap)).unwrap_err().to_string();
            assert!(error.contains("soft cap"), "{name} {cap}: {error}");
        }
    }
}
