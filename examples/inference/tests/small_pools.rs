//! However small the pool, the engine finishes, and every sequence gets the same answer as alone.

#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_in;

use inference::engine::{LanguageModel, Outcome, Progress, Request, STEP_TOKENS, Settings, generate};
use inference::sampling::{Random, Sampling};
use paged_attention::{KvCache, KvDtype, LayerGroup, TableOptions, Window};
use stand_in::{END, HEAD_DIM, SHAPE, StandIn, mix};

fn cache(blocks: usize, block_size: usize) -> KvCache {
    KvCache::builder(SHAPE).blocks(blocks).block_size(block_size).dtype(KvDtype::F32).build().unwrap()
}

/// The answers of sequences that share no blocks, in a pool with room for all: no engine, no admission, no prefix
/// caching, no fork.
fn alone(requests: &[Request], settings: &Settings) -> Vec<Vec<u32>> {
    let total: usize = requests.iter().map(|r| (r.prompt.len() + r.max_tokens).div_ceil(16)).sum();
    let cache = cache(total * settings.samples, 16);
    let private = TableOptions::default().private();
    let mut answers = Vec::new();
    for (i, request) in requests.iter().enumerate() {
        for sample in 0..settings.samples {
            let mut random = Random::new(settings.seed + sample as u64, i);
            let mut table = cache.table_with(&private);
            let mut tokens = request.prompt.clone();
            while tokens.len() < request.prompt.len() + request.max_tokens
                && !tokens[request.prompt.len()..].contains(&END)
            {
                let computed = table.len();
                let mut step = cache.step();
                step.push(&mut table, &tokens[computed..]).unwrap();
                let logits = StandIn.forward(&step).unwrap().to_vec2::<f32>().unwrap();
                step.commit().unwrap();
                tokens.push(settings.sampling.draw(&logits[0], &mut random).unwrap());
            }
            answers.push(tokens.split_off(request.prompt.len()));
        }
    }
    answers
}

/// The upper bound of the number of steps: the comment in `generate` derives it.
fn most_steps(requests: &[Request], settings: &Settings) -> usize {
    let longest = requests.iter().map(|r| r.prompt.len() + r.max_tokens - 1).max().unwrap();
    requests.len() * settings.samples * (longest + 1) * settings.max_batch
}

/// Runs the engine, checks that it finishes within [`most_steps`], and compares the answers with those of [`alone`].
fn run(blocks: usize, block_size: usize, requests: &[Request], settings: &Settings) -> Outcome {
    let cache = cache(blocks, block_size);
    let case = || format!("{blocks} blocks of {block_size}, {settings:?}, {requests:?}");
    let (mut steps, most) = (0, most_steps(requests, settings));
    let progress = |progress: Progress| {
        steps += 1;
        assert!(steps <= most, "step {steps}, {progress:?}: {}", case());
    };
    let outcome = generate(&StandIn, &cache, requests, settings, |token| token == END, progress);
    let outcome = outcome.unwrap_or_else(|error| panic!("{error}: {}", case()));
    let answers: Vec<_> = outcome.answers.iter().map(|answer| answer.tokens.clone()).collect();
    assert_eq!(answers, alone(requests, settings), "{}", case());
    assert_eq!((cache.pool().in_use(), cache.pool().check_ref_counts([])), (0, Ok(())), "{}", case());
    outcome
}

fn settings() -> Settings {
    let sampling = Sampling::new(1.0, 1.0).unwrap();
    Settings { max_batch: 8, step_tokens: STEP_TOKENS, samples: 1, seed: 5, sampling }
}

#[test]
fn duplicates_that_fill_the_pool_to_the_last_block_finish() {
    let prompt: Vec<u32> = (0..42).map(|i| i * i % 3).collect();
    let requests = vec![Request { prompt, max_tokens: 4 }; 2];
    for block_size in [1, 7, 14] {
        for spare in 0..3 {
            run(45usize.div_ceil(block_size) + spare, block_size, &requests, &settings());
        }
    }
}

#[test]
fn what_samples_of_a_long_prompt_read_together_is_counted() {
    let requests = [Request { prompt: (0..2100).map(|i| i * i % 7).collect(), max_tokens: 5 }];
    let outcome = run(600, 16, &requests, &Settings { samples: 3, ..settings() });
    // Four chunks of 512 tokens, in each step but the prompt's, for all samples but the first.
    assert!(
        outcome.stats.shared_tokens > 0 && outcome.stats.shared_tokens.is_multiple_of(2048),
        "{}",
        outcome.stats.shared_tokens
    );
    assert!(outcome.stats.shared_tokens < outcome.stats.read_tokens);
}

#[test]
fn samples_diverge_in_a_pool_with_room_for_one() {
    for block_size in [1, 3, 4, 5, 12] {
        for prompt in [11, 12, 13] {
            let requests = vec![Request { prompt: vec![1; prompt], max_tokens: 6 }; 2];
            let blocks = (prompt + 5usize).div_ceil(block_size);
            let outcome = run(blocks, block_size, &requests, &Settings { samples: 4, ..settings() });
            assert_eq!(outcome.answers.len(), 8);
        }
    }
}

#[test]
fn a_long_prompt_does_not_stop_the_others_from_decoding() {
    // The long prompt soon has more computed tokens than the short one, and it could use up the whole budget.
    let short = Request { prompt: vec![1, 2, 3], max_tokens: 12 };
    let long = Request { prompt: (0..120).map(|i| i * i % 4).collect(), max_tokens: 1 };
    let settings = Settings { step_tokens: 4, sampling: Sampling::greedy(), ..settings() };
    let cache = cache(64, 4);
    let mut generated = Vec::new();
    let progress = |progress: Progress| generated.push(progress.generated);
    generate(&StandIn, &cache, &[short, long], &settings, |_| false, progress).unwrap();
    assert_eq!(generated[..12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
}

/// Runs three requests whose answers have 36 tokens each. Two have a prompt of three tokens; the last has `prompt`
/// tokens, more than the others from the beginning. Returns the number of steps until the first sequence finishes,
/// which is the last request, and how often each was preempted.
fn the_longest_of_three(prompt: u32) -> (usize, Vec<usize>) {
    let requests = [(0, 3), (1, 3), (2, prompt)]
        .map(|(first, n)| Request { prompt: (0..n).map(|i| (first + i) % 4).collect(), max_tokens: 36 });
    let settings = Settings { sampling: Sampling::greedy(), ..settings() };
    let mut finished = Vec::new();
    let progress = |progress: Progress| finished.push(progress.finished);
    let outcome = generate(&StandIn, &cache(13, 4), &requests, &settings, |_| false, progress).unwrap();
    let first = finished.iter().position(|&finished| finished > 0).unwrap();
    (first + 1, outcome.answers.iter().map(|answer| answer.preemptions).collect())
}

#[test]
fn the_longest_gets_the_last_blocks_and_is_never_preempted() {
    // After ten decoded tokens all three need a block, and two blocks are free. After eighteen, two sequences need a
    // block, and one is free.
    let (ended, preemptions) = the_longest_of_three(11);
    assert_eq!(ended, 36, "it has a token in every step");
    assert!(preemptions[0] > 0 && preemptions[1] > 0 && preemptions[2] == 0, "{preemptions:?}");
}

#[test]
fn when_the_longest_does_not_fit_another_is_preempted_at_once() {
    // Only the longest needs a block when none is free: at 20 tokens, with two other sequences, and at 28 tokens, with
    // one. The others have room for some more tokens.
    let (ended, preemptions) = the_longest_of_three(10);
    assert_eq!(ended, 36 + 2, "it is left out of two steps");
    assert!(preemptions[0] > 0 && preemptions[1] > 0 && preemptions[2] == 0, "{preemptions:?}");
}

/// Random numbers that depend only on the seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = mix(self.0, 7);
        (self.0 >> 33) as usize % n
    }

    /// `from` to `to`, both included.
    fn within(&mut self, from: usize, to: usize) -> usize {
        from + self.below(to - from + 1)
    }

    fn tokens(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(2) as u32).collect()
    }

    /// A prompt and the maximum length of its answer, which together fit into `capacity` tokens; the last token of an
    /// answer needs no slot. Many prompts have a common prefix, and many requests fill the pool.
    fn request(&mut self, before: &[Request], text: &[u32], capacity: usize) -> Request {
        let max_tokens = self.within(1, 6.min(capacity));
        let most = (capacity + 1 - max_tokens).min(text.len());
        let prompt = match self.below(4) {
            0 if !before.is_empty() => before[self.below(before.len())].prompt.clone(),
            1 => text[..most].to_vec(),
            2 => text[..self.within(1, most)].to_vec(),
            _ => {
                let mut prompt = text[..self.within(0, most - 1)].to_vec();
                let rest = self.within(1, most - prompt.len());
                prompt.extend(self.tokens(rest));
                prompt
            }
        };
        Request { max_tokens: max_tokens.min(capacity + 1 - prompt.len()), prompt }
    }
}

#[test]
fn every_run_finishes_with_the_answers_of_separate_sequences() {
    const RUNS: u64 = 10_000;
    let (mut steps, mut preemptions, mut resumed, mut cached) = (0, 0, 0, 0);
    for seed in 0..RUNS {
        let mut numbers = Numbers(mix(seed, 11));
        let (blocks, block_size) = (numbers.within(1, 20), numbers.within(1, 16));
        let capacity = blocks * block_size;
        let longest = numbers.within(1, 48);
        let text = numbers.tokens(longest);
        let mut requests = Vec::new();
        for _ in 0..numbers.within(1, 5) {
            let request = numbers.request(&requests, &text, capacity);
            requests.push(request);
        }
        let max_batch = numbers.within(1, 8);
        let settings = Settings {
            max_batch,
            samples: numbers.within(1, max_batch.min(4)),
            step_tokens: [1, 2, 5, 16, STEP_TOKENS][numbers.below(5)],
            seed,
            ..settings()
        };
        let outcome = run(blocks, block_size, &requests, &settings);
        steps += outcome.stats.steps;
        preemptions += outcome.answers.iter().map(|answer| answer.preemptions).sum::<usize>();
        resumed += outcome.stats.resumed_tokens;
        cached += outcome.answers.iter().map(|answer| answer.cached_tokens).sum::<usize>();
    }
    println!("{steps} steps, {preemptions} preemptions, {resumed} tokens resumed, {cached} shared");
    assert!(preemptions > 500 && resumed > 500 && cached > 10_000, "{preemptions}, {resumed}, {cached}");
}

/// Layers with a window need blocks for their window and the tokens of a step only. A pool that has room for these is
/// enough, and a smaller one is refused before anything is computed.
#[test]
fn layers_with_a_window_need_no_more_than_it_and_a_step() {
    let requests: Vec<Request> =
        [100, 61].map(|n| Request { prompt: (0..n).map(|i| i % 4).collect(), max_tokens: 20 }).into();
    let settings = Settings { max_batch: 2, step_tokens: 10, samples: 1, seed: 0, sampling: Sampling::greedy() };
    let windowed = LayerGroup::new([0], 1, HEAD_DIM).window(Window::new(8));
    let other = LayerGroup::new([1], 1, HEAD_DIM);
    // 120 tokens are 30 blocks; 8 + 10 of a window are at least 5. The budget counts one block of each group.
    for (groups, few) in
        [(vec![windowed.clone(), other.clone().window(Window::new(8))], 5..=8), (vec![windowed, other], 17..=21)]
    {
        let answers = |blocks: usize| {
            let cache = KvCache::builder_of(groups.clone()).block_size(4).blocks(blocks).build().unwrap();
            let outcome = generate(&StandIn, &cache, &requests, &settings, |_| false, |_| ())?;
            assert_eq!(cache.pool().in_use(), 0);
            anyhow::Ok(outcome.answers.into_iter().map(|answer| answer.tokens).collect::<Vec<_>>())
        };
        let expected = answers(64).unwrap();
        let mut enough = None;
        for blocks in 1..=32 {
            match answers(blocks) {
                Ok(tokens) => {
                    assert_eq!(tokens, expected, "{blocks} blocks");
                    enough.get_or_insert(blocks);
                }
                Err(error) => {
                    assert_eq!(enough, None, "{blocks} blocks: {error}");
                    let said = error.to_string();
                    assert!(said.starts_with("prompt 1 has 100 tokens and may get 20 more: that takes "), "{said}");
                }
            }
        }
        assert!(enough.is_some_and(|blocks| few.contains(&blocks)), "{enough:?}");
    }
}
