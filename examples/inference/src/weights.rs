//! The model's matrices in memory, and their products with activations.
//!
//! - `fastest` measures which kind of memory is the fastest on this processor.

mod fastest;

use anyhow::Result;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{D, Device, Module, Tensor};

pub use fastest::{Fastest, fastest};

/// How the weights of a quantized file are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// Converted to 32-bit floating point: exact, four to eight times the memory.
    F32,
    /// Converted to 8 bits, with activations rounded to 8 bits for each product.
    Int8,
    /// As in the file, with activations rounded to 8 bits for each product.
    Stored,
}

impl Weights {
    /// A name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int8 => "8 bits",
            Self::Stored => "as stored",
        }
    }
}

/// candle uses the fast instructions for 8-bit matrices only if the length of a row is a multiple of this.
pub(crate) const FAST_WIDTH: usize = 256;

/// A matrix that activations are multiplied by, and what is added to the product.
#[derive(Debug)]
pub(crate) struct Linear {
    matrix: QMatMul,
    /// How many zeros are appended to each row of activations, so that it is as wide as the padded matrix.
    padding: usize,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(tensor: QTensor, bias: Option<Tensor>, weights: Weights) -> Result<Self> {
        match weights {
            Weights::Stored => Ok(Self { matrix: QMatMul::from_qtensor(tensor)?, padding: 0, bias }),
            _ => Self::converted(tensor.dequantize(&Device::Cpu)?, bias, weights),
        }
    }

    /// A matrix in f32 that has another use, too.
    pub(crate) fn shared(matrix: Tensor) -> Self {
        Self { matrix: QMatMul::Tensor(matrix), padding: 0, bias: None }
    }

    fn converted(matrix: Tensor, bias: Option<Tensor>, weights: Weights) -> Result<Self> {
        if weights == Weights::F32 {
            return Ok(Self { matrix: QMatMul::Tensor(matrix), padding: 0, bias });
        }
        let width = matrix.dim(D::Minus1)?;
        let padding = width.next_multiple_of(FAST_WIDTH) - width;
        let padded = matrix.pad_with_zeros(D::Minus1, 0, padding)?;
        let quantized = QTensor::quantize(&padded, GgmlDType::Q8_0)?;
        Ok(Self { matrix: QMatMul::from_qtensor(quantized)?, padding, bias })
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let product = match self.padding {
            0 => self.matrix.forward(x)?,
            n => self.matrix.forward(&x.pad_with_zeros(D::Minus1, 0, n)?)?,
        };
        match &self.bias {
            Some(bias) => product.broadcast_add(bias),
            None => Ok(product),
        }
    }
}

/// A matrix of a file, and its bias if it has one.
pub(crate) type Part = (QTensor, Option<Tensor>);

/// Matrices that the same activations are multiplied by.
#[derive(Debug)]
pub(crate) enum Joined {
    /// Stacked into one matrix, for one product; with the first row and the number of rows of each.
    One(Linear, Vec<(usize, usize)>),
    /// Separate, as in the file: their types may differ.
    Apart(Vec<Linear>),
}

impl Joined {
    pub(crate) fn new(parts: Vec<Part>, weights: Weights) -> Result<Self> {
        if weights == Weights::Stored {
            let matrices = parts.into_iter().map(|(tensor, bias)| Linear::new(tensor, bias, weights));
            return Ok(Self::Apart(matrices.collect::<Result<_>>()?));
        }
        let mut matrices = Vec::new();
        let mut biases = Vec::new();
        let mut row_ranges = Vec::new();
        let mut end = 0;
        for (tensor, bias) in &parts {
            let matrix = tensor.dequantize(&Device::Cpu)?;
            let height = matrix.dim(0)?;
            row_ranges.push((end, height));
            end += height;
            let none = || Tensor::zeros(height, matrix.dtype(), &Device::Cpu);
            biases.push(bias.clone().map_or_else(none, Ok)?);
            matrices.push(matrix);
        }
        let any = parts.iter().any(|(_, bias)| bias.is_some());
        let bias = any.then(|| Tensor::cat(&biases, 0)).transpose()?;
        Ok(Self::One(Linear::converted(Tensor::cat(&matrices, 0)?, bias, weights)?, row_ranges))
    }

    /// One matrix of the file that is several, of these heights.
    pub(crate) fn cut((tensor, bias): Part, heights: &[usize], weights: Weights) -> Result<Self> {
        let mut end = 0;
        let range = |&height: &usize| {
            end += height;
            (end - height, height)
        };
        let row_ranges = heights.iter().map(range).collect();
        Ok(Self::One(Linear::new(tensor, bias, weights)?, row_ranges))
    }

    /// The product with each matrix.
    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        match self {
            Self::One(matrix, row_ranges) => {
                let all = matrix.forward(x)?;
                row_ranges.iter().map(|&(start, height)| all.narrow(D::Minus1, start, height)?.contiguous()).collect()
            }
            Self::Apart(matrices) => matrices.iter().map(|matrix| matrix.forward(x)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Width 576, as in the default model, is padded; 512 is not.
    #[test]
    fn products_with_8_bits_are_close_to_those_in_f32_and_rows_are_independent() {
        for width in [576, 512] {
            let matrix = Tensor::randn(0f32, 1.0, (192, width), &Device::Cpu).unwrap();
            let x = Tensor::randn(0f32, 1.0, (9, width), &Device::Cpu).unwrap();
            let stored = QTensor::quantize(&matrix, GgmlDType::F32).unwrap();
            let linear = Linear::new(stored, None, Weights::Int8).unwrap();
            assert_eq!(linear.padding, [0, 192][usize::from(width == 576)]);
            let exact = x.matmul(&matrix.t().unwrap()).unwrap();
            let product = linear.forward(&x).unwrap();
            let size = |x: Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let error = size((&product - &exact).unwrap()) / size(exact);
            assert!(error < 0.02, "{error}");
            for i in 0..9 {
                let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
                let alone = linear.forward(&row(&x)).unwrap().to_vec2::<f32>().unwrap();
                assert_eq!(alone, row(&product).to_vec2::<f32>().unwrap());
            }
        }
    }

    #[test]
    fn joined_products_are_those_of_each_matrix() {
        let matrices = [8, 16, 3].map(|height| Tensor::randn(0f32, 1.0, (height, 64), &Device::Cpu).unwrap());
        let x = Tensor::randn(0f32, 1.0, (5, 64), &Device::Cpu).unwrap();
        for weights in [Weights::F32, Weights::Int8, Weights::Stored] {
            let stored = |matrix: &Tensor| (QTensor::quantize(matrix, GgmlDType::Q8_0).unwrap(), None);
            let stored = matrices.iter().map(stored).collect();
            let joined = Joined::new(stored, weights).unwrap().forward(&x).unwrap();
            assert_eq!(joined.len(), matrices.len());
            for (matrix, joined) in matrices.iter().zip(joined) {
                let exact = x.matmul(&matrix.t().unwrap()).unwrap();
                assert_eq!(joined.dims(), exact.dims());
                let error = (joined - exact).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(error < 1.0, "{weights:?}: {error}");
            }
        }
    }
}
