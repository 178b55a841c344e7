//! The command line.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use crate::simulation::Pool;

pub(crate) const HELP: &str = "\
Measures where the memory of a serving workload goes.

cargo bench -p benches --bench block_utilisation [-- [CASE] [OPTIONS]]

Without --trace the built-in workloads are replayed. With CASE, only cases whose names contain CASE are replayed.
A case is named workload/pool/allocator/block_size.

  --trace FILE       replay this trace: a .csv of the Azure LLM inference traces, or a .jsonl of Mooncake's
  --pool TOKENS      tokens in the pool, for --trace              [default: 65536]
  --max-len TOKENS   most tokens in one sequence, for --trace     [default: 8192]
  --requests N       replay only the first N requests
  --pictures FOLDER  copy the pictures into this folder
  --test             smoke test: 200 requests of each workload, if --requests is not given

Paths are relative to the workspace's folder.
";

/// The parsed command line.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Options {
    /// The trace to replay instead of the built-in workloads.
    pub(crate) trace: Option<PathBuf>,
    /// The pool for the trace.
    pub(crate) pool: Pool,
    /// Only cases whose names contain this are replayed.
    pub(crate) case: String,
    /// The most requests of each workload to replay.
    pub(crate) requests: Option<usize>,
    /// The folder that the pictures are copied to.
    pub(crate) pictures: Option<PathBuf>,
}

impl Options {
    /// Parses the command line; `None` if it asks for help.
    ///
    /// # Errors
    ///
    /// If an argument is unknown, lacks its value or has a wrong value.
    pub(crate) fn of(args: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let pool = Pool { tokens: 65_536, max_len: 8192 };
        let mut options = Self { trace: None, pool, case: String::new(), requests: None, pictures: None };
        let mut smoke = false;
        let mut trace_only = None;
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--help" => return Ok(None),
                "--trace" => options.trace = Some(in_workspace(&value()?)),
                "--pool" => options.pool.tokens = number(&arg, &value()?)?,
                "--max-len" => options.pool.max_len = number(&arg, &value()?)?,
                "--requests" => options.requests = Some(number(&arg, &value()?)?),
                "--pictures" => options.pictures = Some(in_workspace(&value()?)),
                "--test" => smoke = true,
                // Cargo passes `--bench` to every benchmark.
                "--bench" => {}
                case if !case.starts_with('-') => options.case = arg.clone(),
                _ => bail!("unknown argument {arg}; --help lists the arguments"),
            }
            if matches!(arg.as_str(), "--pool" | "--max-len") {
                trace_only = Some(arg);
            }
        }
        if let (Some(arg), None) = (trace_only, &options.trace) {
            bail!("{arg} needs --trace; the built-in workloads have their own pools");
        }
        if smoke {
            options.requests = options.requests.or(Some(200));
        }
        Ok(Some(options))
    }
}

fn number(arg: &str, value: &str) -> Result<usize> {
    let number = usize::from_str(value).with_context(|| format!("{arg} {value}: not a number"))?;
    ensure!(number > 0, "{arg} 0: the least value is 1");
    Ok(number)
}

/// `path` relative to the workspace's folder; Cargo runs benchmarks in their package's folder.
fn in_workspace(path: &str) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    workspace.canonicalize().unwrap_or(workspace).join(path)
}
