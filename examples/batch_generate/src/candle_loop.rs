//! The same model in candle's own code, with its contiguous cache, one sequence at a time. Verifies the paged answers
//! against it, and compares the speed.

use std::fs::File;
use std::io::{self, Cursor, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::{MAX_SEQ_LEN, ModelWeights};
use paged_attention::{KvCache, KvDtype};

use crate::engine::{self, Outcome, Request, Settings};
use crate::model::Model;
use crate::sampling::{Random, Sampling};
use crate::shown::say;
use crate::weights::Weights;

/// Loads candle's model, with its weights stored in memory in the same way as ours.
///
/// # Errors
///
/// If the file cannot be read.
pub fn load(path: &Path, weights: Weights) -> Result<ModelWeights> {
    let mut file = File::open(path)?;
    let content = Content::read(&mut file)?;
    let dtype = match weights {
        Weights::Stored => return Ok(ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?),
        Weights::F32 => GgmlDType::F32,
        Weights::Int8 => GgmlDType::Q8_0,
    };
    // candle's model reads its weights only from a file.
    let mut file = Cursor::new(converted(&content, &mut file, dtype)?);
    Ok(ModelWeights::from_gguf(Content::read(&mut file)?, &mut file, &Device::Cpu)?)
}

/// The same model as a GGUF file with matrices of type `matrices`.
fn converted(content: &Content, file: &mut File, matrices: GgmlDType) -> Result<Vec<u8>> {
    let metadata: Vec<(&str, &Value)> = content
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .filter(|(key, _)| key.starts_with("llama.") || *key == "general.architecture")
        .collect();
    let tensors = content
        .tensor_infos
        .keys()
        .map(|name| {
            let tensor = content.tensor(file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
            let dtype = if tensor.rank() == 2 { matrices } else { GgmlDType::F32 };
            Ok((name.as_str(), QTensor::quantize(&tensor, dtype)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &tensors)?;
    Ok(bytes.into_inner())
}

/// The most likely tokens after the prompt, one by one, and the time of each step.
pub(crate) fn generate(
    model: &mut ModelWeights,
    request: &Request,
    is_end: impl Fn(u32) -> bool,
) -> Result<(Vec<u32>, Vec<Duration>)> {
    model.clear_kv_cache();
    let (mut tokens, mut times) = (Vec::new(), Vec::new());
    let mut input = request.prompt.clone();
    let mut position = 0;
    while tokens.len() < request.max_tokens && !tokens.last().is_some_and(|&token| is_end(token)) {
        let started = Instant::now();
        let rows = Tensor::new(input.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
        let logits = model.forward(&rows, position)?.squeeze(0)?.to_vec1::<f32>()?;
        let token = Sampling::greedy().draw(&logits, &mut Random::new(0, 0))?;
        times.push(started.elapsed());
        position += input.len();
        input = vec![token];
        tokens.push(token);
    }
    Ok((tokens, times))
}

/// Checks that every sequence fits into candle's model.
///
/// # Errors
///
/// If a prompt and its longest possible answer do not.
pub fn check(requests: &[Request]) -> Result<()> {
    for (i, request) in requests.iter().enumerate() {
        let total = request.prompt.len().saturating_add(request.max_tokens);
        ensure!(
            total <= MAX_SEQ_LEN,
            "prompt {} with its answer may have {total} tokens, candle's own model can have {MAX_SEQ_LEN}",
            i + 1
        );
    }
    Ok(())
}

/// Computes every answer again with candle's model, and compares token for token.
///
/// # Errors
///
/// If a token differs, or a sequence does not fit into candle's model: see [`check`].
pub fn verify(
    model: &mut ModelWeights,
    requests: &[Request],
    outcome: &Outcome,
    is_end: impl Fn(u32) -> bool + Copy,
) -> Result<()> {
    let mut wrong = 0;
    for (i, answer) in outcome.answers.iter().enumerate() {
        let request = &requests[answer.request];
        let (expected, _) = generate(model, request, is_end)?;
        if answer.tokens != expected {
            let same = answer.tokens.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            say(&format!("sequence {}: the first {same} tokens are the same, then they differ", i + 1));
            wrong += 1;
        }
    }
    let n = outcome.answers.len();
    if wrong > 0 {
        bail!("{wrong} of {n} sequences differ from candle's own model and cache");
    }
    let tokens: usize = outcome.answers.iter().map(|answer| answer.tokens.len()).sum();
    let preemptions: usize = outcome.answers.iter().map(|answer| answer.preemptions).sum();
    say(&format!(
        "verified: {n} of {n} sequences, {tokens} tokens, are identical to candle's own model and cache, \
         {preemptions} preemptions"
    ));
    Ok(())
}

/// Measures decoding at a context of 128 tokens. Each round measures, one after the other, candle's loop with the
/// weights as stored and as ours, a batch of 1, and a batch of 8.
///
/// # Errors
///
/// If a step fails.
pub fn compare(path: &Path, paged: &Model, dtype: KvDtype, weights: Weights) -> Result<()> {
    const CONTEXT: usize = 128;
    const TOKENS: usize = 32;
    const ROUNDS: usize = 5;
    // Arbitrary tokens, and no end token, so that every run has the same length.
    let request = |max_tokens| Request { prompt: (0..CONTEXT as u32).map(|i| 1000 + 7 * i).collect(), max_tokens };
    let mut contiguous = load(path, weights)?;
    let mut stored = load(path, Weights::Stored)?;
    let candle = |model: &mut ModelWeights, tokens: usize| -> Result<f64> {
        let (_, times) = generate(model, &request(tokens), |_| false)?;
        Ok((tokens - 1) as f64 / times[1..].iter().sum::<Duration>().as_secs_f64())
    };
    let paged = |batch: usize| -> Result<f64> {
        let cache = KvCache::builder(paged.shape()).blocks(batch * 16).dtype(dtype).build()?;
        let requests = vec![request(TOKENS); batch];
        let (sampling, step_tokens) = (Sampling::greedy(), engine::STEP_TOKENS);
        let settings = Settings { max_batch: 8, step_tokens, samples: 1, seed: 0, sampling };
        let outcome = engine::generate(paged, &cache, &requests, &settings, |_| false, |_| ())?;
        Ok(outcome.decode.rate().unwrap_or_default())
    };
    let mut rates: Vec<[f64; 4]> = Vec::new();
    for _ in 0..ROUNDS {
        // The weights as stored can be ten times slower, so they decode fewer tokens.
        rates.push([candle(&mut stored, TOKENS / 4)?, candle(&mut contiguous, TOKENS)?, paged(1)?, paged(8)?]);
    }
    let rate = |i: usize| median(rates.iter().map(|round| round[i]).collect());
    let ratio = |a: usize, b: usize| median(rates.iter().map(|round| round[a] / round[b]).collect());
    // A closed pipe is not an error.
    let _ = write!(
        io::stdout(),
        "decode at context {CONTEXT}, tokens/s, median of {ROUNDS} rounds in turn\n\
         candle's own loop, weights as stored    {:>7.1}\n\
         candle's own loop, weights as ours      {:>7.1}\n\
         paged, batch 1   {:>30.1}   {:.2}x and {:.2}x the two above\n\
         paged, batch 8   {:>30.1}   {:.2}x batch 1\n",
        rate(0),
        rate(1),
        rate(2),
        ratio(2, 0),
        ratio(2, 1),
        rate(3),
        ratio(3, 2)
    );
    Ok(())
}

fn median(mut xs: Vec<f64>) -> f64 {
    xs.sort_by(f64::total_cmp);
    xs.get(xs.len() / 2).copied().unwrap_or(f64::NAN)
}
