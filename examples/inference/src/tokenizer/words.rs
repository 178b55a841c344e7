//! How byte-level tokenizers split text into words, by `tokenizer.ggml.pre`. Tokens are merged within a word only. Old
//! files do not have the key, and others have `default` where their converter did not know: what they need is not known.

use anyhow::{Context, Result};
use tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;

use crate::shown::line;

/// How a tokenizer prepares text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words {
    pre: &'static str,
    rule: Rule,
    /// A word that is a token is that token, whatever merges would make of it.
    pub(super) ignore_merges: bool,
    /// The begin-of-text token is added if the file does not say.
    pub(super) adds_bos: bool,
    /// Text is composed first (Unicode, annex 15: NFC), as it was for training.
    pub(super) composes: bool,
}

#[derive(Debug, Clone, Copy)]
enum Rule {
    Gpt2,
    /// As GPT-2, with each digit a word.
    Gpt2Digits,
    /// A regular expression each of whose matches is a word.
    Matches(&'static str),
}

/// Words with an optional mark before them; numbers of up to three digits.
const LLAMA3: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*\
                      |\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
/// The same with each digit a word.
const QWEN2: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*\
                     |\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
/// Words end where capital letters begin.
const TEKKEN: &str = "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+\
                      |[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*\
                      |\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
/// The same, with contractions at the end of words and numbers of up to three digits.
const GPT4O: &str = "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?\
     |[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?\
     |\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

const GPT2: Words = Words { pre: "gpt-2", rule: Rule::Gpt2, ignore_merges: false, adds_bos: false, composes: false };
const LLAMA_BPE: Words =
    Words { pre: "llama-bpe", rule: Rule::Matches(LLAMA3), ignore_merges: true, adds_bos: true, ..GPT2 };
const DBRX: Words = Words { pre: "dbrx", rule: Rule::Matches(LLAMA3), ..GPT2 };
const QWEN: Words = Words { pre: "qwen2", rule: Rule::Matches(QWEN2), composes: true, ..GPT2 };

static WORDS: [Words; 13] = [
    GPT2,
    Words { pre: "smollm", rule: Rule::Gpt2Digits, ..GPT2 },
    LLAMA_BPE,
    Words { pre: "llama3", ..LLAMA_BPE },
    Words { pre: "llama-v3", ..LLAMA_BPE },
    Words { pre: "falcon3", ..LLAMA_BPE },
    Words { pre: "pixtral", ..LLAMA_BPE },
    // Mistral Nemo, Small.
    Words { pre: "tekken", rule: Rule::Matches(TEKKEN), ..LLAMA_BPE },
    QWEN,
    // Its tokenizer has Qwen's tokens and leaves the text as it is.
    Words { pre: "deepseek-r1-qwen", composes: false, ..QWEN },
    // Phi-4.
    DBRX,
    Words { pre: "smaug-bpe", ..DBRX },
    // Phi-4-mini.
    Words { pre: "gpt-4o", rule: Rule::Matches(GPT4O), ..GPT2 },
];

impl Words {
    /// The entry of the table.
    ///
    /// # Errors
    ///
    /// If there is none of this name.
    pub(super) fn of(pre: &str) -> Result<&'static Self> {
        WORDS.iter().find(|words| words.pre == pre).with_context(|| {
            let names = WORDS.each_ref().map(|words| format!("`{}`", words.pre)).join(", ");
            format!("the tokenizer's `pre` is `{}`, which is not supported, only {names} are", line(pre))
        })
    }

    /// The pre-tokenizer of the library.
    ///
    /// # Errors
    ///
    /// If a regular expression of the table is wrong.
    pub(super) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper> {
        let gpt2 = ByteLevel::default().add_prefix_space(false);
        Ok(match self.rule {
            Rule::Gpt2 => gpt2.into(),
            Rule::Gpt2Digits => Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into(),
            Rule::Matches(pattern) => {
                let pattern = SplitPattern::Regex(pattern.to_owned());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
                let split = split.map_err(|error| anyhow::anyhow!("`{}` cannot split text: {error}", self.pre))?;
                Sequence::new(vec![split.into(), gpt2.use_regex(false).into()]).into()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_a_pre_tokenizer() {
        for words in &WORDS {
            assert!(words.pre_tokenizer().is_ok(), "{words:?}");
        }
    }
}
