//! Decides whether a file of prompts is text or JSON. A file that could be either is refused.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use super::json;

/// The format of a file of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Decided by the file's name (.txt, .json, .jsonl, .ndjson), or else by its content
    Auto,
    /// One prompt per line
    Text,
    /// One JSON object or string per line, or one array of them
    Json,
}

impl Format {
    /// For `Auto`, the format that the file's name stands for, if it does; otherwise `self`.
    pub(super) fn or_by_name(self, path: &Path) -> Self {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
        match (self, extension.as_deref()) {
            (Self::Auto, Some("json" | "jsonl" | "ndjson")) => Self::Json,
            (Self::Auto, Some("txt")) => Self::Text,
            _ => self,
        }
    }

    /// For `Auto`, the format of the content; otherwise `self`.
    ///
    /// # Errors
    ///
    /// If `self` is `Auto` and the content begins like JSON, but is not JSON with prompts.
    pub(super) fn or_by_content(self, text: &str) -> Result<Self> {
        let content = text.trim_start();
        if self != Self::Auto || !content.starts_with(['{', '[']) {
            return Ok(if self == Self::Auto { Self::Text } else { self });
        }
        let skipped = text.len() - content.len();
        let wrong = if content.starts_with('{') {
            // Only the first line decides. Errors in the other lines are reported when they are parsed.
            let line = content.lines().next().unwrap_or_default();
            serde_json::from_str::<Map<String, Value>>(line).err().map(|error| json::message(text, skipped, &error))
        } else {
            match serde_json::from_str::<Vec<Value>>(content.trim_end()) {
                Ok(values) if values.iter().all(|value| value.is_object() || value.is_string()) => None,
                Ok(_) => Some(json::message_at(text, skipped, "an array, but not of objects or strings")),
                Err(error) => Some(json::message(text, skipped, &error)),
            }
        };
        match wrong {
            None => Ok(Self::Json),
            Some(wrong) => bail!("this begins like JSON, but is not: {wrong}; use --prompts-format text or json"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_decides() {
        let auto = |name: &str| Format::Auto.or_by_name(Path::new(name));
        assert_eq!(["a.json", "b.jsonl", "c/d.NDJSON"].map(auto), [Format::Json; 3]);
        assert_eq!(auto("json.txt"), Format::Text);
        assert_eq!(["-", "prompts", ".json", "a.json.bak"].map(auto), [Format::Auto; 4]);
        assert_eq!(Format::Text.or_by_name(Path::new("a.json")), Format::Text);
        assert_eq!(Format::Json.or_by_name(Path::new("a.txt")), Format::Json);
    }

    #[test]
    fn without_a_known_extension_the_content_decides() {
        let auto = |text| Format::Auto.or_by_content(text).unwrap();
        for text in ["", "one", "\"one\"", "1", "say {this}", "a\n{\"prompt\": \"b\"}"] {
            assert_eq!(auto(text), Format::Text, "{text}");
        }
        let json = ["{\"prompt\": \"a\"}", "\n  {}\nb", "[]", " [\"a\",\n\"b\"]\n", "[\n{\"prompt\": \"a\"}\n]\n"];
        for text in json {
            assert_eq!(auto(text), Format::Json, "{text}");
        }
        // A given format is not checked against the content.
        assert_eq!(Format::Text.or_by_content("{}").unwrap(), Format::Text);
        assert_eq!(Format::Json.or_by_content("a").unwrap(), Format::Json);
    }

    #[test]
    fn what_only_begins_like_json_is_refused() {
        let error = |text| Format::Auto.or_by_content(text).unwrap_err().to_string();
        let said = |wrong| format!("this begins like JSON, but is not: {wrong}; use --prompts-format text or json");
        assert_eq!(error("\n  {name}, who are you?\nb"), said("line 2, column 4: key must be a string"));
        assert_eq!(error("[Scene: a beach]"), said("line 1, column 2: expected value"));
        assert_eq!(error("[\"a\"]\nb"), said("line 2, column 1: trailing characters"));
        assert_eq!(error("\n [1, 2]"), said("line 2, column 2: an array, but not of objects or strings"));
        assert_eq!(error("{\n\"prompt\": \"a\"}"), said("line 1, column 1: EOF while parsing an object"));
        assert_eq!(error("[\"a\",\n"), said("line 1, column 5: EOF while parsing a value"));
    }
}
