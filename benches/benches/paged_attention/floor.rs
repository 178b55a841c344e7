//! The limits of the machine: reading the same blocks in the same order and nothing else, and multiply-adds in
//! registers.

use rayon::prelude::*;

/// Reads each block once from start to end. The blocks are divided evenly among the threads of the current pool.
pub(crate) fn plain(storage: &[u32], block: usize, order: &[u32]) -> u32 {
    let read = |id: &u32| storage[*id as usize * block..][..block].iter().fold(0u32, |sum, x| sum.wrapping_add(*x));
    shares(order).map(|share| share.iter().map(read).fold(0, u32::wrapping_add)).reduce(|| 0, u32::wrapping_add)
}

/// Reads four blocks at a time, a few numbers of each in turn: four streams keep more reads in flight than one.
pub(crate) fn four_streams(storage: &[u32], block: usize, order: &[u32]) -> u32 {
    let of = |id: u32| storage[id as usize * block..][..block].chunks_exact(LANES);
    shares(order)
        .map(|share| {
            let [mut first, mut second, mut third, mut fourth] = [[0u32; LANES]; 4];
            let quarter = share.len() / 4;
            for at in 0..quarter {
                let [a, b, c, d] = [0, 1, 2, 3].map(|stream| of(share[stream * quarter + at]));
                for (((a, b), c), d) in a.zip(b).zip(c).zip(d) {
                    for lane in 0..LANES {
                        first[lane] = first[lane].wrapping_add(a[lane]);
                        second[lane] = second[lane].wrapping_add(b[lane]);
                        third[lane] = third[lane].wrapping_add(c[lane]);
                        fourth[lane] = fourth[lane].wrapping_add(d[lane]);
                    }
                }
            }
            let rest = share[4 * quarter..].iter().flat_map(|&id| of(id).flatten());
            let sums = [first, second, third, fourth];
            sums.as_flattened().iter().chain(rest).fold(0, |sum, x| x.wrapping_add(sum))
        })
        .reduce(|| 0, u32::wrapping_add)
}

/// Numbers of a stream that are read at a time; with eight, the sums of all four streams stay in registers.
const LANES: usize = 8;

/// Does `n` times [`CHAINS`](benches::CHAINS) multiply-adds in registers on each thread of the current pool.
pub(crate) fn multiply_adds(n: usize) -> f32 {
    (0..rayon::current_num_threads()).into_par_iter().map(|_| benches::multiply_adds(n)).sum()
}

fn shares(order: &[u32]) -> impl ParallelIterator<Item = &[u32]> {
    order.par_chunks(order.len().div_ceil(rayon::current_num_threads()).max(1))
}
