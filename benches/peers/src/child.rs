//! A peer in another process: each request and each answer is one line of JSON. `python/protocol.py` is the other end.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child as Process, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// How long an answer may take: the largest cases take minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// The work of a case.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// `decode`, `shared`, `prefill`, `append` or `generate`.
    pub kind: &'static str,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Number of sequences.
    pub batch: usize,
    /// Tokens of each sequence.
    pub context: usize,
    /// How many of them, at the beginning, all sequences share.
    pub prefix: usize,
    /// Tokens that each sequence may grow by.
    pub room: usize,
    /// `f32`, `f16`, `bf16` or `int8`.
    pub dtype: &'static str,
    /// Copies of keys and values that calls rotate over.
    pub layers: usize,
}

#[derive(Serialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Request<'a> {
    Prepare { case: &'a Case, variant: &'a str },
    Run { id: usize, times: usize },
    Clear,
}

#[derive(Deserialize)]
struct Answer {
    error: Option<String>,
    name: Option<String>,
    threads: Option<usize>,
    id: Option<usize>,
    output: Option<Vec<f32>>,
    ns: Option<u64>,
}

/// A case that the process is ready to run.
#[derive(Debug)]
pub struct Prepared {
    /// Its number.
    pub id: usize,
    /// Its result, to be compared with ours.
    pub output: Vec<f32>,
}

/// The process, which is killed on drop.
#[derive(Debug)]
pub struct Child {
    process: Process,
    input: ChildStdin,
    answers: Receiver<String>,
    log: String,
    name: String,
    /// Whether the process has ended or did not answer in time.
    lost: bool,
}

impl Child {
    /// Starts `python script` with `threads` threads. Its standard error goes to `log`.
    ///
    /// # Errors
    ///
    /// If the process does not start, or reports another number of threads.
    pub fn start(python: &Path, script: &Path, threads: usize, model: Option<&Path>, log: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(python);
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        command.env("OMP_NUM_THREADS", threads.to_string()).env("MKL_NUM_THREADS", threads.to_string());
        command.env("PYTHONDONTWRITEBYTECODE", "1").env_remove("PYTHONPATH");
        if let Some(model) = model {
            command.env("PEERS_MODEL", model);
        }
        let mut process = command.spawn().with_context(|| format!("cannot start {}", python.display()))?;
        let (Some(input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
            bail!("{} has no standard input or output", python.display());
        };
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut child =
            Self { process, input, answers, log: log.display().to_string(), name: String::new(), lost: false };
        let hello = child.answer()?;
        child.name = hello.name.context("the first line has no `name`")?;
        match hello.threads {
            Some(reported) if reported == threads => Ok(child),
            reported => bail!("{} runs on {} threads instead of {threads}", child.name, reported.unwrap_or(0)),
        }
    }

    /// The peer's name and version.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Whether the process has ended or did not answer in time.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Prepares a case in one of the process's variants.
    ///
    /// # Errors
    ///
    /// If the process reports an error, has ended or does not answer in time.
    pub fn prepare(&mut self, case: &Case, variant: &str) -> Result<Prepared> {
        let answer = self.ask(&Request::Prepare { case, variant })?;
        let (id, output) = answer.id.zip(answer.output).context("the answer lacks `id` or `output`")?;
        Ok(Prepared { id, output })
    }

    /// Runs a prepared case; the process itself measures the time.
    ///
    /// # Errors
    ///
    /// If the process reports an error, has ended or does not answer in time.
    pub fn run(&mut self, id: usize, times: usize) -> Result<Duration> {
        let answer = self.ask(&Request::Run { id, times })?;
        Ok(Duration::from_nanos(answer.ns.context("the answer lacks `ns`")?))
    }

    /// Drops all prepared cases and their memory.
    ///
    /// # Errors
    ///
    /// If the process reports an error, has ended or does not answer in time.
    pub fn clear(&mut self) -> Result<()> {
        self.ask(&Request::Clear).map(drop)
    }

    fn ask(&mut self, request: &Request<'_>) -> Result<Answer> {
        let line = serde_json::to_string(request)?;
        let sent = writeln!(self.input, "{line}").and_then(|()| self.input.flush());
        self.lost |= sent.is_err();
        sent.with_context(|| format!("the process has ended, see {}", self.log))?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Answer> {
        let line = self.answers.recv_timeout(PATIENCE);
        self.lost |= line.is_err();
        let line = match line {
            Ok(line) => line,
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("no answer for {} seconds", PATIENCE.as_secs()),
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the process has ended, see {}", self.log),
        };
        let answer: Answer =
            serde_json::from_str(&line).with_context(|| format!("cannot read the answer {line:.80}"))?;
        match answer.error {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use std::fs;

    use super::*;

    fn start(script: &str) -> Result<Child> {
        let folder = std::env::temp_dir().join(format!("peers-{}-{:?}", std::process::id(), thread::current().id()));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("peer.sh"), script)?;
        let child = Child::start(Path::new("sh"), &folder.join("peer.sh"), 3, None, &folder.join("log"));
        fs::remove_dir_all(&folder)?;
        child
    }

    const HELLO: &str = "echo \"{\\\"name\\\": \\\"sh\\\", \\\"threads\\\": $OMP_NUM_THREADS}\"\n";

    #[test]
    fn each_request_gets_one_answer() {
        let mut child = start(&format!(
            "{HELLO}read x; echo '{{\"id\": 0, \"output\": [1.5]}}'; read x; echo \"{{\\\"ns\\\": ${{#x}}}}\""
        ))
        .unwrap();
        assert_eq!(child.name(), "sh");
        let case = Case {
            kind: "decode",
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            batch: 1,
            context: 1,
            prefix: 0,
            room: 0,
            dtype: "f32",
            layers: 1,
        };
        assert_eq!(child.prepare(&case, "plain").unwrap().output, [1.5]);
        let request = "{\"do\":\"run\",\"id\":0,\"times\":7}";
        assert_eq!(child.run(0, 7).unwrap(), Duration::from_nanos(request.len() as u64));
        assert!(!child.is_lost());
        assert!(child.clear().unwrap_err().to_string().contains("the process has ended") && child.is_lost());
    }

    #[test]
    fn errors_of_the_process_are_returned() {
        let mut child =
            start(&format!("{HELLO}read x; echo '{{\"error\": \"no such variant\"}}'; read x; echo what")).unwrap();
        assert_eq!(child.run(0, 1).unwrap_err().to_string(), "no such variant");
        assert!(!child.is_lost());
        assert!(child.clear().unwrap_err().to_string().contains("cannot read the answer what"));
        let error = start("echo '{\"name\": \"sh\", \"threads\": 1}'").unwrap_err();
        assert_eq!(error.to_string(), "sh runs on 1 threads instead of 3");
        assert!(start("exit 1").is_err());
    }
}
