//! Tokenizers of the kind `gpt2`: pairs of bytes, merged in the order of a list.

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::vocabulary::{Kind, Vocabulary};
use super::words::Words;
use crate::metadata::Metadata;
use crate::shown::line;

/// A tokenizer without the tokens that steer the model: text can never become one of them.
///
/// # Errors
///
/// If the merges are missing or wrong, or spaces are to be added.
pub(super) fn build(vocabulary: &Vocabulary<'_>, metadata: &Metadata<'_>, words: &Words) -> Result<Tokenizer> {
    let key = "tokenizer.ggml.add_space_prefix";
    ensure!(metadata.flag(key)? != Some(true), "`{key}` of the model file is true, only false is supported");
    let merges = metadata.required("tokenizer.ggml.merges", Metadata::texts)?;
    let pairs = pairs(vocabulary, &merges)?;
    let specials: HashSet<u32> = vocabulary.specials().map(|(id, _)| id).collect();
    let text = vocabulary.iter().filter(|(id, ..)| !specials.contains(id));
    let vocab: Vocab = text.map(|(id, token, _)| (token.to_owned(), id)).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, pairs)
        .ignore_merges(words.ignore_merges)
        .build()
        .map_err(|error| anyhow::anyhow!("the model file has a broken vocabulary: {error}"))?;

    let mut tokenizer = Tokenizer::new(model);
    if words.composes {
        let normalizer = tokenizer.with_normalizer(Some(NFC)).map(drop);
        normalizer.map_err(|error| anyhow::anyhow!("cannot compose text: {error}"))?;
    }
    tokenizer.with_pre_tokenizer(Some(words.pre_tokenizer()?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let added = vocabulary.iter().filter(|&(.., kind)| kind == Kind::UserDefined);
    let added = added.map(|(_, token, _)| AddedToken::from(token, false).normalized(false)).collect::<Vec<_>>();
    tokenizer.add_tokens(added).map_err(|error| anyhow::anyhow!("the model file has a broken token: {error}"))?;
    Ok(tokenizer)
}

/// The merges, as pairs. Those that have to do with tokens that steer the model are left out.
fn pairs(vocabulary: &Vocabulary<'_>, merges: &[&str]) -> Result<Vec<(String, String)>> {
    let known: HashSet<&str> = vocabulary.tokens.iter().copied().collect();
    let specials: HashSet<&str> = vocabulary.specials().map(|(_, token)| token).collect();
    let mut pairs = Vec::new();
    for merge in merges {
        let (left, right, both) = merge
            .split_once(' ')
            .map(|(left, right)| (left, right, format!("{left}{right}")))
            // The builder can panic if the result of a merge is not in the vocabulary.
            .filter(|(left, right, both)| [left, right, both.as_str()].iter().all(|token| known.contains(*token)))
            .with_context(|| {
                format!("the merge `{}` in the model file does not join two known tokens to a known token", line(merge))
            })?;
        if ![left, right, both.as_str()].iter().any(|token| specials.contains(token)) {
            pairs.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::{Content, Value};

    use crate::metadata::tests::content;
    use crate::tokenizer::Tokenizer;

    /// Letters, two control tokens that merges or words could make, and the bytes of `é`, composed or not.
    const TOKENS: [&str; 12] = ["a", "b", "ab", "ba", "aba", "<", "e", "Ì", "ģ", "Ã", "©", "Ã©"];

    fn small(pre: &str) -> Content {
        let text = |text: &str| Value::String(text.to_owned());
        let texts = |texts: &[&str]| Value::Array(texts.iter().copied().map(text).collect());
        let kinds = (0..12).map(|i| Value::I32(if [2, 4].contains(&i) { 3 } else { 1 })).collect();
        content([
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text(pre)),
            ("tokenizer.ggml.tokens", texts(&TOKENS)),
            ("tokenizer.ggml.merges", texts(&["a b", "b a", "ab a", "Ã ©"])),
            ("tokenizer.ggml.token_type", Value::Array(kinds)),
            ("tokenizer.ggml.bos_token_id", Value::U32(2)),
        ])
    }

    #[test]
    fn no_merge_and_no_word_makes_a_control_token() {
        for pre in ["gpt-2", "llama-bpe"] {
            let tokenizer = Tokenizer::from_gguf(&small(pre)).unwrap();
            assert_eq!(tokenizer.encode_plain("aba").unwrap(), [0, 3], "{pre}");
            assert_eq!(tokenizer.encode_plain("ab").unwrap(), [0, 1], "{pre}");
            assert_eq!(tokenizer.decode(&[2, 0, 4]).unwrap(), "a");
        }
    }

    #[test]
    fn models_compose_text_and_begin_it_as_they_were_trained() {
        let encode = |pre| Tokenizer::from_gguf(&small(pre)).unwrap().encode("e\u{301}").unwrap();
        assert_eq!(encode("qwen2"), [11]);
        assert_eq!(encode("deepseek-r1-qwen"), [6, 7, 8]);
        assert_eq!(encode("llama-bpe"), [2, 6, 7, 8]);
        assert_eq!(encode("dbrx"), [6, 7, 8]);
    }
}
