//! From the command line to the table.

use std::fs::File;
use std::io::{BufWriter, Write as _};

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use paged_attention::{KvCache, KvDtype};

use crate::args::Args;
use crate::chat::ChatTemplate;
use crate::engine::{self, Outcome, Request, Settings};
use crate::measure::Measured;
use crate::memory::{gib, memory};
use crate::model::{Gguf, Model};
use crate::model_file;
use crate::prompts::{self, Prompt};
use crate::report::Report;
use crate::sampling::Sampling;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Does what the command line says.
///
/// # Errors
///
/// If something is wrong with the arguments, the files, or the machine.
pub fn run(args: &Args) -> Result<()> {
    // What can be refused before a download is refused before it.
    let sampling = Sampling::new(args.temperature, args.top_p)?;
    let prompts = match &args.prompts {
        Some(path) => prompts::read(path, args.prompts_format)?,
        None => prompts::built_in(),
    };
    #[cfg(feature = "verify")]
    ensure!(
        !args.verify || args.temperature == 0.0,
        "only the most likely tokens can be verified: use --temperature 0"
    );
    #[cfg(feature = "verify")]
    ensure!(
        !args.verify || args.weights != Weights::Int8,
        "candle's own model rounds activations in other pieces, so that tokens may differ: use --weights f32"
    );

    let file = model_file::obtain(args.model.as_deref(), &|line| eprintln!("{line}"))?;
    eprintln!("model: {} ({})", file.path.display(), file.origin);
    let mut gguf = Gguf::open(&file.path, args.weights)?;
    let tokenizer = Tokenizer::from_gguf(&gguf.content)?;
    let template = ChatTemplate::from_gguf(&gguf.content)?;
    let model = Model::load(&mut gguf)?;

    if args.measure {
        return measure(args, &model);
    }
    #[cfg(feature = "verify")]
    if args.compare {
        return crate::candle_loop::compare(&file.path, &model, args.kv_dtype.into(), args.weights);
    }

    let requests = prompts
        .iter()
        .map(|Prompt { prompt, max_tokens }| {
            let prompt = tokenizer.encode_user(&template, prompt, args.system.as_deref())?;
            Ok(Request { prompt, max_tokens: max_tokens.unwrap_or(args.max_tokens) })
        })
        .collect::<Result<Vec<_>>>()?;
    let cache = cache(args, &model)?;
    let (samples, step_tokens) = (args.samples, engine::STEP_TOKENS);
    let settings = Settings { max_batch: args.max_batch, step_tokens, samples, seed: args.seed, sampling };
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
    // A reader that has seen enough and closed the pipe is no failure.
    let _ = write!(std::io::stdout(), "{}\n{}", report.answers(), report.table());
    if let (true, Some(fullest)) = (args.show_pool, fullest) {
        let _ = write!(std::io::stdout(), "\nthe pool when it was fullest\n{fullest}");
    }
    if let Some(path) = &args.json {
        let write = || -> Result<()> {
            let mut file = BufWriter::new(File::create(path)?);
            serde_json::to_writer_pretty(&mut file, &report)?;
            Ok(file.flush()?)
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Measures, and prints what came of it.
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
    print!("weights {weights}, keys and values {dtype}, {threads} threads\n{}", measured?);
    Ok(())
}

/// Makes the cache, or says why this machine cannot have it.
fn cache(args: &Args, model: &Model) -> Result<KvCache> {
    let (shape, dtype) = (model.shape(), args.kv_dtype.into());
    let bytes_per_block = shape.bytes_per_block(args.block_size, dtype).unwrap_or(usize::MAX);
    let asked = args.memory.unwrap_or_else(|| args.blocks.saturating_mul(bytes_per_block));
    let there_is = memory();
    ensure!(asked <= there_is, "the pool would take {}, this machine has {}", gib(asked), gib(there_is));
    let builder = KvCache::builder(shape).block_size(args.block_size).dtype(dtype);
    let builder = match args.memory {
        Some(bytes) => builder.memory(bytes),
        None => builder.blocks(args.blocks),
    };
    Ok(builder.build()?)
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
            p.running, p.waiting, p.finished, p.held
        ));
    };
    let outcome = engine::generate(model, cache, requests, settings, |id| tokenizer.is_end(id), progress);
    bar.finish_and_clear();
    outcome
}
