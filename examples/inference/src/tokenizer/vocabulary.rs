//! The tokens of a file and their types.

use std::collections::HashSet;

use anyhow::{Result, bail, ensure};

use crate::metadata::Metadata;
use crate::shown::line;

/// What a token is: `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    /// For text that has no token. Like control tokens, it is not read from a user's text.
    Unknown,
    /// It steers the model and is not text.
    Control,
    /// Text that is never split or merged.
    UserDefined,
    Unused,
    /// One byte of a character that has no token.
    Byte,
}

/// The tokens of a file.
#[derive(Debug)]
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: Vec<&'a str>,
    pub(super) kinds: Vec<Kind>,
}

impl<'a> Vocabulary<'a> {
    /// Reads tokens and types. Without types, all tokens are normal.
    ///
    /// # Errors
    ///
    /// If there are no tokens, a token occurs twice, or the types do not fit them.
    pub(super) fn of(metadata: &Metadata<'a>) -> Result<Self> {
        let tokens = metadata.required("tokenizer.ggml.tokens", Metadata::texts)?;
        let mut known = HashSet::new();
        if let Some(twice) = tokens.iter().find(|token| !known.insert(**token)) {
            bail!("the model file has the token `{}` twice", line(twice));
        }
        let kinds = match metadata.integers("tokenizer.ggml.token_type")? {
            Some(kinds) => kinds,
            None => vec![1; tokens.len()],
        };
        ensure!(
            kinds.len() == tokens.len(),
            "the model file has {} tokens, but {} token types",
            tokens.len(),
            kinds.len()
        );
        let kinds = tokens.iter().zip(kinds).map(|(token, kind)| kind_of(token, kind)).collect();
        let mut vocabulary = Self { tokens, kinds };
        for key in ["bos", "eos", "eot", "eom"] {
            let id = vocabulary.id(metadata, &format!("tokenizer.ggml.{key}_token_id"))?;
            vocabulary.retype(id);
        }
        Ok(vocabulary)
    }

    /// Makes a token that a key names a control token, unless it is a word: some files name any token as the begin of a
    /// text that they never add.
    fn retype(&mut self, id: Option<u32>) {
        let Some(id) = id else { return };
        let (token, kind) = (self.tokens[id as usize], &mut self.kinds[id as usize]);
        if *kind == Kind::Normal && token.starts_with(['<', '[']) {
            *kind = Kind::Control;
        }
    }

    /// Ids, tokens and kinds.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &'a str, Kind)> {
        (0..).zip(&self.tokens).zip(&self.kinds).map(|((id, token), kind)| (id, *token, *kind))
    }

    /// The tokens that steer the model: no text of a user becomes one of them.
    pub(super) fn specials(&self) -> impl Iterator<Item = (u32, &'a str)> {
        let special = |kind| matches!(kind, Kind::Control | Kind::Unknown);
        self.iter().filter(move |&(.., kind)| special(kind)).map(|(id, token, _)| (id, token))
    }

    /// The id of a token that a key names.
    ///
    /// # Errors
    ///
    /// If the vocabulary has no such token.
    pub(super) fn id(&self, metadata: &Metadata<'_>, key: &str) -> Result<Option<u32>> {
        let id = metadata.id(key)?;
        ensure!(
            id.is_none_or(|id| (id as usize) < self.tokens.len()),
            "`{key}` is {}, but the vocabulary has only {} tokens",
            id.unwrap_or_default(),
            self.tokens.len()
        );
        Ok(id)
    }
}

fn kind_of(token: &str, kind: i64) -> Kind {
    match kind {
        2 => Kind::Unknown,
        3 => Kind::Control,
        // Files have control tokens as normal or user-defined ones by mistake, Google's own of Gemma 3 among them.
        1 | 4 if looks_like_control(token) => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        _ => Kind::Normal,
    }
}

fn looks_like_control(token: &str) -> bool {
    // What is between may not be missing: `<|>` is text.
    let between = |start: &str, end: &str| {
        token.len() > start.len() + end.len() && token.starts_with(start) && token.ends_with(end)
    };
    between("<|", "|>") || between("<｜", "｜>") || ["<start_of_turn>", "<end_of_turn>", "<EOT>"].contains(&token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_something_between_the_signs_are_those_of_control_tokens() {
        for name in ["<|user|>", "<｜User｜>", "<end_of_turn>"] {
            assert_eq!([1, 4].map(|kind| kind_of(name, kind)), [Kind::Control; 2], "{name}");
        }
        for name in ["<|>", "<||>", "<｜>", "<|", "|>", "<tab>", "<end_of_turn"] {
            assert_eq!(kind_of(name, 4), Kind::UserDefined, "{name}");
        }
    }
}
