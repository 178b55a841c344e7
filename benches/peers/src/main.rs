//! `cargo run --release --manifest-path benches/peers/Cargo.toml`

use std::fs;
use std::io::Write as _;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use harness::{Record, target};
use peers::args::{Args, Effort, Part};
use peers::environment::{Environment, Script};
use peers::floor::Floor;
use peers::machine::Machine;
use peers::{append, attention, bookkeeping, generation, table};

/// The environment variable from which rayon and candle read their number of threads.
const THREADS: &str = "RAYON_NUM_THREADS";

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    if let Some(path) = &args.from {
        print(args, &Record::read(path)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let threads = match args.threads {
        Some(threads) => threads.into(),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    // candle reads its number of threads only from the environment, which a program cannot safely change for itself. So
    // the program starts itself again with the variable set.
    if std::env::var(THREADS).ok().as_deref() != Some(&threads.to_string()) {
        let again = std::env::current_exe().context("cannot find this program")?;
        let status = Command::new(again).args(std::env::args_os().skip(1)).env(THREADS, threads.to_string()).status();
        let code = status.context("cannot run this program again")?.code();
        return Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)));
    }
    measure(args, threads)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &Args, threads: usize) -> Result<()> {
    let effort = args.effort();
    let mut record = Record::default();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let mut floor = Floor::new(0);

    let mut scripts = Vec::new();
    if effort != Effort::Smoke {
        if [Part::Decode, Part::Shared, Part::Prefill].into_iter().any(|part| args.wants(part)) {
            scripts.extend(Script::ATTENTION);
        } else if args.wants(Part::Append) {
            scripts.extend([Script::Torch, Script::Vllm]);
        }
        if args.wants(Part::Generation) {
            scripts.push(Script::LlamaCpp);
        }
    }
    // A missing or unusable model file is an error before the measurements, which may take hours. A smoke test
    // downloads nothing.
    let model = match args.wants(Part::Generation) && (effort != Effort::Smoke || args.model.is_some()) {
        true => Some(inference::model_file::obtain(args.model.as_deref(), &|line| eprintln!("{line}"))?.path),
        false => None,
    };
    let folder = target().join("peers");
    let python = Environment::prepare(&folder, &scripts, threads, model.as_deref());

    let mut machine = Machine { threads: &pool, floor: &mut floor, python: &python, effort };
    for part in Part::ALL.into_iter().filter(|part| args.wants(*part)) {
        match part {
            Part::Decode => attention::decode(&mut machine, &mut record)?,
            Part::Shared => attention::shared(&mut machine, &mut record)?,
            Part::Prefill => attention::prefill(&mut machine, &mut record)?,
            Part::Append => append::append(threads, machine.python, effort, &mut record)?,
            Part::Allocation => bookkeeping::measure(&mut record)?,
            Part::Generation => match &model {
                Some(path) => generation::generation(path, &mut machine, &mut record)?,
                None => eprintln!("skipped generation: a smoke test has no model unless --model names one"),
            },
        }
        // The results so far are kept even if a later part fails.
        record.save("peers")?;
    }
    print(args, &record)
}

fn print(args: &Args, record: &Record) -> Result<()> {
    // A closed pipe is not an error: the reader has seen enough.
    let _ = match args.markdown {
        true => write!(std::io::stdout(), "{}", table::markdown(record)),
        false => write!(std::io::stdout(), "{}", table::text(record)),
    };
    if let Some(path) = &args.into {
        let page = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let page = table::put(&page, &table::markdown(record)).with_context(|| format!("in {}", path.display()))?;
        fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
