//! The results, as text and as JSON.

use std::fmt::Write as _;

use paged_attention::{KvCache, OffloadStats};
use serde::Serialize;

use inference::engine::Outcome;
use inference::shown::line;

/// The results, with the structure of the JSON output.
#[derive(Debug, Serialize)]
pub struct Report {
    sequences: Vec<SequenceReport>,
    pool: PoolReport,
    prefix: PrefixReport,
    prefill_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    steps: usize,
    /// The bytes of the blocks in use at the peak, and those of one contiguous cache of the model's whole context for
    /// each sequence.
    #[serde(skip)]
    bytes: [usize; 2],
}

#[derive(Debug, Serialize)]
struct SequenceReport {
    prompt: String,
    text: String,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    cached_tokens: usize,
    preemptions: usize,
}

#[derive(Debug, Serialize)]
struct PoolReport {
    blocks: usize,
    block_size: usize,
    peak_blocks: usize,
    mean_utilisation: f64,
}

/// How much of the prompts was matched in the cache instead of computed.
#[derive(Debug, Serialize)]
struct PrefixReport {
    prompt_tokens: usize,
    computed_prompt_tokens: usize,
    resumed_tokens: usize,
    evictions: u64,
    read_tokens: usize,
    shared_tokens: usize,
    tier: Option<TierReport>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct TierReport {
    tokens: usize,
    seconds: f64,
    stored_blocks: u64,
    /// Blocks that were not stored: the file could not be written, or was too slow.
    lost_blocks: u64,
}

impl Report {
    /// Collects the results. `texts` are the decoded answers, `context` is the model's context.
    pub fn new(
        outcome: Outcome,
        cache: &KvCache,
        context: usize,
        prompts: &[String],
        texts: Vec<String>,
        offload: Option<OffloadStats>,
    ) -> Self {
        let pool = cache.pool();
        let per_token = cache.bytes_per_block() / pool.block_size();
        // With several groups of layers, a block here is one in each.
        let blocks = |units: usize| units.div_ceil(pool.units_per_block());
        Self {
            bytes: [outcome.stats.peak_blocks * cache.bytes_per_unit(), outcome.answers.len() * context * per_token],
            pool: PoolReport {
                blocks: blocks(pool.units()),
                block_size: pool.block_size(),
                peak_blocks: blocks(outcome.stats.peak_blocks),
                mean_utilisation: outcome.stats.mean_utilisation,
            },
            prefix: PrefixReport {
                prompt_tokens: outcome.answers.iter().map(|answer| answer.prompt_tokens).sum(),
                computed_prompt_tokens: outcome.stats.computed_prompt_tokens,
                resumed_tokens: outcome.stats.resumed_tokens,
                evictions: pool.stats().evictions,
                read_tokens: outcome.stats.read_tokens,
                shared_tokens: outcome.stats.shared_tokens,
                tier: offload.map(|offload| TierReport {
                    tokens: outcome.stats.read_from_tier.tokens,
                    seconds: outcome.stats.read_from_tier.time.as_secs_f64(),
                    stored_blocks: offload.stored,
                    lost_blocks: offload.failed + offload.dropped + offload.skipped,
                }),
            },
            prefill_tokens_per_s: outcome.stats.prefill.rate(),
            decode_tokens_per_s: outcome.stats.decode.rate(),
            steps: outcome.stats.steps,
            sequences: outcome
                .answers
                .into_iter()
                .zip(texts)
                .map(|(answer, text)| SequenceReport {
                    prompt: prompts[answer.request].clone(),
                    text,
                    tokens: answer.tokens,
                    prompt_tokens: answer.prompt_tokens,
                    cached_tokens: answer.cached_tokens,
                    preemptions: answer.preemptions,
                })
                .collect(),
        }
    }

    /// The table of numbers.
    pub fn table(&self) -> String {
        let mut out = String::from("    prompt                            prompt  cached  generated  preempted\n");
        for (i, s) in self.sequences.iter().enumerate() {
            let _ = writeln!(
                out,
                "{:>3} {:<32} {:>7} {:>7} {:>10} {:>10}",
                i + 1,
                shortened(&s.prompt, 32),
                s.prompt_tokens,
                s.cached_tokens,
                s.tokens.len(),
                s.preemptions
            );
        }
        let PoolReport { blocks, block_size, peak_blocks, mean_utilisation } = self.pool;
        let PrefixReport { prompt_tokens, computed_prompt_tokens, resumed_tokens, read_tokens, shared_tokens, .. } =
            self.prefix;
        let shared = 100.0 * shared_tokens as f64 / read_tokens.max(1) as f64;
        let times = prompt_tokens as f64 / computed_prompt_tokens.max(1) as f64;
        let [paged, contiguous] = self.bytes.map(|bytes| bytes as f64 / f64::from(1 << 20));
        let rate = |rate: Option<f64>| rate.map_or("-".to_string(), |rate| format!("{rate:.0} tokens/s"));
        let _ = write!(
            out,
            "\npool      {peak_blocks} of {blocks} blocks of {block_size} tokens at peak, {mean_utilisation:.2} tokens \
             per reserved slot\nmemory    {paged:.1} MiB at peak; a contiguous cache of the whole context for each \
             sequence takes {contiguous:.1} MiB\nprefix    {computed_prompt_tokens} of {prompt_tokens} prompt tokens \
             computed, {times:.1} times less; {resumed_tokens} matched again after preemption\n\
             reading   {shared:.0} % of {read_tokens} tokens that sequences attended to were read together with \
             another's\nspeed     prefill {}, decode {}, {} steps\n",
            rate(self.prefill_tokens_per_s),
            rate(self.decode_tokens_per_s),
            self.steps
        );
        if let Some(TierReport { tokens, seconds, stored_blocks, lost_blocks }) = self.prefix.tier {
            // What was not computed would have taken about as long as what was.
            let saved = self.prefill_tokens_per_s.map(|rate| tokens as f64 / rate - seconds);
            let saved = saved.map_or(String::new(), |saved| format!(", which saved about {saved:.1} s"));
            let lost = if lost_blocks > 0 { format!(", {lost_blocks} could not be") } else { String::new() };
            let _ = writeln!(
                out,
                "file      {tokens} prompt tokens were read from the prefix cache in {seconds:.1} s{saved}; \
                 {stored_blocks} blocks stored{lost}"
            );
        }
        out
    }
}

/// The title of an answer: its number, and the beginning of its prompt.
pub(crate) fn title(index: usize, prompt: &str, width: usize) -> String {
    format!("── {} ── {}", index + 1, shortened(prompt, width))
}

/// The first line, escaped for a terminal and cut to `width` characters.
fn shortened(text: &str, width: usize) -> String {
    let line = line(text.lines().next().unwrap_or_default());
    if line.chars().count() <= width {
        return line;
    }
    line.chars().take(width - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use paged_attention::KvShape;

    use super::*;
    use inference::engine::Answer;

    #[test]
    fn answers_are_escaped_in_text_and_exact_in_json() {
        let answer = Answer { request: 0, tokens: vec![1], prompt_tokens: 1, cached_tokens: 0, preemptions: 0 };
        let outcome = Outcome { answers: vec![answer], ..Outcome::default() };
        let cache = KvCache::builder(KvShape::new(1, 1, 2)).blocks(1).build().unwrap();
        let text = "one\t1\n\u{1b}]0;two\u{9b}2J\u{202e}";
        let report = Report::new(outcome, &cache, 8, &["a\u{7}".into()], vec![text.into()], None);
        assert_eq!(title(0, "a\u{7}", 90), "── 1 ── a\\u{7}");
        assert!(report.table().contains("  1 a\\u{7} "));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["sequences"][0]["text"], &json["sequences"][0]["prompt"]), (&text.into(), &"a\u{7}".into()));
    }

    #[test]
    fn long_prompts_are_cut_between_characters() {
        assert_eq!(shortened("short", 5), "short");
        assert_eq!(shortened("ünïcödé text", 5), "ünïc…");
        assert_eq!(shortened("one\ntwo", 10), "one");
        assert_eq!(shortened("\u{1b}[2J", 20), "\\u{1b}[2J");
        assert_eq!(shortened("\u{1b}[2J", 5), "\\u{1…");
    }
}
