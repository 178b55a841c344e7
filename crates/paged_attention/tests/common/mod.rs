//! Shared helpers: tensors and stored numbers, the reference, and every backend and kernel of this machine.
#![allow(dead_code, unused_imports, unreachable_pub, clippy::unwrap_used)] // each test binary uses a different part

use candle_core::{DType, Device, Tensor};
use paged_attention::{Backend, Kernel, KvCache, KvCacheBuilder, KvDtype, KvShape, TableOptions};
pub use test_support::{Random, dense, difference};

/// A tensor `(tokens, heads, head_dim)` of these numbers.
pub fn tensor(numbers: &[f32], heads: usize, head_dim: usize, dtype: DType) -> Tensor {
    let tokens = numbers.len() / (heads * head_dim);
    Tensor::from_slice(numbers, (tokens, heads, head_dim), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// These numbers, `(_, head_dim)`, as they are read back after being stored in `dtype`.
pub fn stored_as(numbers: &[f32], head_dim: usize, dtype: KvDtype) -> Vec<f32> {
    let round = |dtype| rounded(numbers, dtype);
    match dtype {
        KvDtype::F16 => round(DType::F16),
        KvDtype::Bf16 => round(DType::BF16),
        KvDtype::Int8 => numbers
            .chunks_exact(head_dim)
            .flat_map(|row| {
                // A number that is not finite makes the whole row NaN, because the row shares one scale.
                let finite = row.iter().all(|x| x.is_finite());
                let largest = row.iter().fold(0f32, |m, x| m.max(x.abs()));
                let step = f64::from(largest) / 127.0;
                let stored = move |x: &f32| (f64::from((x * (127.0 / largest)).round_ties_even()) * step) as f32;
                row.iter().map(move |x| if finite { stored(x) } else { f32::NAN })
            })
            .collect(),
        _ => numbers.to_vec(),
    }
}

/// These numbers, rounded to `dtype`.
pub fn rounded(numbers: &[f32], dtype: DType) -> Vec<f32> {
    let tensor = Tensor::from_slice(numbers, numbers.len(), &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// Whether a row equals the reference: NaN and infinities at the same indices, and the other numbers within `bound`
/// relative to the largest finite number of the reference.
pub fn agrees(got: &[f32], reference: &[f64], bound: f64) -> bool {
    assert_eq!(got.len(), reference.len());
    let largest = reference.iter().filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
    got.iter().zip(reference).all(|(&got, &expected)| {
        let got = f64::from(got);
        if expected.is_finite() {
            (got - expected).abs() <= bound * largest
        } else {
            got == expected || (got.is_nan() && expected.is_nan())
        }
    })
}

/// Sets a backend and a kernel on a builder.
pub type Configure = Box<dyn Fn(KvCacheBuilder) -> KvCacheBuilder + Sync>;

/// The gather backend, and the fused backend with every kernel that this machine can run, by name.
pub fn backends() -> Vec<(&'static str, Configure)> {
    let mut backends: Vec<(&str, Configure)> =
        vec![("gather", Box::new(|b: KvCacheBuilder| b.backend(Backend::Gather)))];
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        backends.push((kernel.name(), Box::new(move |b: KvCacheBuilder| b.backend(Backend::Fused).kernel(kernel))));
    }
    backends
}

/// Writes NaN into every slot of a cache with one group of layers, so that a read of a slot that was not written by the
/// test is detected.
pub fn poison(cache: &KvCache) {
    // Private, so that these blocks are not cached: a later prefix match finds only what the test has written.
    let mut table = cache.table_with(&TableOptions::default().private());
    let tokens = cache.pool().available() * cache.pool().block_size();
    let mut step = cache.step();
    step.push(&mut table, &vec![0; tokens]).unwrap();
    let KvShape { layers, kv_heads, head_dim, value_dim, values_in_keys, .. } = cache.shape();
    let nan = |dims: usize| tensor(&vec![f32::NAN; tokens * kv_heads * dims], kv_heads, dims, DType::F32);
    let v = (!values_in_keys).then(|| nan(value_dim));
    for layer in 0..layers {
        step.write(layer, &nan(head_dim), v.as_ref()).unwrap();
    }
}
