//! Generated workloads: lengths, arrivals and common prefixes are drawn from the statistics of public traces. They are
//! the same in every run.

use super::allocator::Pool;
use super::quantiles::{CODE, CONVERSATION, LONG, Prefixes, Statistics};
use super::request::{PREFIX_BLOCK, Request};

/// A workload that needs no trace file.
#[derive(Debug)]
pub(crate) struct BuiltIn {
    pub(crate) name: &'static str,
    /// The pool that it is replayed with.
    pub(crate) pool: Pool,
    /// The number of requests that is enough for stable averages.
    pub(crate) requests: usize,
    statistics: Statistics,
}

/// The built-in workloads.
pub(crate) fn built_in() -> [BuiltIn; 3] {
    let small = Pool { tokens: 1 << 16, max_len: 1 << 13 };
    let large = Pool { tokens: 1 << 18, max_len: 1 << 17 };
    let workload = |name, pool, requests, statistics| BuiltIn { name, pool, requests, statistics };
    [
        workload("conversation", small, 6000, CONVERSATION),
        workload("code", small, 6000, CODE),
        workload("long_prompts", large, 2000, LONG),
    ]
}

impl BuiltIn {
    /// Generates the first `requests` requests, without those beyond the maximum length.
    pub(crate) fn generate(&self, requests: usize) -> Vec<Request> {
        let Statistics { input, output, gap, mean_gap, prefixes } = &self.statistics;
        let mut random = Random(0x5EED);
        let mut generated: Vec<Request> = Vec::with_capacity(requests);
        let mut ids = 1;
        let mut now = 0.0;
        while generated.len() < requests {
            let rank = random.share();
            let quarter = &output[(4.0 * rank) as usize];
            let input = (input.value(rank).round() as usize).max(1);
            let output = (quarter.value(random.share()).round() as usize).max(1);
            let prefix = prefixes.as_ref().map(|prefixes| prefix(prefixes, input, &generated, &mut ids, &mut random));
            let arrival = now;
            now += gap.value(random.share());
            if input + output <= self.pool.max_len {
                let number = generated.len() as u32;
                generated.push(Request { number, arrival, input, output, prefix: prefix.unwrap_or_default() });
            }
        }
        // Scaled to the trace's mean rate of arrivals.
        if let Some(last) = generated.last().map(|last| last.arrival).filter(|&last| last > 0.0) {
            let scale = mean_gap * (generated.len() - 1) as f64 / last;
            generated.iter_mut().for_each(|request| request.arrival *= scale);
        }
        generated
    }
}

/// The ids of a prompt's blocks. All prompts have the same first block; some prompts continue an earlier request, and
/// the remaining blocks are new.
fn prefix(prefixes: &Prefixes, input: usize, earlier: &[Request], ids: &mut u32, random: &mut Random) -> Vec<u32> {
    let blocks = input.div_ceil(PREFIX_BLOCK);
    let mut prefix = vec![0];
    let (continues, age, shared) = (random.share(), random.share(), random.share());
    if continues < prefixes.continuing {
        let shared = ((prefixes.shared.value(shared) * blocks as f64).round() as usize).clamp(1, blocks);
        let age = prefixes.age.value(age) as usize;
        // The latest request of that age or older that has at least `shared` blocks.
        let latest = earlier.len().saturating_sub(age);
        if let Some(request) = earlier[..latest].iter().rev().find(|request| request.prefix.len() >= shared) {
            prefix = request.prefix[..shared].to_vec();
        }
    }
    let fresh = blocks - prefix.len();
    prefix.extend((0..fresh as u32).map(|new| *ids + new));
    *ids += fresh as u32;
    prefix
}

/// SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
struct Random(u64);

impl Random {
    /// The next number, uniform in [0, 1).
    fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
#[allow(unused_imports, dead_code, reason = "a benchmark is built with cfg(test) and without its tests")]
mod tests {
    use super::*;

    /// Means of the traces without requests beyond the maximum length: prompt tokens, generated tokens, seconds between
    /// arrivals.
    const MEANS: [(f64, f64, f64); 3] = [(1154.0, 211.1, 0.181), (2047.8, 27.9, 0.390), (12_035.0, 342.6, 0.294)];

    #[test]
    fn generated_workloads_have_the_means_of_the_traces() {
        for (workload, (input, output, gap)) in built_in().iter().zip(MEANS) {
            let requests = workload.generate(6000);
            let mean =
                |value: &dyn Fn(&Request) -> f64| requests.iter().map(value).sum::<f64>() / requests.len() as f64;
            let near = |mean: f64, expected: f64| {
                assert!((mean / expected - 1.0).abs() < 0.06, "{workload:?}: {mean}, {expected}")
            };
            near(mean(&|request| request.input as f64), input);
            near(mean(&|request| request.output as f64), output);
            near(requests[5999].arrival / 5999.0, gap);
            assert!(requests.is_sorted_by(|a, b| a.arrival <= b.arrival));
            assert_eq!(requests, workload.generate(6000), "the same every time");
        }
    }
}
