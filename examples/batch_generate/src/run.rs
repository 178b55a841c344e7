//! The run of the program, from the arguments to the results.

use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use paged_attention::{KvCache, KvDtype, OffloadOptions, Tier};

use crate::args::Args;
use crate::live::Live;
use crate::measure::{self, Measured};
use crate::output::Output;
use crate::prompts::{self, Prompt};
use crate::report::Report;
#[cfg(feature = "verify")]
use crate::verify;
use inference::chat::ChatTemplate;
use inference::engine::{self, Outcome, Request, Settings};
use inference::model::{Gguf, Model};
use inference::model_file;
use inference::sampling::Sampling;
use inference::setup::{cache, load, prefix_cache, weights};
use inference::shown::say;
use inference::tokenizer::Tokenizer;
use inference::weights::Weights;

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

    let file = model_file::obtain(args.model.model.as_deref(), &say)?;
    say(&format!("model: {} ({})", file.path.display(), file.origin));
    let mut gguf = Gguf::open(&file.path)?;
    let tokenizer = Tokenizer::from_gguf(&gguf.content)?;
    let template = ChatTemplate::from_gguf(&gguf.content)?;
    let context = gguf.config().context();

    if args.measure {
        measure::check(&args.batch, &args.context, context)?;
        return measure(args, gguf);
    }
    #[cfg(feature = "verify")]
    if args.compare {
        verify::compare::check(context)?;
        let weights = weights(asked(args), &mut gguf, verify::compare::LONGEST)?;
        let model = load(&mut gguf, weights, verify::compare::LONGEST)?;
        return verify::compare::compare(&file.path, &model, args.cache.kv_dtype.into(), weights);
    }

    let requests = prompts
        .iter()
        .map(|Prompt { prompt, max_tokens }| {
            let prompt = tokenizer.encode_user(&template, prompt, args.system.as_deref())?;
            Ok(Request { prompt, max_tokens: max_tokens.unwrap_or(args.max_tokens) })
        })
        .collect::<Result<Vec<_>>>()?;
    let cache = cache(&args.cache, gguf.config().groups())?;
    engine::check(context, &cache, &requests, &settings)?;
    #[cfg(feature = "verify")]
    if args.verify {
        verify::check(gguf.config(), &requests)?;
        verify::scenarios::check(context)?;
    }
    if !tokenizer.has_end() {
        say("the model file names no end token, so every answer has its maximum number of tokens");
    }
    let longest = requests.iter().map(|request| request.prompt.len() + request.max_tokens).max().unwrap_or(1);
    #[cfg(feature = "verify")]
    let longest = if args.verify { longest.max(verify::scenarios::LONGEST) } else { longest };
    let weights = weights(asked(args), &mut gguf, longest)?;
    let model = load(&mut gguf, weights, longest)?;
    let titles: Vec<&str> = prompts.iter().map(|prompt| prompt.prompt.as_str()).collect();
    let tier = prefix_cache(&args.cache, &file.path, &gguf, weights, longest, &cache)?.map(Arc::new);
    // Written through, because what is cached when the program ends is not evicted.
    let options = OffloadOptions::default().write_through(true);
    let offload = tier.clone().map(|tier| cache.pool().offload_to(tier, &options)).transpose()?;
    let below = tier.map(|tier| tier as Arc<dyn Tier>);
    let mut outcome = generate(below, &model, &cache, &requests, &settings, &tokenizer, &titles)?;
    let fullest = outcome.stats.fullest.take();
    let stored = offload.map(|offload| {
        offload.flush();
        offload.stats()
    });

    #[cfg(feature = "verify")]
    if args.verify {
        let mut reference = verify::Reference::load(&file.path, &model, weights)?;
        verify::verify(&mut reference, &requests, &outcome, |id| tokenizer.is_end(id))?;
        verify::scenarios::verify(reference, &model, args.cache.block_size, args.cache.kv_dtype.into())?;
    }

    let texts = outcome.answers.iter().map(|answer| tokenizer.decode(&answer.tokens)).collect::<Result<Vec<_>>>()?;
    let prompts: Vec<String> = prompts.into_iter().map(|prompt| prompt.prompt).collect();
    let report = Report::new(outcome, &cache, context, &prompts, texts, stored);
    // A reader that closes the pipe early is not an error.
    let _ = write!(std::io::stdout(), "{}", report.table());
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
    args.cache.check()?;
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
        !args.verify || args.model.weights.fixed() != Some(Weights::Int8),
        "candle's own model rounds activations in other groups, so tokens may differ: use --weights exact"
    );
    Ok(settings)
}

/// The kind of weights that the arguments ask for.
fn asked(args: &Args) -> Option<Weights> {
    let fixed = args.model.weights.fixed();
    #[cfg(feature = "verify")]
    let fixed = fixed.or(args.verify.then_some(Weights::F32));
    fixed
}

/// Measures, and prints the rates.
fn measure(args: &Args, mut gguf: Gguf) -> Result<()> {
    let longest = args.context.iter().max().map_or(1, |context| context + measure::TOKENS);
    let weights = weights(asked(args), &mut gguf, longest)?;
    let model = &load(&mut gguf, weights, longest)?;
    let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{elapsed_precise} {msg}")?);
    let progress = |line: &str| {
        bar.set_message(line.to_owned());
        bar.tick();
    };
    let dtype = KvDtype::from(args.cache.kv_dtype);
    let measured = Measured::take(model, dtype, &args.batch, &args.context, progress);
    bar.finish_and_clear();
    let threads = candle_core::utils::get_num_threads();
    let measured = measured?;
    // A reader that closes the pipe early is not an error.
    let _ =
        write!(std::io::stdout(), "weights {}, keys and values {dtype}, {threads} threads\n{measured}", weights.name());
    Ok(())
}

fn generate(
    tier: Option<Arc<dyn Tier>>,
    model: &Model,
    cache: &KvCache,
    requests: &[Request],
    settings: &Settings,
    tokenizer: &Tokenizer,
    prompts: &[&str],
) -> Result<Outcome> {
    let each = requests.iter().fold(0usize, |sum, request| sum.saturating_add(request.max_tokens));
    let most = each.saturating_mul(settings.samples);
    let titles = prompts.iter().flat_map(|prompt| vec![*prompt; settings.samples]).collect();
    let mut live = Live::new(tokenizer, titles, most, cache.pool().units())?;
    let mut shown = Ok(());
    let outcome = engine::generate_over(
        tier,
        model,
        cache,
        requests,
        settings,
        |id| tokenizer.is_end(id),
        |progress| {
            if shown.is_ok() {
                shown = live.update(&progress);
            }
        },
    );
    live.finish();
    shown.and(outcome)
}
