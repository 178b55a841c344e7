//! The workloads, and the allocators that each is replayed through.

use std::fmt;

use anyhow::Result;

use crate::options::Options;
use crate::report::{Report, Row};
use crate::simulation::{ALLOCATORS, Arrivals, Pool, Request, allocator, block_sizes, built_in, read_trace, replay};

/// Requests, and the pool and arrivals that they are replayed with.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) name: String,
    pool: Pool,
    arrivals: Arrivals,
    requests: Vec<Request>,
    /// Whether it is replayed with every block size, or only with the usual one.
    all_sizes: bool,
}

/// The usual block size.
pub(crate) const BLOCK_SIZE: usize = 16;

/// The workloads that the options select.
///
/// # Errors
///
/// If the trace cannot be read.
pub(crate) fn workloads(options: &Options) -> Result<Vec<Workload>> {
    let mut workloads = Vec::new();
    let mut add = |name: &str, pool: Pool, requests: Vec<Request>| {
        let timed = format!("{name}_timed");
        for (name, arrivals) in [(name, Arrivals::Saturated), (&timed, Arrivals::Timed)] {
            let (name, requests, all_sizes) = (name.to_string(), requests.clone(), arrivals == Arrivals::Saturated);
            workloads.push(Workload { name, pool, arrivals, requests, all_sizes });
        }
    };
    if let Some(file) = &options.trace {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        let mut requests = read_trace(file)?;
        requests.truncate(options.requests.unwrap_or(usize::MAX));
        add(&name, options.pool, requests);
        return Ok(workloads);
    }
    for built_in in built_in() {
        let requests = built_in.generate(options.requests.unwrap_or(built_in.requests));
        add(built_in.name, built_in.pool, requests);
    }
    // A large pool and so a large batch, for the cost of the bookkeeping.
    let [conversation, ..] = built_in();
    let requests = conversation.generate(options.requests.unwrap_or(conversation.requests));
    let pool = Pool { tokens: 1 << 18, ..conversation.pool };
    let name = conversation.name.to_string();
    workloads.push(Workload { name, pool, arrivals: Arrivals::Saturated, requests, all_sizes: false });
    Ok(workloads)
}

impl Workload {
    /// Replays it through every allocator and adds the results to the report, but only cases whose names contain
    /// `case`.
    ///
    /// # Errors
    ///
    /// If an allocator cannot be created or fails.
    pub(crate) fn run(&self, case: &str, report: &mut Report) -> Result<()> {
        for name in ALLOCATORS {
            for &block_size in block_sizes(name) {
                if !format!("{}/{}/{name}/{block_size}", self.name, self.pool.tokens).contains(case) {
                    continue;
                }
                if !self.all_sizes && block_size != BLOCK_SIZE && block_sizes(name).len() > 1 {
                    continue;
                }
                let mut allocator = allocator(name, self.pool, block_size)?;
                let mut samples = Vec::new();
                let watched = self.arrivals == Arrivals::Timed;
                let watch = |sample: &_| samples.extend(watched.then_some(*sample));
                let outcome = replay(&self.requests, self.arrivals, self.pool, &mut *allocator, watch)?;
                report.rows.push(Row {
                    workload: self.name.clone(),
                    pool: self.pool.tokens,
                    allocator: name,
                    block_size,
                    outcome,
                    samples,
                });
            }
        }
        Ok(())
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, pool, arrivals, requests, .. } = self;
        let long = requests.iter().filter(|request| request.input + request.output > pool.max_len).count();
        let arrivals = match arrivals {
            Arrivals::Saturated => "a queue that is never empty",
            Arrivals::Timed => "arrivals as recorded",
        };
        write!(
            f,
            "`{name}`: {} requests, {arrivals},\na pool of {} tokens, at most {} in a sequence",
            requests.len() - long,
            pool.tokens,
            pool.max_len
        )?;
        if long > 0 { write!(f, " ({long} longer ones left out)") } else { Ok(()) }
    }
}
