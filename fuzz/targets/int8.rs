//! Keys and values of any numbers in 8-bit storage: what is read is near what was written, NaN and infinity make their
//! row NaN, and rows do not touch each other.
#![no_main]

use arbitrary::Arbitrary;
use candle_core::{Device, Tensor};
use libfuzzer_sys::fuzz_target;
use paged_attention::{KvCache, KvDtype, KvShape};

#[derive(Debug, Arbitrary)]
struct Input {
    dims: u8,
    block_size: u8,
    numbers: Vec<f32>,
}

fuzz_target!(|input: Input| {
    let (dims, block_size) = (usize::from(input.dims % 40) + 1, usize::from(input.block_size % 20) + 1);
    let tokens = input.numbers.len() / dims;
    if tokens == 0 {
        return;
    }
    let cache = KvCache::builder(KvShape::new(1, 1, dims)).dtype(KvDtype::Int8).block_size(block_size);
    let cache = cache.blocks(tokens.div_ceil(block_size)).build().unwrap();
    let numbers = &input.numbers[..tokens * dims];
    let rows = Tensor::from_slice(numbers, (tokens, 1, dims), &Device::Cpu).unwrap();
    let mut tables = [cache.table()];
    tables[0].reserve(tokens).unwrap();
    cache.write(0, &mut tables, 0, &rows, &rows).unwrap();
    tables[0].commit(tokens).unwrap();
    let (k, v) = cache.read(0, &tables[0], 0..tokens).unwrap();
    for (kind, read) in [("key", k), ("value", v)] {
        let read = read.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (written, read) in numbers.chunks(dims).zip(read.chunks(dims)) {
            let largest = written.iter().fold(0f64, |most, x| most.max(f64::from(x.abs())));
            if !written.iter().all(|x| x.is_finite()) {
                assert!(read.iter().all(|x| x.is_nan()), "{kind}: {written:?} became {read:?}");
                continue;
            }
            for (x, y) in written.iter().zip(read) {
                let error = (f64::from(*x) - f64::from(*y)).abs();
                // Half a step of 255 over the whole range, and the rounding of scales of the smallest numbers.
                assert!(error <= largest / 127.0 * 0.51 + 1e-38, "{kind}: {x} became {y}, in {written:?}");
            }
        }
    }
});
