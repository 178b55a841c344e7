//! Prompts in JSON: one per line, or all in one array. Each is an object, or a string if it has no `max_tokens`.

use std::fmt;

use anyhow::{Result, bail};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

use super::Prompt;
use inference::shown;

/// The prompts of a whole file.
///
/// # Errors
///
/// If the text is not JSON, or not JSON of prompts. The message has the line and column of the first error.
pub(super) fn prompts(text: &str) -> Result<Vec<Prompt>> {
    if text.trim_start().starts_with('[') {
        return read(text, 0, text.trim_end());
    }
    let mut start = 0;
    let mut prompts = Vec::new();
    for line in text.split_inclusive('\n') {
        // Without the end of the line: otherwise the error for an incomplete line would be reported in the next line.
        let content = line.trim_end();
        if !content.is_empty() {
            prompts.push(read(text, start, content)?);
        }
        start += line.len();
    }
    Ok(prompts)
}

/// Parses `json`, the part of `text` that begins at byte `start`.
fn read<'a, T: Deserialize<'a>>(text: &str, start: usize, json: &'a str) -> Result<T> {
    serde_json::from_str(json).or_else(|error| bail!(message(text, start, &error)))
}

/// The message of `error` with the line and column in `text`. The JSON that was parsed begins at byte `start` of
/// `text`.
pub(super) fn message(text: &str, start: usize, error: &serde_json::Error) -> String {
    let lines_before: usize =
        text[start..].split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    // Columns are counted in bytes, from 1; 0 is the end of the line before.
    let at = start + lines_before + error.column().saturating_sub(1);
    // The error's own line and column count from `start`, so they are replaced.
    let wrong = error.to_string();
    let own = format!(" at line {} column {}", error.line(), error.column());
    message_at(text, at, wrong.strip_suffix(&own).unwrap_or(&wrong))
}

/// The message `wrong`, with the line and column of byte `at`.
pub(super) fn message_at(text: &str, at: usize, wrong: &str) -> String {
    let before = &text[..text.floor_char_boundary(at)];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("line {line}, column {column}: {}", shown::line(wrong))
}

/// The object of a prompt.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Object {
    prompt: String,
    max_tokens: Option<Count>,
}

/// A number above 0. It is checked here, where the line is known.
struct Count(usize);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AboveZero;

        impl Visitor<'_> for AboveZero {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number above 0")
            }

            fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<Count, E> {
                let count = usize::try_from(n).ok().filter(|&n| n > 0);
                count.map(Count).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(n), &self))
            }
        }

        deserializer.deserialize_u64(AboveZero)
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a prompt: a string, or an object with `prompt` and optionally `max_tokens`")
            }

            fn visit_str<E>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::of(text))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Prompt, A::Error> {
                let Object { prompt, max_tokens } = Object::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Prompt { prompt, max_tokens: max_tokens.map(|Count(n)| n) })
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_arrays_hold_the_same_prompts() {
        let expected = [Prompt { prompt: "one\n".into(), max_tokens: Some(3) }, Prompt::of("two"), Prompt::of("thr€e")];
        let lines =
            "{\"prompt\": \"one\\n\", \"max_tokens\": 3}\r\n\n {\"prompt\": \"two\", \"max_tokens\": null}\n\"thr€e\"";
        assert_eq!(prompts(lines).unwrap(), expected);
        let array = "\n[{\"max_tokens\": 3,\n  \"prompt\": \"one\\n\"},\n \"two\", {\"prompt\": \"thr€e\"}]\n";
        assert_eq!(prompts(array).unwrap(), expected);
    }

    #[test]
    fn an_error_has_a_line_and_a_column_and_says_what_is_wrong() {
        let good = "{\"prompt\": \"ä\"}";
        let expected = "expected a prompt: a string, or an object with `prompt` and optionally `max_tokens`";
        for (line, column, wrong) in [
            ("two", 2, "expected ident"),
            ("{\"prompt\": \"ä\"", 14, "EOF while parsing an object"),
            ("{\"prompt\": \"ä\"} 5", 17, "trailing characters"),
            (
                "{\"prompt\": \"ä\", \"max_token\": 3}",
                27,
                "unknown field `max_token`, expected `prompt` or `max_tokens`",
            ),
            ("{\"prompt\": \"ä\", \"prompt\": \"b\"}", 24, "duplicate field `prompt`"),
            ("{\"max_tokens\": 3}", 17, "missing field `prompt`"),
            ("{\"prompt\": 3}", 12, "invalid type: integer `3`, expected a string"),
            ("{\"prompt\": null}", 15, "invalid type: null, expected a string"),
            (
                "{\"prompt\": \"ä\", \"max_tokens\": 0}",
                31,
                "invalid value: integer `0`, expected a whole number above 0",
            ),
            (
                "{\"prompt\": \"ä\", \"max_tokens\": -1}",
                32,
                "invalid type: integer `-1`, expected a whole number above 0",
            ),
            (
                "{\"prompt\": \"ä\", \"max_tokens\": 1.5}",
                33,
                "invalid type: floating point `1.5`, expected a whole number above 0",
            ),
            (
                "{\"prompt\": \"ä\", \"max_tokens\": \"3\"}",
                33,
                "invalid type: string \"3\", expected a whole number above 0",
            ),
            ("3", 1, &format!("invalid type: integer `3`, {expected}")),
        ] {
            let error = prompts(&format!("{good}\n\n{line}\n{good}\n")).unwrap_err();
            assert_eq!(error.to_string(), format!("line 3, column {column}: {wrong}"), "{line}");
            // The same error between two other prompts in an array.
            if !wrong.starts_with("EOF") && !wrong.starts_with("trailing") {
                let error = prompts(&format!("[{good},\n\n{line},\n{good}]\n")).unwrap_err();
                assert_eq!(error.to_string(), format!("line 3, column {column}: {wrong}"), "{line}");
            }
        }
        let error = prompts("[{\"prompt\": \"a\",\n\"max_tokens\": 0\n}]").unwrap_err().to_string();
        assert_eq!(error, "line 2, column 15: invalid value: integer `0`, expected a whole number above 0");
        assert_eq!(prompts("[\"a\",\n\"b\"\n").unwrap_err().to_string(), "line 2, column 3: EOF while parsing a list");
    }
}
