//! [`KVCache`] for callers that pass and get whole sequences.
//!
//! - A whole sequence must begin with the tokens that the layer has: another prompt, or a `seq_len` that counts only
//!   the pass, is an error and changes nothing.
//! - Tensors that `get` has returned never change, whatever happens to the cache. A call copies only the new tokens.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use bitnet_kv::{KVCache, KVCacheOptions, KvDtype, KvError, Overflow};
use candle_core::{DType, Device, Tensor};
use common::{Random, RandomTensor, cat, numbers, tokens};

const HEADS: usize = 3;
const DIM: usize = 8;

fn with(options: &KVCacheOptions) -> KVCache {
    KVCache::with_options(64, 2, HEADS, DIM, &Device::Cpu, options).unwrap()
}

/// Options for every kind of storage that a whole sequence can be compared with.
fn all_options() -> Vec<KVCacheOptions> {
    let ring = |sink_tokens| KVCacheOptions::default().overflow(Overflow::Circular { sink_tokens });
    let options = [KVCacheOptions::default(), KVCacheOptions::default().compress_older_than(10)];
    let dtypes = [KvDtype::F16, KvDtype::Bf16, KvDtype::Int8].map(|dtype| KVCacheOptions::default().dtype(dtype));
    options.into_iter().chain(dtypes).chain([ring(0), ring(7)]).collect()
}

fn random(random: &mut Random, tokens: usize, dtype: DType) -> Tensor {
    random.tensor(&[1, HEADS, tokens, DIM]).to_dtype(dtype).unwrap()
}

fn given(options: &KVCacheOptions) -> DType {
    match options.dtype {
        KvDtype::F16 => DType::F16,
        KvDtype::Bf16 => DType::BF16,
        _ => DType::F32,
    }
}

#[test]
fn a_length_that_counts_the_pass_alone_is_an_error() {
    for options in all_options() {
        let mut numbers_of = Random::new(1);
        let dtype = given(&options);
        for next in [1, 2, 29, 30, 31, 45] {
            let mut cache = with(&options);
            let first = random(&mut numbers_of, 30, dtype);
            let pass = random(&mut numbers_of, next, dtype);
            for layer in 0..2 {
                cache.update(layer, first.clone(), first.clone(), 30).unwrap();
            }
            let before = numbers(&cache.get(0).unwrap().0.to_dtype(DType::F32).unwrap());
            let error = cache.update(0, pass.clone(), pass.clone(), next).unwrap_err();
            assert!(
                matches!(error, KvError::OtherTokens { at: 0, tokens, current: 30 } if tokens == next),
                "{options:?}, {next}: {error}"
            );
            assert!(error.to_string().contains(&format!("pass {}", 30 + next)), "{error}");
            assert_eq!(cache.seq_len(0), 30);
            assert_eq!(numbers(&cache.get(0).unwrap().0.to_dtype(DType::F32).unwrap()), before);
            // With the length of the whole sequence it succeeds.
            for layer in 0..2 {
                cache.update(layer, pass.clone(), pass.clone(), 30 + next).ok();
            }
            assert!(cache.seq_len(1) == 30 + next || options.overflow == Overflow::Error && 30 + next > 64);
        }
    }
}

#[test]
fn another_prompt_is_an_error_at_the_first_different_position() {
    for options in all_options() {
        let mut numbers_of = Random::new(2);
        let dtype = given(&options);
        let first = random(&mut numbers_of, 30, dtype);
        for (at, len) in [(12, 40), (29, 30), (12, 25), (0, 5), (24, 25)] {
            for values in [false, true] {
                let mut cache = with(&options);
                for layer in 0..2 {
                    cache.update(layer, first.clone(), first.clone(), 30).unwrap();
                }
                let other = cat(&[tokens(&first, 0..at), random(&mut numbers_of, len - at, dtype)]);
                let same = cat(&[first.clone(), random(&mut numbers_of, 30, dtype)]);
                let same = tokens(&same, 0..len);
                let (k, v) = if values { (same.clone(), other) } else { (other, same.clone()) };
                match cache.update(1, k, v, len) {
                    Err(KvError::OtherTokens { at: got, .. }) => assert_eq!(got, at, "{options:?}"),
                    other => panic!("{options:?}: {other:?}"),
                }
                // Differences as small as those of sums in another order are accepted.
                let nearly = (same.to_dtype(DType::F32).unwrap() * 1.0001).unwrap().to_dtype(dtype).unwrap();
                cache.update(1, nearly.clone(), nearly, len).unwrap();
                assert_eq!(cache.seq_len(1), len);
            }
        }
    }
}

#[test]
fn what_get_returned_never_changes() {
    for batch in [1, 2] {
        for overflow in [Overflow::Error, Overflow::Grow, Overflow::Circular { sink_tokens: 3 }] {
            let mut random_numbers = Random::new(3);
            let mut cache = with(&KVCacheOptions::default().overflow(overflow));
            let mut given: Vec<(Tensor, Vec<f32>)> = vec![];
            let mut naive = random_numbers.tensor(&[batch, HEADS, 0, DIM]);
            for _ in 0..300 {
                let len = naive.dims()[2];
                let (n, back) = (1 + random_numbers.below(4), random_numbers.below(len.min(4) + 1));
                let new = random_numbers.tensor(&[batch, HEADS, n, DIM]);
                match random_numbers.below(8) {
                    0 => {
                        naive = tokens(&naive, 0..len - back).contiguous().unwrap();
                        let none = tokens(&new, 0..0);
                        // A ring may not be truncated by more than the last pass.
                        for layer in 0..2 {
                            cache.update(layer, none.clone(), none.clone(), len - back).unwrap_or_else(|_| {
                                cache.clear(&Device::Cpu).unwrap();
                                naive = tokens(&naive, 0..0).contiguous().unwrap();
                            });
                        }
                    }
                    1 if n < len && !matches!(overflow, Overflow::Circular { .. }) => {
                        naive = cat(&[tokens(&naive, 0..len - n), new.clone()]);
                        cache.update(0, new.clone(), new, len).unwrap();
                    }
                    _ if len + n <= 64 || overflow != Overflow::Error => {
                        naive = cat(&[naive, new.clone()]);
                        for layer in 0..2 {
                            cache.update(layer, new.clone(), new.clone(), len + n).unwrap();
                        }
                    }
                    _ => {
                        cache.clear(&Device::Cpu).unwrap();
                        naive = tokens(&naive, 0..0).contiguous().unwrap();
                    }
                }
                let len = naive.dims()[2];
                if random_numbers.below(2) == 0 && len > 0 {
                    let (k, v) = cache.get(0).unwrap();
                    let sees = |at: usize| !matches!(overflow, Overflow::Circular { .. }) || at < 3 || at + 61 >= len;
                    let seen: Vec<u32> = (0..len as u32).filter(|&at| sees(at as usize)).collect();
                    let expected = naive.index_select(&Tensor::new(seen, &Device::Cpu).unwrap(), 2).unwrap();
                    let expected = if batch == 1 { common::flat(&expected) } else { expected };
                    assert_eq!((k.dims(), numbers(&k)), (expected.dims(), numbers(&expected)));
                    assert_eq!(numbers(&v), numbers(&k));
                    let own = numbers(&k);
                    given.push((k, own));
                }
            }
            for (view, numbers_then) in &given {
                assert_eq!(&numbers(view), numbers_then);
            }
        }
    }
}

#[test]
fn a_copy_is_kept_and_counted() {
    let mut numbers_of = Random::new(4);
    let mut cache = with(&KVCacheOptions::default());
    let k = random(&mut numbers_of, 40, DType::F32);
    let of_a_token = 2 * HEADS * DIM * 4;
    let copied = |cache: &KVCache| cache.memory_usage()["copied_memory_bytes"];
    cache.update(0, k.clone(), k.clone(), 40).unwrap();
    assert_eq!(copied(&cache), 0);
    cache.get(0).unwrap();
    // The copy has room for twice as many tokens, but at most `max_seq_len`.
    assert_eq!(copied(&cache), 64 * of_a_token);
    cache.update(0, tokens(&k, 0..20), tokens(&k, 0..20), 20).unwrap();
    assert_eq!(copied(&cache), 0);
    cache.get(0).unwrap();
    assert_eq!(copied(&cache), 40 * of_a_token);
    let more = random(&mut numbers_of, 21, DType::F32);
    cache.update(0, more.clone(), more, 41).unwrap();
    cache.get(0).unwrap();
    assert_eq!(copied(&cache), 64 * of_a_token);
    cache.clear(&Device::Cpu).unwrap();
    assert_eq!(copied(&cache), 0);
}
