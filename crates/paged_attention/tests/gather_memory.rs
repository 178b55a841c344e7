//! The gather backend computes scores and masks for a limited number of rows at a time, so a long prompt takes a
//! bounded amount of memory.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::DType;
use common::{Random, dense, difference, tensor};
use paged_attention::{Attention, Backend, KvCache, KvShape, Window};

/// An allocator that counts the allocated bytes.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged to the system's allocator; counting does not touch the allocated memory.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let allocated = ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(allocated, Ordering::Relaxed);
        // SAFETY: the caller meets the requirements of `alloc`, and those of the system's allocator are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above, and the memory was allocated by the system's allocator.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_whole_mask_of_a_long_prompt_is_never_in_memory() {
    const TOKENS: usize = 6000;
    const HEADS: usize = 4;
    let shape = KvShape::new(1, 2, 4);
    let cache = KvCache::builder(shape).blocks(400).backend(Backend::Gather).build().unwrap();
    let mut random = Random::new(1);
    let (q, k) = (random.numbers(TOKENS * HEADS * 4), random.numbers(TOKENS * 2 * 4));
    let (qt, kt) = (tensor(&q, HEADS, 4, DType::F32), tensor(&k, 2, 4, DType::F32));
    let slopes: [f32; HEADS] = Attention::alibi_slopes(HEADS).try_into().unwrap();
    let plain = Attention::new(0.5);
    let (windowed, biased) = (plain.clone().window(Window::new(700).with_sink_tokens(4)), plain.clone().alibi(&slopes));
    for (attention, window, slopes) in
        [(plain, TOKENS, [0.0; HEADS]), (windowed, 700, [0.0; HEADS]), (biased, TOKENS, slopes)]
    {
        let mut table = cache.table();
        let mut step = cache.step();
        step.push(&mut table, &[1; TOKENS]).unwrap();
        let before = ALLOCATED.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let y = step.attend(0, &qt, &kt, &kt, &attention).unwrap();
        // A whole mask of four bytes per pair of tokens would take 137 MB, and whole scores four times as much.
        let peak = (PEAK.load(Ordering::Relaxed) - before) >> 20;
        assert!(peak < 100, "{attention:?}: {peak} MB");

        // Rows on both sides of the boundaries between the computed groups of rows.
        let y: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
        for row in [0, 1, 173, 174, 175, 349, 350, 4000, TOKENS - 1] {
            let seen: Vec<usize> = (0..=row).filter(|&at| at < 4 || at + window > row).collect();
            let score =
                |head: usize, at: usize, product: f64| product + f64::from(slopes[head]) * (at as f64 - row as f64);
            let own = row * HEADS * 4..(row + 1) * HEADS * 4;
            let expected = dense(&q[own.clone()], &k, &k, &seen, 2, 4, 0.5, score);
            assert!(difference(&y[own], &expected) < 1e-5, "{attention:?}, row {row}");
        }
    }
}
