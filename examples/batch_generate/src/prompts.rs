//! The questions.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// A question, and how long its answer may be.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// The question.
    pub prompt: String,
    /// Tokens of the answer, at most; the command line's number unless given.
    pub max_tokens: Option<usize>,
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
    BUILT_IN.iter().map(|&prompt| Prompt { prompt: prompt.into(), max_tokens: None }).collect()
}

/// Reads a prompt from each line: plain text, or JSON lines if the first of them is a JSON object.
///
/// # Errors
///
/// If the file cannot be read, holds no prompt, or a line is not what the first one promises.
pub fn read(path: &Path) -> Result<Vec<Prompt>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the prompts in {}", path.display()))?;
    parse(&text).with_context(|| format!("the prompts in {}", path.display()))
}

fn parse(text: &str) -> Result<Vec<Prompt>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let json = lines.clone().next().is_some_and(|(_, line)| line.trim_start().starts_with('{'));
    let prompts = lines
        .map(|(i, line)| {
            if json {
                serde_json::from_str(line).with_context(|| format!("line {} is not a prompt", i + 1))
            } else {
                Ok(Prompt { prompt: line.trim().into(), max_tokens: None })
            }
        })
        .collect::<Result<Vec<_>>>()?;
    ensure!(!prompts.is_empty(), "there is none");
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_prompt() {
        let prompts = parse("one\n\n  two \n").unwrap();
        assert_eq!(prompts.iter().map(|p| p.prompt.as_str()).collect::<Vec<_>>(), ["one", "two"]);
    }

    #[test]
    fn json_lines_have_their_own_length() {
        let prompts = parse("{\"prompt\": \"one\", \"max_tokens\": 3}\n{\"prompt\": \"two\"}").unwrap();
        assert_eq!(prompts[0], Prompt { prompt: "one".into(), max_tokens: Some(3) });
        assert_eq!(prompts[1].max_tokens, None);
    }

    #[test]
    fn wrong_lines_are_named() {
        let error = parse("{\"prompt\": \"one\"}\ntwo").unwrap_err();
        assert_eq!(error.to_string(), "line 2 is not a prompt");
        assert!(parse("{\"prompt\": \"one\", \"max_token\": 3}").is_err());
        assert_eq!(parse(" \n").unwrap_err().to_string(), "there is none");
    }
}
