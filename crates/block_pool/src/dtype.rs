//! The types in which keys and values can be stored.

use std::fmt;

/// How the numbers of keys and values are stored. Attention computes in f32 with each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum KvDtype {
    /// Four bytes: no precision is lost.
    #[default]
    F32,
    /// Two bytes, eleven significant bits, up to 65,504.
    F16,
    /// Two bytes, eight significant bits, the range of f32.
    Bf16,
    /// One byte. Each token and head has one scale for its key and one for its value, so that the number with the
    /// largest magnitude is scaled to ±127 ("LLM.int8()", Dettmers et al. 2022, section 2.1, there for whole rows). A
    /// number that is not finite makes the scale NaN, and with it the whole key or value of that head, so that it does
    /// not go unnoticed. CPU only.
    Int8,
}

impl KvDtype {
    /// All types, the widest first.
    pub const ALL: [KvDtype; 4] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8];

    /// Bytes of one stored number, without its share of the scale.
    pub fn size_in_bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 | KvDtype::Bf16 => 2,
            KvDtype::Int8 => 1,
        }
    }

    /// The name in benchmarks, errors and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::Bf16 => "bf16",
            KvDtype::Int8 => "int8",
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(feature = "candle")]
impl KvDtype {
    /// The type of the tensors that hold the numbers: bytes for [`Int8`](Self::Int8).
    pub fn tensor_dtype(self) -> candle_core::DType {
        match self {
            KvDtype::F32 => candle_core::DType::F32,
            KvDtype::F16 => candle_core::DType::F16,
            KvDtype::Bf16 => candle_core::DType::BF16,
            KvDtype::Int8 => candle_core::DType::U8,
        }
    }
}

/// Converts a model's type to the type in which to store its keys and values.
#[cfg(feature = "candle")]
impl TryFrom<candle_core::DType> for KvDtype {
    type Error = crate::PoolError;

    fn try_from(dtype: candle_core::DType) -> Result<Self, Self::Error> {
        match dtype {
            candle_core::DType::F32 => Ok(KvDtype::F32),
            candle_core::DType::F16 => Ok(KvDtype::F16),
            candle_core::DType::BF16 => Ok(KvDtype::Bf16),
            _ => Err(crate::PoolError::UnsupportedDType(dtype.as_str().into())),
        }
    }
}
