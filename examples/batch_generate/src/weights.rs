//! How the model's matrices are held, and their products with the activations.

use anyhow::Result;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{D, Device, Module, Tensor};

/// How the weights of a quantized file are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Weights {
    /// Converted to 32-bit floating point: exact, four to eight times the memory
    F32,
    /// Converted to 8 bits, with activations rounded to 8 bits for each product: the fastest
    Int8,
    /// As in the file, with activations rounded to 8 bits for each product: small, slow without special instructions
    Stored,
}

/// candle multiplies 8-bit matrices by the fast instructions only where rows are a multiple of this.
const FAST_WIDTH: usize = 256;

/// A matrix that activations are multiplied by.
#[derive(Debug)]
pub(crate) struct Linear {
    matrix: QMatMul,
    /// Zeros that each row of activations lacks to be as wide as the matrix.
    padding: usize,
}

impl Linear {
    pub(crate) fn new(tensor: QTensor, weights: Weights) -> Result<Self> {
        let mut padding = 0;
        let matrix = match weights {
            Weights::F32 => QMatMul::Tensor(tensor.dequantize(&Device::Cpu)?),
            Weights::Stored => QMatMul::from_qtensor(tensor)?,
            Weights::Int8 => {
                let matrix = tensor.dequantize(&Device::Cpu)?;
                let width = matrix.dim(D::Minus1)?;
                padding = width.next_multiple_of(FAST_WIDTH) - width;
                let padded = matrix.pad_with_zeros(D::Minus1, 0, padding)?;
                QMatMul::from_qtensor(QTensor::quantize(&padded, GgmlDType::Q8_0)?)?
            }
        };
        Ok(Self { matrix, padding })
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self.padding {
            0 => self.matrix.forward(x),
            n => self.matrix.forward(&x.pad_with_zeros(D::Minus1, 0, n)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Width 576, as in the default model, is padded; 512 is not.
    #[test]
    fn products_with_8_bits_are_close_to_those_in_f32_and_rows_do_not_see_each_other() {
        for width in [576, 512] {
            let matrix = Tensor::randn(0f32, 1.0, (192, width), &Device::Cpu).unwrap();
            let x = Tensor::randn(0f32, 1.0, (9, width), &Device::Cpu).unwrap();
            let stored = QTensor::quantize(&matrix, GgmlDType::F32).unwrap();
            let linear = Linear::new(stored, Weights::Int8).unwrap();
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
}
