//! The command line.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use crate::simulation::Pool;

pub(crate) const HELP: &str = "\
Where the memory of a serving workload goes.

cargo bench -p benches --bench block_utilisation [-- [CASE] [OPTIONS]]

Without options the built-in workloads are replayed. CASE is a part of a case's name, workload/pool/allocator/block_size:
then no other is replayed.

  --trace FILE       replay this trace: a .csv of the Azure LLM inference traces, or a .jsonl of Mooncake's
  --pool TOKENS      with so much memory              [default: 65536]
  --max-len TOKENS   and sequences of at most so many [default: 8192]
  --requests N       only the first N requests
  --pictures FOLDER  copies the pictures there
  --test             a few requests of everything, to see that it works

Files are sought from the workspace's folder.
";

/// What was asked for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Options {
    /// A trace instead of the built-in workloads.
    pub(crate) trace: Option<PathBuf>,
    /// The memory for the trace.
    pub(crate) pool: Pool,
    /// A part of the names of the cases to replay.
    pub(crate) case: String,
    /// Only so many requests of each workload.
    pub(crate) requests: Option<usize>,
    /// Where copies of the pictures go.
    pub(crate) pictures: Option<PathBuf>,
}

impl Options {
    /// None if help is wanted.
    ///
    /// # Errors
    ///
    /// An argument that is not known, that lacks its value or has a wrong one.
    pub(crate) fn of(args: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let pool = Pool { tokens: 65_536, max_len: 8192 };
        let mut options = Self { trace: None, pool, case: String::new(), requests: None, pictures: None };
        let mut smoke = false;
        let mut for_a_trace = None;
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} lacks its value"));
            match arg.as_str() {
                "--help" => return Ok(None),
                "--trace" => options.trace = Some(in_workspace(&value()?)),
                "--pool" => options.pool.tokens = number(&arg, &value()?)?,
                "--max-len" => options.pool.max_len = number(&arg, &value()?)?,
                "--requests" => options.requests = Some(number(&arg, &value()?)?),
                "--pictures" => options.pictures = Some(in_workspace(&value()?)),
                "--test" => smoke = true,
                // What cargo says to every benchmark.
                "--bench" => {}
                case if !case.starts_with('-') => options.case = arg.clone(),
                _ => bail!("the argument {arg} is not known; --help names those that are"),
            }
            if matches!(arg.as_str(), "--pool" | "--max-len") {
                for_a_trace = Some(arg);
            }
        }
        if let (Some(arg), None) = (for_a_trace, &options.trace) {
            bail!("{arg} is for a --trace; the built-in workloads have their own pools");
        }
        if smoke {
            options.requests = options.requests.or(Some(200));
        }
        Ok(Some(options))
    }
}

fn number(arg: &str, value: &str) -> Result<usize> {
    let number = usize::from_str(value).with_context(|| format!("{arg} {value}: not a number"))?;
    ensure!(number > 0, "{arg} 0: at least 1 is needed");
    Ok(number)
}

/// Cargo runs benchmarks in their package's folder.
fn in_workspace(path: &str) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    workspace.canonicalize().unwrap_or(workspace).join(path)
}
