//! An open model file.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, Value};

use crate::config::Config;
use crate::header;
use crate::memory::{gib, memory};
use crate::shown::line;
use crate::used;
use crate::weights::Weights;

/// An open GGUF file of the llama architecture.
#[derive(Debug)]
pub struct Gguf {
    /// Its metadata.
    pub content: Content,
    pub(crate) config: Config,
    pub(crate) weights: Weights,
    reader: BufReader<File>,
    /// The names of the tensors that were read.
    read: BTreeSet<String>,
}

impl Gguf {
    /// Opens `path`, and reads and checks everything but the numbers in the tensors: after this, only those can be
    /// wrong.
    ///
    /// # Errors
    ///
    /// If it is not a GGUF file, or one of another architecture; if something in it is missing, contradictory or not
    /// supported; if the model does not fit into this machine.
    pub fn open(path: &Path, weights: Weights) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut reader = BufReader::new(file);
        header::check(&mut reader)?;
        let content = Content::read(&mut reader)
            .with_context(|| format!("{} is not a GGUF file, or is damaged", path.display()))?;
        match content.metadata.get("general.architecture") {
            Some(Value::String(name)) if name == "llama" => {}
            Some(Value::String(name)) => bail!("{} is a {} model, only llama is supported", path.display(), line(name)),
            _ => bail!("{} does not say what architecture it is", path.display()),
        }
        let config = Config::of(&content)?;
        fits(&config, weights, memory())?;
        Ok(Self { content, config, weights, reader, read: BTreeSet::new() })
    }

    /// The model's numbers.
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn tensor(&mut self, name: &str) -> Result<QTensor> {
        self.read.insert(name.to_owned());
        self.content
            .tensor(&mut self.reader, name, &Device::Cpu)
            .with_context(|| format!("cannot read `{name}` of the model file: it is truncated or damaged"))
    }

    /// Checks that all tensors that count as used were read.
    pub(crate) fn all_read(&self) -> Result<()> {
        match used::tensors(&self.config).find(|(name, _)| !self.read.contains(name)) {
            Some((name, _)) => bail!("the tensor `{name}` of the model file was not used"),
            None => Ok(()),
        }
    }
}

/// Checks that the model fits into `memory` bytes: an allocation that fails would end the process.
fn fits(config: &Config, weights: Weights, memory: usize) -> Result<()> {
    let numbers: usize = used::tensors(config).map(|(_, shape)| shape.iter().product()).fold(0, usize::saturating_add);
    // Weights as stored are no larger than the file. The embedding is always converted to f32.
    let bytes = match weights {
        Weights::F32 => numbers.saturating_mul(4),
        Weights::Int8 => numbers,
        Weights::Stored => 0,
    };
    let embedding = config.vocabulary.saturating_mul(config.width).saturating_mul(4);
    // Cosines and sines, each for half of the head size.
    let rotations = config.context.saturating_mul(config.head_dim).saturating_mul(4);
    let needed = bytes.max(embedding).saturating_add(rotations);
    ensure!(
        needed <= memory,
        "the model would take {}, {} of them for the rotary tables of {} tokens, this machine has {}",
        gib(needed),
        gib(rotations),
        config.context,
        gib(memory)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::SMALL;

    #[test]
    fn a_model_larger_than_the_machine_is_refused_with_the_numbers() {
        let gib = 1 << 30;
        for weights in [Weights::F32, Weights::Int8, Weights::Stored] {
            assert!(fits(&SMALL, weights, gib).is_ok());
        }
        let long = Config { context: 1 << 24, head_dim: 32, ..SMALL };
        assert_eq!(
            fits(&long, Weights::F32, gib).unwrap_err().to_string(),
            "the model would take 2.0 GiB, 2.0 GiB of them for the rotary tables of 16777216 tokens, this machine has \
             1.0 GiB"
        );
        let wide = Config { feed_forward: 10_000_000, ..SMALL };
        assert!(
            fits(&wide, Weights::F32, gib).unwrap_err().to_string().contains("would take 7.2 GiB, 0.0 GiB of them")
        );
        assert!(fits(&wide, Weights::Stored, gib).is_ok());
    }
}
