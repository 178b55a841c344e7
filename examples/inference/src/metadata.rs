//! A GGUF file's metadata, read by type. Files store the same number in different integer types: all of them are read.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::{Content, Value};

/// A GGUF file's metadata, read by type. A missing key is `None`, a value of another type is an error.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metadata<'a>(&'a HashMap<String, Value>);

impl<'a> Metadata<'a> {
    pub(crate) fn of(content: &'a Content) -> Self {
        Self(&content.metadata)
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a string", text)
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.read(key, "a list of strings", |value| list(value, text))
    }

    pub(crate) fn id(&self, key: &str) -> Result<Option<u32>> {
        self.read(key, "a token id", |value| integer(value).and_then(|id| u32::try_from(id).ok()))
    }

    pub(crate) fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.read(key, "a list of integers", |value| list(value, integer))
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.read(key, "a list of numbers", |value| list(value, float))
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", |value| value.to_bool().ok())
    }

    /// A whole number, 0 or more.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a whole number, 0 or more", |value| integer(value).and_then(|n| usize::try_from(n).ok()))
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f32>> {
        self.read(key, "a number", float)
    }

    /// A number above 0.
    pub(crate) fn above_zero(&self, key: &str) -> Result<Option<f32>> {
        self.bounded(key, "above 0", |number| number > 0.0)
    }

    /// A number that is 0 or more.
    pub(crate) fn zero_or_more(&self, key: &str) -> Result<Option<f32>> {
        self.bounded(key, "0 or more", |number| number >= 0.0)
    }

    fn bounded(&self, key: &str, wanted: &str, is_good: impl Fn(f32) -> bool) -> Result<Option<f32>> {
        let number = self.float(key)?;
        if let Some(number) = number {
            ensure!(is_good(number) && number.is_finite(), "`{key}` in the model file is {number}, not {wanted}");
        }
        Ok(number)
    }

    pub(crate) fn required<T>(&self, key: &str, read: impl Fn(&Self, &str) -> Result<Option<T>>) -> Result<T> {
        read(self, key)?.with_context(|| format!("the model file has no `{key}`"))
    }

    /// The keys that begin with `prefix`, in alphabetical order, and their values. The prefix is removed from the keys.
    pub(crate) fn below(&self, prefix: &str) -> Vec<(&'a str, &'a Value)> {
        let mut below: Vec<_> =
            self.0.iter().filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value))).collect();
        below.sort_by_key(|&(key, _)| key);
        below
    }

    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key)
    }

    fn read<T>(&self, key: &str, wanted: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.0
            .get(key)
            .map(|value| convert(value).with_context(|| format!("`{key}` in the model file is not {wanted}")))
            .transpose()
    }
}

fn text(value: &Value) -> Option<&str> {
    value.to_string().ok().map(String::as_str)
}

fn list<'a, T>(value: &'a Value, item: impl Fn(&'a Value) -> Option<T>) -> Option<Vec<T>> {
    value.to_vec().ok()?.iter().map(item).collect()
}

fn float(value: &Value) -> Option<f32> {
    match *value {
        Value::F32(number) => Some(number),
        Value::F64(number) => Some(number as f32),
        _ => None,
    }
}

pub(crate) fn integer(value: &Value) -> Option<i64> {
    match *value {
        Value::U8(number) => Some(number.into()),
        Value::I8(number) => Some(number.into()),
        Value::U16(number) => Some(number.into()),
        Value::I16(number) => Some(number.into()),
        Value::U32(number) => Some(number.into()),
        Value::I32(number) => Some(number.into()),
        Value::U64(number) => i64::try_from(number).ok(),
        Value::I64(number) => Some(number),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::quantized::gguf_file::VersionedMagic;

    use super::*;

    /// The header of a GGUF file that has only metadata.
    pub(crate) fn content<const N: usize>(metadata: [(&str, Value); N]) -> Content {
        Content {
            magic: VersionedMagic::GgufV3,
            metadata: metadata.map(|(key, value)| (key.to_owned(), value)).into(),
            tensor_infos: HashMap::new(),
            tensor_data_offset: 0,
        }
    }

    #[test]
    fn numbers_of_every_type_are_read() {
        let content = content([
            ("u8", Value::U8(7)),
            ("i32", Value::I32(7)),
            ("u64", Value::U64(7)),
            ("i64", Value::I64(-7)),
            ("huge", Value::U64(u64::MAX)),
            ("f32", Value::F32(0.5)),
            ("f64", Value::F64(0.5)),
        ]);
        let metadata = Metadata::of(&content);
        for key in ["u8", "i32", "u64"] {
            assert_eq!(metadata.count(key).unwrap(), Some(7), "{key}");
        }
        for key in ["i64", "huge", "f32"] {
            let error = metadata.count(key).unwrap_err().to_string();
            assert_eq!(error, format!("`{key}` in the model file is not a whole number, 0 or more"));
        }
        assert_eq!(["f32", "f64"].map(|key| metadata.float(key).unwrap()), [Some(0.5); 2]);
        assert_eq!(metadata.float("u8").unwrap_err().to_string(), "`u8` in the model file is not a number");
        assert_eq!((metadata.count("none").unwrap(), metadata.float("none").unwrap()), (None, None));
    }
}
