//! The run of the program, from the arguments to the results.

use std::io::Write as _;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use paged_attention::{KvCache, KvDtype, KvShape};

use crate::args::Args;
use crate::chat::ChatTemplate;
use crate::engine::{self, Outcome, Request, Settings};
use crate::measure::{self, Measured};
use crate::memory::{gib, memory};
use crate::model::{Gguf, Model};
use crate::model_file;
use crate::output::Output;
use crate::prompts::{self, Prompt};
use crate::report::Report;
use crate::sampling::Sampling;
use crate::shown::say;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Does what the arguments ask for. Each check comes as early as possible: first the arguments and the prompts are
/// checked by themselves, then the model is downloaded if necessary, then the requests are checked against the model,
/// then the model's weights are loaded.
///
/// # Errors
///
/// If an argument or a file is wrong, the machine has too little memory, or the computation fails.
pub fn run(args: &Args) -> Result<()> {
    let settings = settings(args)?;
    let json = args.json.as_deref().map(Output::prepare).transpose()?;
    let prompts = match &args.prompts {
        Some(path) => prompts::read(path, args.prompts_format)?,
        None => prompts::built_in(),
    };

    let file = model_file::obtain(args.model.as_deref(), &say)?;
    say(&format!("model: {} ({})", file.path.display(), file.origin));
    let mut gguf = Gguf::open(&file.path, args.weights)?;
    let tokenizer = Tokenizer::from_gguf(&gguf.content)?;
    let template = ChatTemplate::from_gguf(&gguf.content)?;
    let context = gguf.config().context();

    if args.measure {
        measure::check(&args.batch, &args.context, context)?;
        return measure(args, &Model::load(&mut gguf)?);
    }
    #[cfg(feature = "verify")]
    if args.compare {
        let model = Model::load(&mut gguf)?;
        return crate::candle_loop::compare(&file.path, &model, args.kv_dtype.into(), args.weights);
    }

    let requests = prompts
        .iter()
        .map(|Prompt { prompt, max_tokens }| {
            let prompt = tokenizer.encode_user(&template, prompt, args.system.as_deref())?;
            Ok(Request { prompt, max_tokens: max_tokens.unwrap_or(args.max_tokens) })
        })
        .collect::<Result<Vec<_>>>()?;
    let cache = cache(args, gguf.config().shape())?;
    engine::check(context, &cache, &requests, &settings)?;
    #[cfg(feature = "verify")]
    if args.verify {
        crate::candle_loop::check(&requests)?;
        crate::scenarios::check(context)?;
    }
    if !tokenizer.has_end() {
        say("the model file names no end token, so every answer has its maximum number of tokens");
    }
    let model = Model::load(&mut gguf)?;
    let mut outcome = generate(&model, &cache, &requests, &settings, &tokenizer)?;
    let fullest = outcome.fullest.take();

    #[cfg(feature = "verify")]
    if args.verify {
        let mut candle = crate::candle_loop::load(&file.path, args.weights)?;
        crate::candle_loop::verify(&mut candle, &requests, &outcome, |id| tokenizer.is_end(id))?;
        crate::scenarios::verify(candle, &model, args.block_size, args.kv_dtype.into())?;
    }

    let texts = outcome.answers.iter().map(|answer| tokenizer.decode(&answer.tokens)).collect::<Result<Vec<_>>>()?;
    let prompts: Vec<String> = prompts.into_iter().map(|prompt| prompt.prompt).collect();
    let report = Report::new(outcome, &cache, model.context(), &prompts, texts);
    // A reader that closes the pipe early is not an error.
    let _ = write!(std::io::stdout(), "{}\n{}", report.answers(), report.table());
    if let (true, Some(fullest)) = (args.show_pool, fullest) {
        let _ = write!(std::io::stdout(), "\nthe pool in the step that used most blocks\n{fullest}");
    }
    json.map_or(Ok(()), |json| json.write(|file| Ok(serde_json::to_writer_pretty(file, &report)?)))
}

/// The settings, after all checks of the arguments that do not need the model.
fn settings(args: &Args) -> Result<Settings> {
    let sampling = Sampling::new(args.temperature, args.top_p)?;
    let (samples, step_tokens) = (args.samples, engine::STEP_TOKENS);
    let settings = Settings { max_batch: args.max_batch, step_tokens, samples, seed: args.seed, sampling };
    settings.check()?;
    ensure!(args.max_tokens > 0, "0 tokens of answer were asked for, at least one is needed");
    ensure!(args.blocks > 0, "a pool of 0 blocks holds nothing");
    ensure!(args.block_size > 0, "a block of 0 tokens holds nothing");
    pool_fits(args.memory.unwrap_or_default())?;
    if args.measure {
        measure::check(&args.batch, &args.context, usize::MAX)?;
    }
    #[cfg(feature = "verify")]
    ensure!(
        !args.verify || args.temperature == 0.0,
        "only the most likely tokens can be verified: use --temperature 0"
    );
    #[cfg(feature = "verify")]
    ensure!(
        !args.verify || args.weights != Weights::Int8,
        "candle's own model rounds activations in other groups, so tokens may differ: use --weights f32"
    );
    Ok(settings)
}

/// Measures, and prints the rates.
fn measure(args: &Args, model: &Model) -> Result<()> {
    let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{elapsed_precise} {msg}")?);
    let progress = |line: &str| {
        bar.set_message(line.to_owned());
        bar.tick();
    };
    let dtype = KvDtype::from(args.kv_dtype);
    let measured = Measured::take(model, dtype, &args.batch, &args.context, progress);
    bar.finish_and_clear();
    let weights = match args.weights {
        Weights::F32 => "f32",
        Weights::Int8 => "int8",
        Weights::Stored => "as stored",
    };
    let threads = candle_core::utils::get_num_threads();
    let measured = measured?;
    // A reader that closes the pipe early is not an error.
    let _ = write!(std::io::stdout(), "weights {weights}, keys and values {dtype}, {threads} threads\n{measured}");
    Ok(())
}

/// Builds the cache.
///
/// # Errors
///
/// If it needs more memory than this machine has, or cannot be built.
fn cache(args: &Args, shape: KvShape) -> Result<KvCache> {
    let dtype = args.kv_dtype.into();
    let bytes_per_block = shape.bytes_per_block(args.block_size, dtype).unwrap_or(usize::MAX);
    pool_fits(args.memory.unwrap_or_else(|| args.blocks.saturating_mul(bytes_per_block)))?;
    let builder = KvCache::builder(shape).block_size(args.block_size).dtype(dtype);
    let builder = match args.memory {
        Some(bytes) => builder.memory(bytes),
        None => builder.blocks(args.blocks),
    };
    Ok(builder.build()?)
}

fn pool_fits(bytes: usize) -> Result<()> {
    let memory = memory();
    ensure!(bytes <= memory, "the pool would take {}, this machine has {}", gib(bytes), gib(memory));
    Ok(())
}

fn generate(
    model: &Model,
    cache: &KvCache,
    requests: &[Request],
    settings: &Settings,
    tokenizer: &Tokenizer,
) -> Result<Outcome> {
    let each = requests.iter().fold(0usize, |sum, request| sum.saturating_add(request.max_tokens));
    let most = each.saturating_mul(settings.samples);
    let bar = ProgressBar::new(most as u64)
        .with_style(ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} tokens, {msg}")?);
    let blocks = cache.pool().blocks();
    let progress = |p: engine::Progress| {
        bar.set_position(p.generated as u64);
        bar.set_message(format!(
            "{} running, {} waiting, {} done, {}/{blocks} blocks",
            p.running, p.waiting, p.finished, p.in_use
        ));
    };
    let outcome = engine::generate(model, cache, requests, settings, |id| tokenizer.is_end(id), progress);
    bar.finish_and_clear();
    outcome
}
