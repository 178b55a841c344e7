//! Decodes the tokens of one text as they come.

use anyhow::Result;

use super::Tokenizer;

/// Decodes the tokens of one text as they come. All pieces together are [`Tokenizer::decode`] of all tokens.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last tokens: first those whose text is known and decides how the next ones are decoded.
    ids: Vec<u32>,
    /// The number of these, and their text.
    known: usize,
    text: String,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), known: 0, text: String::new() }
    }

    /// The text that this token makes certain: never a part of a character.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.ids.push(id);
        let all = self.tokenizer.decode(&self.ids)?;
        // The next token may complete a character, or show that bytes are none.
        if all.ends_with('\u{fffd}') || self.tokenizer.is_byte(id) {
            return Ok(String::new());
        }
        let new = all.get(self.text.len()..).unwrap_or_default().to_owned();
        self.ids.drain(..self.known);
        self.known = self.ids.len();
        self.text = self.tokenizer.decode(&self.ids)?;
        Ok(new)
    }

    /// The rest of the text.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        Ok(self.tokenizer.decode(&self.ids)?.get(self.text.len()..).unwrap_or_default().to_owned())
    }
}
