//! Checks the header of a GGUF file before candle reads it. Candle divides by the alignment in the file, of several keys
//! or tensors with the same name it keeps the last one, and of a type that it does not know it says only a number.

use std::collections::HashSet;
use std::io::{BufRead, Seek, SeekFrom};

use anyhow::{Result, bail};

use crate::shown::line;

/// The longest name: the format's own limit.
const LONGEST_NAME: u64 = 1 << 16;
/// The deepest nesting of lists, the same as in candle.
const DEEPEST: usize = 64;

/// Checks the header, and seeks back to its beginning. A header that cannot be parsed is not an error here: candle will
/// report what is wrong with it.
///
/// # Errors
///
/// If the alignment is not a power of two, two keys or two tensors have the same name, or a tensor has a type that candle
/// does not read.
pub(crate) fn check(reader: &mut (impl BufRead + Seek)) -> Result<()> {
    let wrong = Header { reader, wide: true }.wrong();
    reader.seek(SeekFrom::Start(0))?;
    match wrong {
        Some(wrong) => bail!("the model file {wrong}"),
        None => Ok(()),
    }
}

/// Types of numbers that files have and candle does not read, by their ids. It would say that the file is damaged.
const UNREADABLE: [(u32, &str); 18] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

struct Header<'a, R> {
    reader: &'a mut R,
    /// Whether lengths have 64 bits.
    wide: bool,
}

impl<R: BufRead + Seek> Header<'_, R> {
    /// What is wrong with the header. `None` if it is valid, and also if it is truncated or cannot be parsed.
    fn wrong(&mut self) -> Option<String> {
        self.skip(4)?; // the magic
        self.wide = self.u32()? > 1; // the version
        let (tensors, keys) = (self.length()?, self.length()?);
        let mut seen = HashSet::new();
        for _ in 0..keys {
            let key = self.name()?;
            let kind = self.u32()?;
            if key == "general.alignment" {
                // The format requires a u32.
                let alignment = if kind == 4 { self.u32()? } else { 0 };
                if !alignment.is_power_of_two() {
                    return Some("has a `general.alignment` which is not a power of two".to_owned());
                }
            } else {
                self.skip_value(kind, 0)?;
            }
            if seen.contains(&key) {
                return Some(format!("has two keys `{}`", line(&key)));
            }
            seen.insert(key);
        }
        seen.clear();
        for _ in 0..tensors {
            let name = self.name()?;
            let dims = u64::from(self.u32()?);
            self.skip(dims * if self.wide { 8 } else { 4 })?;
            let dtype = self.u32()?;
            let offset = 8;
            self.skip(offset)?;
            if let Some((_, dtype)) = UNREADABLE.iter().find(|(id, _)| *id == dtype) {
                return Some(format!(
                    "has the tensor `{}` in the type {dtype}, which candle does not read",
                    line(&name)
                ));
            }
            if seen.contains(&name) {
                return Some(format!("has two tensors `{}`", line(&name)));
            }
            seen.insert(name);
        }
        None
    }

    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn length(&mut self) -> Option<u64> {
        if self.wide { self.bytes().map(u64::from_le_bytes) } else { self.u32().map(u64::from) }
    }

    fn name(&mut self) -> Option<String> {
        let length = self.length().filter(|&length| length <= LONGEST_NAME)?;
        let mut name = vec![0; length as usize];
        self.reader.read_exact(&mut name).ok()?;
        Some(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned())
    }

    /// Skips bytes. If that goes beyond the end of the file, the next read fails.
    fn skip(&mut self, bytes: u64) -> Option<()> {
        self.reader.seek_relative(i64::try_from(bytes).ok()?).ok()
    }

    fn skip_value(&mut self, kind: u32, depth: usize) -> Option<()> {
        match kind {
            TEXT => {
                let length = self.length()?;
                self.skip(length)
            }
            LIST if depth < DEEPEST => {
                let (kind, n) = (self.u32()?, self.length()?);
                match size(kind) {
                    Some(size) => self.skip(n.checked_mul(size)?),
                    None => (0..n).try_for_each(|_| self.skip_value(kind, depth + 1)),
                }
            }
            _ => self.skip(size(kind)?),
        }
    }
}

const TEXT: u32 = 8;
const LIST: u32 = 9;

/// The size in bytes of a value of type `kind`; `None` if the type has no fixed size or is unknown.
fn size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use candle_core::quantized::gguf_file::{self, Content, Value};
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{DType, Device, Tensor};

    use super::*;

    fn file(metadata: &[(&str, Value)], tensors: &[&str]) -> Vec<u8> {
        let zeros = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let zeros = QTensor::quantize(&zeros, GgmlDType::F32).unwrap();
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let tensors: Vec<_> = tensors.iter().map(|name| (*name, &zeros)).collect();
        let mut bytes = Cursor::new(Vec::new());
        gguf_file::write(&mut bytes, &metadata, &tensors).unwrap();
        bytes.into_inner()
    }

    fn wrong(bytes: &[u8]) -> Option<String> {
        check(&mut Cursor::new(bytes)).err().map(|error| error.to_string())
    }

    /// One value of each type. What follows is found only if all of them are skipped correctly.
    fn all_kinds() -> Vec<(&'static str, Value)> {
        let text = |text: &str| Value::String(text.to_owned());
        vec![
            ("a", Value::U8(1)),
            ("b", Value::I8(1)),
            ("c", Value::U16(1)),
            ("d", Value::I16(1)),
            ("e", Value::U32(1)),
            ("f", Value::I32(1)),
            ("g", Value::F32(1.0)),
            ("h", Value::Bool(true)),
            ("i", text("text")),
            ("j", Value::U64(1)),
            ("k", Value::I64(1)),
            ("l", Value::F64(1.0)),
            ("m", Value::Array(vec![Value::U16(1); 3])),
            ("n", Value::Array(vec![text("one"), text("")])),
            ("o", Value::Array(vec![Value::Array(vec![Value::U8(1)]), Value::Array(vec![text("two")])])),
        ]
    }

    #[test]
    fn a_good_header_can_be_read_after_the_check() {
        let mut metadata = all_kinds();
        metadata.push(("general.alignment", Value::U32(32)));
        let mut reader = Cursor::new(file(&metadata, &["x", "y"]));
        check(&mut reader).unwrap();
        let content = Content::read(&mut reader).unwrap();
        assert_eq!((content.metadata.len(), content.tensor_infos.len()), (16, 2));
    }

    #[test]
    fn an_alignment_that_is_not_a_power_of_two_is_refused() {
        for alignment in [Value::U32(0), Value::U32(24), Value::U8(0), Value::U64(32)] {
            let mut metadata = all_kinds();
            metadata.push(("general.alignment", alignment));
            let said = "the model file has a `general.alignment` which is not a power of two";
            assert_eq!(wrong(&file(&metadata, &[])).as_deref(), Some(said));
        }
    }

    #[test]
    fn equal_names_are_refused() {
        let mut metadata = all_kinds();
        metadata.push(("a", Value::U8(2)));
        assert_eq!(wrong(&file(&metadata, &[])).as_deref(), Some("the model file has two keys `a`"));
        let bytes = file(&all_kinds(), &["x", "y", "x"]);
        assert_eq!(wrong(&bytes).as_deref(), Some("the model file has two tensors `x`"));
    }

    #[test]
    fn a_type_that_candle_does_not_read_is_named() {
        let mut bytes = file(&[], &["x"]);
        // The only tensor: its name, two dimensions, its type, its offset.
        let name = bytes.windows(9).position(|window| window == [1, 0, 0, 0, 0, 0, 0, 0, b'x']).unwrap();
        let dtype = name + 9 + 4 + 16;
        for (id, wrong) in [(23, "IQ4_XS"), (39, "MXFP4")] {
            bytes[dtype] = id;
            let said = format!("the model file has the tensor `x` in the type {wrong}, which candle does not read");
            assert_eq!(self::wrong(&bytes), Some(said));
        }
    }

    /// Changes each byte of a header, and truncates the header at each byte. The result is an error or a header, never
    /// a panic or an absurd allocation.
    #[test]
    fn damaged_headers_do_no_harm() {
        let mut metadata = all_kinds();
        metadata.push(("general.alignment", Value::U32(32)));
        let whole = file(&metadata, &["x", "y"]);
        let read = |bytes: &[u8]| {
            let mut reader = Cursor::new(bytes);
            check(&mut reader).is_ok() && Content::read(&mut reader).is_ok()
        };
        assert!(read(&whole));
        for i in 0..whole.len() {
            for change in [1u8, 0x10, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[i] ^= change;
                read(&bytes);
            }
            // Absurd lengths.
            let mut bytes = whole.clone();
            bytes[i..].iter_mut().take(8).for_each(|byte| *byte = 0x10);
            read(&bytes);
            read(&whole[..i]);
        }
    }
}
