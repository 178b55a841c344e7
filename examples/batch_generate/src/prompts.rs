//! The prompts.
//!
//! - `format` decides whether a file is text or JSON.
//! - `json` parses JSON, and reports errors with their line and column.

mod format;
mod json;

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

pub use format::Format;

/// A prompt, and the maximum length of its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text.
    pub prompt: String,
    /// The maximum number of tokens of the answer, at least 1. `None`: the value of `--max-tokens`.
    pub max_tokens: Option<usize>,
}

impl Prompt {
    fn of(text: &str) -> Self {
        Self { prompt: text.into(), max_tokens: None }
    }
}

const BUILT_IN: [&str; 8] = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three fruits that are red.",
    "A train leaves at 9:40 and arrives at 12:05. How long does the journey take? Explain each step.",
    "Translate into French: \"Good morning, where is the library?\"",
    "You are planning a walk in the mountains with two friends who have never done it before. The weather will be \
     cold in the morning and warm in the afternoon, the path is eleven kilometres long, and there is no shop on the \
     way. What should each of you carry in the backpack?",
    "Once upon a time, in a small village between the forest and the river, there lived a clockmaker who had never \
     repaired a clock in his life. People brought him their clocks all the same, because he told such good stories \
     while they waited that nobody minded the clocks going home as broken as they had come. One winter evening a \
     stranger knocked at the door, shook the snow from her coat, and put on the table a clock that ran backwards. \
     Continue the story.",
];

/// Eight prompts of different lengths.
pub fn built_in() -> Vec<Prompt> {
    BUILT_IN.map(Prompt::of).into()
}

/// Reads the prompts from the file `path`, or from the standard input if `path` is `-`. The file has one prompt per
/// line, or JSON lines, or one JSON array. [`Format::Auto`] decides by the file's name and content.
///
/// # Errors
///
/// If the file cannot be read, contains no prompt, or is not in the right format.
pub fn read(path: &Path, format: Format) -> Result<Vec<Prompt>> {
    let (bytes, name) = if path == Path::new("-") {
        let mut bytes = Vec::new();
        (io::stdin().read_to_end(&mut bytes).map(|_| bytes), "the standard input".to_owned())
    } else {
        (fs::read(path), path.display().to_string())
    };
    let bytes = bytes.with_context(|| format!("cannot read the prompts in {name}"))?;
    text(&bytes).and_then(|text| parse(text, format.or_by_name(path))).with_context(|| format!("the prompts in {name}"))
}

/// The bytes as text, without the byte order mark that some editors write.
fn text(bytes: &[u8]) -> Result<&str> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        bail!("this is UTF-16, only UTF-8 is read");
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
        let line = before.rsplit('\n').next().unwrap_or_default();
        let column = line.trim_start_matches(BYTE_ORDER_MARK).chars().count() + 1;
        anyhow::anyhow!("line {}, column {column}: this is not UTF-8", before.matches('\n').count() + 1)
    })?;
    Ok(text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text))
}

const BYTE_ORDER_MARK: char = '\u{feff}';

fn parse(text: &str, format: Format) -> Result<Vec<Prompt>> {
    let prompts = match format.or_by_content(text)? {
        Format::Json => json::prompts(text)?,
        _ => text.lines().map(str::trim).filter(|line| !line.is_empty()).map(Prompt::of).collect(),
    };
    ensure!(!prompts.is_empty(), "no prompt was found");
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(text: &str) -> Result<Vec<Prompt>> {
        parse(text, Format::Auto)
    }

    #[test]
    fn a_line_is_a_prompt() {
        let prompts = auto("one\n\n  two \r\n").unwrap();
        assert_eq!(prompts, [Prompt::of("one"), Prompt::of("two")]);
    }

    #[test]
    fn an_empty_file_is_refused() {
        for format in [Format::Auto, Format::Text, Format::Json] {
            for nothing in ["", " \n", "\r\n\n"] {
                assert_eq!(parse(nothing, format).unwrap_err().to_string(), "no prompt was found");
            }
        }
        assert_eq!(auto("[]").unwrap_err().to_string(), "no prompt was found");
    }

    #[test]
    fn a_byte_order_mark_is_removed() {
        assert_eq!(text("\u{feff}one".as_bytes()).unwrap(), "one");
        // Only one is removed, and only at the beginning.
        assert_eq!(text("\u{feff}\u{feff}a\u{feff}".as_bytes()).unwrap(), "\u{feff}a\u{feff}");
    }

    #[test]
    fn text_that_is_not_utf_8_is_refused_with_line_and_column() {
        let error = |bytes: &[u8]| text(bytes).unwrap_err().to_string();
        assert_eq!(error(b"one\n\xc3\xa9t\xe9\n"), "line 2, column 3: this is not UTF-8");
        assert_eq!(error(b"\xef\xbb\xbfa\xff"), "line 1, column 2: this is not UTF-8");
        assert_eq!(error(b"\xff\xfea\0"), "this is UTF-16, only UTF-8 is read");
    }
}
