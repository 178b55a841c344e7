//! Is a file of prompts text or JSON? Never guessed in silence where it could be either.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use super::json;

/// What a file of prompts is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// By the file's name (.txt, .json, .jsonl, .ndjson), or else by its content
    Auto,
    /// A prompt a line
    Text,
    /// A JSON object or string a line, or one array of them
    Json,
}

impl Format {
    /// What the name of the file says, if it is asked and says something.
    pub(super) fn or_by_name(self, path: &Path) -> Self {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
        match (self, extension.as_deref()) {
            (Self::Auto, Some("json" | "jsonl" | "ndjson")) => Self::Json,
            (Self::Auto, Some("txt")) => Self::Text,
            _ => self,
        }
    }

    /// What the content says, if it is asked.
    ///
    /// # Errors
    ///
    /// If the content begins as JSON does, but is not.
    pub(super) fn or_by_content(self, text: &str) -> Result<Self> {
        let content = text.trim_start();
        if self != Self::Auto || !content.starts_with(['{', '[']) {
            return Ok(if self == Self::Auto { Self::Text } else { self });
        }
        let skipped = text.len() - content.len();
        let wrong = if content.starts_with('{') {
            // Whether the other lines are right is another question: here it is what they should be.
            let line = content.lines().next().unwrap_or_default();
            serde_json::from_str::<Map<String, Value>>(line).err().map(|error| json::place(text, skipped, &error))
        } else {
            match serde_json::from_str::<Vec<Value>>(content.trim_end()) {
                Ok(values) if values.iter().all(|value| value.is_object() || value.is_string()) => None,
                Ok(_) => Some(json::place_of(text, skipped, "an array, but not of objects or strings")),
                Err(error) => Some(json::place(text, skipped, &error)),
            }
        };
        match wrong {
            None => Ok(Self::Json),
            Some(wrong) => bail!("this begins like JSON, but is not: {wrong}; say --prompts-format text or json"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_the_file_is() {
        let auto = |name: &str| Format::Auto.or_by_name(Path::new(name));
        assert_eq!(["a.json", "b.jsonl", "c/d.NDJSON"].map(auto), [Format::Json; 3]);
        assert_eq!(auto("json.txt"), Format::Text);
        assert_eq!(["-", "prompts", ".json", "a.json.bak"].map(auto), [Format::Auto; 4]);
        assert_eq!(Format::Text.or_by_name(Path::new("a.json")), Format::Text);
        assert_eq!(Format::Json.or_by_name(Path::new("a.txt")), Format::Json);
    }

    #[test]
    fn without_a_name_the_content_says_it() {
        let auto = |text| Format::Auto.or_by_content(text).unwrap();
        for text in ["", "one", "\"one\"", "1", "say {this}", "a\n{\"prompt\": \"b\"}"] {
            assert_eq!(auto(text), Format::Text, "{text}");
        }
        let json = ["{\"prompt\": \"a\"}", "\n  {}\nb", "[]", " [\"a\",\n\"b\"]\n", "[\n{\"prompt\": \"a\"}\n]\n"];
        for text in json {
            assert_eq!(auto(text), Format::Json, "{text}");
        }
        // Said, it is not asked.
        assert_eq!(Format::Text.or_by_content("{}").unwrap(), Format::Text);
        assert_eq!(Format::Json.or_by_content("a").unwrap(), Format::Json);
    }

    #[test]
    fn what_only_begins_like_json_is_refused() {
        let error = |text| Format::Auto.or_by_content(text).unwrap_err().to_string();
        let said = |wrong| format!("this begins like JSON, but is not: {wrong}; say --prompts-format text or json");
        assert_eq!(error("\n  {name}, who are you?\nb"), said("line 2, column 4: key must be a string"));
        assert_eq!(error("[Scene: a beach]"), said("line 1, column 2: expected value"));
        assert_eq!(error("[\"a\"]\nb"), said("line 2, column 1: trailing characters"));
        assert_eq!(error("\n [1, 2]"), said("line 2, column 2: an array, but not of objects or strings"));
        assert_eq!(error("{\n\"prompt\": \"a\"}"), said("line 1, column 1: EOF while parsing an object"));
        assert_eq!(error("[\"a\",\n"), said("line 1, column 5: EOF while parsing a value"));
    }
}
