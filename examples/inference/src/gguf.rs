//! An open model file.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};

use crate::config::Config;
use crate::header;
use crate::memory::{gib, memory};
use crate::tensors;
use crate::weights::{FAST_WIDTH, Part, Weights};

/// An open GGUF file of an architecture that is computed.
#[derive(Debug)]
pub struct Gguf {
    /// Its metadata.
    pub content: Content,
    config: Config,
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
    /// supported.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut reader = BufReader::new(file);
        header::check(&mut reader)?;
        let content = Content::read(&mut reader)
            .with_context(|| format!("{} is not a GGUF file, or is damaged", path.display()))?;
        let config = Config::of(&content)?;
        Ok(Self { content, config, reader, read: BTreeSet::new() })
    }

    /// What the file says of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Checks that the model, for sequences of at most `longest` tokens, fits into this machine.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn check_memory(&self, weights: Weights, longest: usize) -> Result<()> {
        fits(&self.content, &self.config, weights, longest.min(self.config.context), memory())
    }

    pub(crate) fn tensor(&mut self, name: &str) -> Result<QTensor> {
        self.read.insert(name.to_owned());
        self.content
            .tensor(&mut self.reader, name, &Device::Cpu)
            .with_context(|| format!("cannot read `{name}` of the model file: it is truncated or damaged"))
    }

    /// A tensor in f32.
    pub(crate) fn f32(&mut self, name: &str) -> Result<Tensor> {
        Ok(self.tensor(name)?.dequantize(&Device::Cpu)?)
    }

    /// All numbers of a tensor.
    pub(crate) fn numbers(&mut self, name: &str) -> Result<Vec<f32>> {
        Ok(self.f32(name)?.flatten_all()?.to_vec1()?)
    }

    /// The matrix `{part}.weight`, and `{part}.bias` if the model has it.
    pub(crate) fn part(&mut self, part: &str) -> Result<Part> {
        let matrix = self.tensor(&format!("{part}.weight"))?;
        let bias = format!("{part}.bias");
        let bias = self.content.tensor_infos.contains_key(&bias).then(|| self.f32(&bias)).transpose()?;
        Ok((matrix, bias))
    }

    /// The `n` matrices of a tensor of three dimensions, byte for byte.
    pub(crate) fn slices(&mut self, name: &str, n: usize) -> Result<Vec<QTensor>> {
        let tensor = self.tensor(name)?;
        let (_, rows, columns) = tensor.shape().dims3()?;
        let bytes = tensor.data()?;
        let block = tensor.dtype().block_size();
        ensure!(
            columns.is_multiple_of(block) && bytes.len().is_multiple_of(n),
            "the tensor `{name}` of the model file has rows of {columns} numbers, stored in blocks of {block}"
        );
        let slice = |slice: &[u8]| {
            let storage = QStorage::from_data(Cow::Borrowed(slice), &Device::Cpu, tensor.dtype())?;
            Ok(QTensor::new(storage, (rows, columns))?)
        };
        bytes.chunks(bytes.len() / n).map(slice).collect()
    }

    /// Checks that all tensors that count as used were read, apart from factors for sequences of another length.
    pub(crate) fn all_read(&self) -> Result<()> {
        let unread = |name: &String| !self.read.contains(name) && !tensors::ROPE_FACTORS.contains(&name.as_str());
        match tensors::all(&self.config).into_iter().map(|(name, _)| name).find(unread) {
            Some(name) => bail!("the tensor `{name}` of the model file was not used"),
            None => Ok(()),
        }
    }
}

/// Checks that the model fits into `memory` bytes: an allocation that fails would end the process.
fn fits(content: &Content, config: &Config, weights: Weights, context: usize, memory: usize) -> Result<()> {
    let weights: Vec<usize> =
        tensors::all(config).iter().map(|(name, shape)| bytes(content, name, shape, weights)).collect();
    // Cosines and sines, each for half of the rotated dimensions, of one or two kinds of layers.
    let kinds = if config.local_rope == config.rope { 1 } else { 2 };
    let rotations = context.saturating_mul(config.rope.dims).saturating_mul(4 * kinds);
    // The embedding is looked up in f32. With tied weights, the output has its own matrix.
    let embedding = config.vocabulary.saturating_mul(config.width).saturating_mul(4);
    let needed = weights.into_iter().chain([rotations]).fold(embedding, usize::saturating_add);
    ensure!(
        needed <= memory,
        "the model would take {}, {} of them for the rotary tables of {context} tokens, this machine has {}",
        gib(needed),
        gib(rotations),
        gib(memory)
    );
    Ok(())
}

/// The bytes of a tensor in memory. Vectors, and matrices that candle does not multiply as they are, are f32.
fn bytes(content: &Content, name: &str, shape: &[usize], weights: Weights) -> usize {
    let numbers = shape.iter().copied().fold(1, usize::saturating_mul);
    let dtype = content.tensor_infos.get(name).map_or(GgmlDType::F32, |info| info.ggml_dtype);
    let dtype = match (weights, dtype) {
        (Weights::F32, _) => GgmlDType::F32,
        (Weights::Int8, _) => GgmlDType::Q8_0,
        (Weights::Stored, GgmlDType::F16 | GgmlDType::BF16) => GgmlDType::F32,
        (Weights::Stored, dtype) => dtype,
    };
    let dtype = if shape.len() == 1 { GgmlDType::F32 } else { dtype };
    // Rows are padded for 8 bits.
    let numbers = match (weights, shape.last()) {
        (Weights::Int8, Some(&columns)) if columns > 0 => {
            (numbers / columns).saturating_mul(columns.next_multiple_of(FAST_WIDTH))
        }
        _ => numbers,
    };
    numbers.div_ceil(dtype.block_size()).saturating_mul(dtype.type_size())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{small, small_config};

    #[test]
    fn a_model_larger_than_the_machine_is_refused_with_the_numbers() {
        let gib = 1 << 30;
        for weights in [Weights::F32, Weights::Int8, Weights::Stored] {
            assert!(fits(&small(), &small_config(), weights, 256, gib).is_ok());
        }
        let mut long = small_config();
        (long.rope.dims, long.local_rope.dims) = (32, 32);
        assert_eq!(
            fits(&small(), &long, Weights::F32, 1 << 24, gib).unwrap_err().to_string(),
            "the model would take 2.0 GiB, 2.0 GiB of them for the rotary tables of 16777216 tokens, this machine has \
             1.0 GiB"
        );
        let wide = Config { feed_forward: 10_000_000, ..small_config() };
        let said = fits(&small(), &wide, Weights::F32, 256, gib).unwrap_err().to_string();
        assert!(said.contains("would take 7.2 GiB, 0.0 GiB of them"), "{said}");
        // As stored, it takes what the file takes: 18 bytes for 32 numbers.
        let mut stored = small();
        stored.tensor_infos.values_mut().for_each(|info| info.ggml_dtype = GgmlDType::Q4_0);
        let needs = |content: &Content, weights| fits(content, &wide, weights, 256, 2 * gib);
        assert!(needs(&stored, Weights::Stored).is_ok());
        assert!(needs(&small(), Weights::Stored).is_err() && needs(&stored, Weights::Int8).is_err());
    }
}
