//! The limits of the machine: reading bytes and nothing else, and multiply-adds in registers.

use std::hint::black_box;

use harness::CHAINS;
use pulp::NullaryFnOnce;
use rayon::ThreadPool;

/// Memory to read from.
#[derive(Debug)]
pub struct Floor {
    words: Vec<u64>,
}

/// Words of each of the four streams that are read at a time.
const LANES: usize = 8;

impl Floor {
    /// `bytes` bytes of memory, with every page touched.
    pub fn new(bytes: usize) -> Self {
        Self { words: (0..bytes.div_ceil(8) as u64).collect() }
    }

    /// Replaces the memory if it has fewer than `bytes` bytes.
    pub fn grow(&mut self, bytes: usize) {
        if self.words.len() * 8 < bytes {
            *self = Self::new(bytes);
        }
    }

    /// Reads the `bytes` bytes from `turn * bytes` on, starting over at the end of the memory, in four streams per
    /// thread: one stream keeps too few reads in flight.
    pub fn read(&self, threads: &ThreadPool, bytes: usize, turn: usize) {
        let wanted = (bytes / 8).min(self.words.len());
        let pieces = (self.words.len() / wanted.max(1)).max(1);
        let words = &self.words[turn % pieces * wanted..][..wanted];
        let shares = threads.current_num_threads();
        let sums = threads.broadcast(|thread| {
            let share = words.len() / shares;
            let mine = &words[thread.index() * share..][..share];
            pulp::Arch::new().dispatch(FourStreams(mine))
        });
        black_box(sums);
    }
}

/// Sums all words. A type and not a closure, because it must be inlined to be compiled for the machine's instructions.
struct FourStreams<'a>(&'a [u64]);

impl NullaryFnOnce for FourStreams<'_> {
    type Output = u64;

    #[inline(always)]
    fn call(self) -> u64 {
        let quarter = self.0.len() / 4 / LANES * LANES;
        let stream = |i: usize| self.0[i * quarter..][..quarter].chunks_exact(LANES);
        let mut sums = [[0u64; LANES]; 4];
        for (((a, b), c), d) in stream(0).zip(stream(1)).zip(stream(2)).zip(stream(3)) {
            for (sums, words) in sums.iter_mut().zip([a, b, c, d]) {
                for (sum, word) in sums.iter_mut().zip(words) {
                    *sum = sum.wrapping_add(*word);
                }
            }
        }
        let rest = &self.0[4 * quarter..];
        sums.as_flattened().iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
    }
}

/// Does `n` multiply-adds of f32 in registers, divided among the threads, with the widest instructions of this machine.
pub fn multiply_adds(threads: &ThreadPool, n: usize) {
    let rounds = n / CHAINS / threads.current_num_threads();
    black_box(threads.broadcast(|_| harness::multiply_adds(rounds)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        for n in [0, 1, 31, 32, 33, 1000] {
            let words: Vec<u64> = (0..n).collect();
            assert_eq!(FourStreams(&words).call(), (0..n).sum::<u64>(), "{n} words");
        }
    }
}
