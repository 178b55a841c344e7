//! 8-bit storage of numbers of every size: numbers that are not finite stay visible, tiny numbers keep their digits.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::{DType, Tensor};
use common::{Random, tensor};
use paged_attention::{Attention, Kernel, KvCache, KvDtype, KvShape, TableOptions};

fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| kernel.is_available())
}

fn cache(kernel: Kernel, head_dim: usize) -> KvCache {
    let shape = KvShape::new(1, 1, head_dim);
    KvCache::builder(shape).blocks(16).dtype(KvDtype::Int8).kernel(kernel).build().unwrap()
}

/// Returns the result of the last token, which attends to all tokens, and the stored keys and values.
fn attend(cache: &KvCache, q: &[f32], k: &[f32], v: &[f32]) -> [Vec<f32>; 3] {
    let head_dim = cache.shape().head_dim;
    let tokens = k.len() / head_dim;
    let mut table = cache.table_with(&TableOptions::default().private());
    let mut step = cache.step();
    step.push(&mut table, &vec![1; tokens]).unwrap();
    let of = |numbers: &[f32]| tensor(numbers, 1, head_dim, DType::F32);
    let q = of(&q.repeat(tokens));
    let y = step.attend(0, &q, &of(k), &of(v), &Attention::new(1.0)).unwrap();
    step.commit().unwrap();
    let floats = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (k, v) = cache.read(0, &table, 0..table.len()).unwrap();
    [floats(y.narrow(0, tokens - 1, 1).unwrap()), floats(k), floats(v)]
}

#[test]
fn numbers_that_are_not_finite_stay_visible() {
    for kernel in kernels() {
        for tokens in [1, 2, 20, 70] {
            for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let at = format!("{}, {tokens} tokens, {x}", kernel.name());
                let cache = cache(kernel, 16);
                let ordinary = Random::new(3).numbers(tokens * 16);
                let mut bad = ordinary.clone();
                bad[tokens / 2 * 16 + 3] = x;
                let row = tokens / 2 * 16..tokens / 2 * 16 + 16;
                for (k, v, stored) in [(&ordinary, &bad, 2), (&bad, &ordinary, 1)] {
                    let got = attend(&cache, &ordinary[..16], k, v);
                    assert!(got[0].iter().all(|x| x.is_nan()), "{at}: {:?}", got[0]);
                    for (i, x) in got[stored].iter().enumerate() {
                        assert_eq!(x.is_nan(), row.contains(&i), "{at}: {:?}", got[stored]);
                    }
                    assert!(got[3 - stored].iter().all(|x| x.is_finite()), "{at}");
                }
                // The same in a query.
                let mut q = ordinary[..16].to_vec();
                q[5] = x;
                let got = attend(&cache, &q, &ordinary, &ordinary);
                assert!(got[0].iter().all(|x| x.is_nan()), "{at}: {:?}", got[0]);
            }
        }
    }
}

/// A number is stored as the nearest multiple of the scale, and the scale is large enough for the largest number of the
/// row.
#[test]
fn tiny_numbers_are_off_by_half_a_step_at_most() {
    let smallest = f64::from(f32::from_bits(1));
    for exponent in -45..=-30 {
        for size in [1.0, 1.3, 2.7, 4.9, 8.8] {
            let size = size * 10f64.powi(exponent);
            let cache = cache(Kernel::best(), 16);
            let numbers: Vec<f32> =
                Random::new(5).numbers(20 * 16).into_iter().map(|x| (f64::from(x) * size) as f32).collect();
            let [_, k, v] = attend(&cache, &[1.0; 16], &numbers, &numbers);
            for stored in [k, v] {
                for (row, stored) in numbers.chunks(16).zip(stored.chunks(16)) {
                    let largest = row.iter().fold(0f64, |m, x| m.max(f64::from(x.abs())));
                    // A scale is a positive multiple of the smallest subnormal number.
                    let step = (largest / 127.0 / smallest).ceil() * smallest;
                    for (x, stored) in row.iter().zip(stored) {
                        let off = (f64::from(*x) - f64::from(*stored)).abs();
                        assert!(off <= step / 2.0 * 1.0001, "{x:e} of {largest:e} is stored as {stored:e}");
                    }
                }
            }
        }
    }
}

/// The mean of tiny values is as exact as that of others, and tiny queries or keys give all tokens the same weight.
#[test]
fn tiny_values_are_weighed_like_others() {
    for kernel in kernels() {
        for exponent in -40..=-30 {
            let cache = cache(kernel, 16);
            let size = 10f64.powi(exponent) as f32;
            let plain = Random::new(7).numbers(70 * 16);
            let tiny: Vec<f32> = plain.iter().map(|x| x * size).collect();
            let q = Random::new(8).numbers(16);
            let [ordinary, ..] = attend(&cache, &q, &plain, &plain);
            let [got, _, stored] = attend(&cache, &q, &plain, &tiny);
            let least = 1e-38f64.max(2e-3 * f64::from(size));
            let at = format!("{}, values of {size:e}", kernel.name());
            for (got, ordinary) in got.iter().zip(&ordinary) {
                let expected = f64::from(*ordinary) * f64::from(size);
                assert!((f64::from(*got) - expected).abs() < least, "{at}: {got:e} instead of {expected:e}");
            }
            // All scores are zero, or close to zero.
            let tiny_q = Random::new(9).numbers(16).iter().map(|x| x * size).collect::<Vec<_>>();
            for (q, k) in [(&q, &tiny), (&tiny_q, &plain)] {
                let [got, ..] = attend(&cache, q, k, &tiny);
                for (dim, got) in got.iter().enumerate() {
                    let mean = stored.iter().skip(dim).step_by(16).map(|x| f64::from(*x)).sum::<f64>() / 70.0;
                    assert!((f64::from(*got) - mean).abs() < least, "{at}: {got:e} instead of {mean:e}");
                }
            }
        }
    }
}

/// The products of tiny queries and huge keys, or of huge queries and tiny keys, are ordinary scores.
#[test]
fn tiny_times_huge_is_an_ordinary_score() {
    for kernel in kernels() {
        for exponent in [-36, -35, -34, -30, 30, 35, 36] {
            let cache = cache(kernel, 16);
            let size = 10f64.powi(exponent) as f32;
            let (q, k) = (Random::new(4).numbers(16), Random::new(5).numbers(30 * 16));
            let v = Random::new(6).numbers(30 * 16);
            let [expected, ..] = attend(&cache, &q, &k, &v);
            let scaled = |x: &[f32], by: f32| x.iter().map(|x| x * by).collect::<Vec<_>>();
            let [got, ..] = attend(&cache, &scaled(&q, size), &scaled(&k, 1.0 / size), &v);
            for (got, expected) in got.iter().zip(&expected) {
                assert!((got - expected).abs() < 1e-2, "{} {size:e}: {got} instead of {expected}", kernel.name());
            }
        }
    }
}

/// Numbers up to the largest f32 are read back as finite numbers.
#[test]
fn huge_numbers_stay_finite() {
    for kernel in kernels() {
        for x in [3e38, 3.3e38, f32::MAX, f32::MIN] {
            let cache = cache(kernel, 16);
            let [y, k, v] = attend(&cache, &[0.0; 16], &[x; 160], &[x; 160]);
            for got in [y, k, v].into_iter().flatten() {
                assert!((got / x - 1.0).abs() < 1e-3, "{} {x:e}: {got:e}", kernel.name());
            }
        }
    }
}
