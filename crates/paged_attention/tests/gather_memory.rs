//! The gather backend's scores and masks are made in pieces: a long prompt takes a bounded amount of memory.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::DType;
use common::{Random, dense, difference, tensor};
use paged_attention::{Attention, Backend, KvCache, KvShape, Window};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is; counting touches no memory of it.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above, and the memory is from there.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_long_prompt_s_mask_is_never_there_as_a_whole() {
    const TOKENS: usize = 6000;
    const HEADS: usize = 4;
    let shape = KvShape { layers: 1, kv_heads: 2, head_dim: 4 };
    let cache = KvCache::builder(shape).blocks(400).backend(Backend::Gather).build().unwrap();
    let mut random = Random::new(1);
    let (q, k) = (random.numbers(TOKENS * HEADS * 4), random.numbers(TOKENS * 2 * 4));
    let (qt, kt) = (tensor(&q, HEADS, 4, DType::F32), tensor(&k, 2, 4, DType::F32));
    let slopes: [f32; HEADS] = Attention::alibi_slopes(HEADS).try_into().unwrap();
    let plain = Attention::new(0.5);
    let (windowed, biased) = (plain.clone().window(Window::new(700).with_sinks(4)), plain.clone().alibi(&slopes));
    for (attention, window, slopes) in
        [(plain, TOKENS, [0.0; HEADS]), (windowed, 700, [0.0; HEADS]), (biased, TOKENS, slopes)]
    {
        let mut table = cache.table();
        let mut step = cache.step();
        step.push(&mut table, &[1; TOKENS]).unwrap();
        let before = HELD.load(Ordering::Relaxed);
        MOST.store(before, Ordering::Relaxed);
        let y = step.attend(0, &qt, &kt, &kt, &attention).unwrap();
        // A mask of four bytes for every pair would take 137 MB, and scores four times as much.
        let most = (MOST.load(Ordering::Relaxed) - before) >> 20;
        assert!(most < 100, "{attention:?}: {most} MB");

        // Rows on both sides of the borders of pieces.
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
