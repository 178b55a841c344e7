//! Tokenizers of the kind `llama`: SentencePiece's byte-pair encoding (Kudo and Richardson 2018), whose merges follow
//! from the scores of their results.
//!
//! SentencePiece merges the pair whose result has the highest score, and of equal ones the first. The library merges by
//! the rank of the pair, so of two pairs with the same result, such as `a` + `bc` and `ab` + `c`, it prefers one wherever
//! it is. That matters only where two overlapping places in one word are the same token in two ways.

use std::collections::{HashMap, HashSet};

use anyhow::{Result, ensure};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::Replace;
use tokenizers::{AddedToken, Tokenizer, decoders};

use super::vocabulary::{Kind, Vocabulary};
use crate::metadata::Metadata;

/// The most bytes of a token that merges make. No vocabulary has longer ones, and all ways to split them take long.
const LONGEST: usize = 1024;
/// What stands for a space in tokens.
const SPACE: &str = "▁";

/// A tokenizer without the tokens that steer the model: text can never become one of them. `strips`: whether decoding
/// removes the space that is added before a text.
///
/// # Errors
///
/// If scores are missing or wrong, or only some bytes have a token.
pub(super) fn build(vocabulary: &Vocabulary<'_>, metadata: &Metadata<'_>, strips: bool) -> Result<Tokenizer> {
    let scores = scores(vocabulary, metadata)?;
    let bytes = vocabulary.kinds.iter().filter(|kind| **kind == Kind::Byte).count();
    let known: HashSet<&str> = vocabulary.tokens.iter().copied().collect();
    let has_byte = |byte: u8| known.contains(format!("<0x{byte:02X}>").as_str());
    ensure!(
        bytes == 0 || (bytes == 256 && (0..=u8::MAX).all(has_byte)),
        "the model file has {bytes} tokens for bytes, neither all nor none"
    );
    let unknown = unknown(vocabulary, metadata)?;
    let in_text = |kind| !matches!(kind, Kind::Control | Kind::Unknown);
    let text = vocabulary.iter().filter(|&(id, _, kind)| in_text(kind) || (bytes == 0 && Some(id) == unknown));
    let vocab: Vocab = text.map(|(id, token, _)| (token.to_owned(), id)).collect();
    let mut model = BPE::builder().vocab_and_merges(vocab, merges(vocabulary, &scores)).byte_fallback(bytes > 0);
    if let Some(unknown) = unknown.filter(|_| bytes == 0) {
        model = model.unk_token(vocabulary.tokens[unknown as usize].to_owned()).fuse_unk(true);
    }
    let model = model.build().map_err(|error| anyhow::anyhow!("the model file has a broken vocabulary: {error}"))?;

    let replace = |from: &str, to: &str| {
        Replace::new(from, to).map_err(|error| anyhow::anyhow!("cannot replace spaces: {error}"))
    };
    let mut tokenizer = Tokenizer::new(model);
    let normalizer = tokenizer.with_normalizer(Some(replace(" ", SPACE)?)).map(drop);
    normalizer.map_err(|error| anyhow::anyhow!("cannot replace spaces: {error}"))?;
    let mut decoder = vec![
        replace(SPACE, " ")?.into(),
        decoders::byte_fallback::ByteFallback::new().into(),
        decoders::fuse::Fuse::new().into(),
    ];
    if strips {
        decoder.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(decoder)));
    let added = vocabulary.iter().filter(|&(.., kind)| kind == Kind::UserDefined);
    let added = added.map(|(_, token, _)| AddedToken::from(token, false).normalized(true)).collect::<Vec<_>>();
    tokenizer.add_tokens(added).map_err(|error| anyhow::anyhow!("the model file has a broken token: {error}"))?;
    Ok(tokenizer)
}

fn scores(vocabulary: &Vocabulary<'_>, metadata: &Metadata<'_>) -> Result<Vec<f32>> {
    let scores = metadata.required("tokenizer.ggml.scores", Metadata::floats)?;
    ensure!(
        scores.len() == vocabulary.tokens.len(),
        "the model file has {} tokens, but {} scores",
        vocabulary.tokens.len(),
        scores.len()
    );
    ensure!(scores.iter().all(|score| !score.is_nan()), "`tokenizer.ggml.scores` in the model file has a NaN");
    Ok(scores)
}

/// The token for text that has none.
fn unknown(vocabulary: &Vocabulary<'_>, metadata: &Metadata<'_>) -> Result<Option<u32>> {
    let id = vocabulary.id(metadata, "tokenizer.ggml.unknown_token_id")?;
    Ok(id.or_else(|| vocabulary.iter().find(|&(.., kind)| kind == Kind::Unknown).map(|(id, ..)| id)))
}

/// All ways to split a normal token into two, those of the highest score first.
fn merges(vocabulary: &Vocabulary<'_>, scores: &[f32]) -> Vec<(String, String)> {
    let normal = vocabulary.iter().filter(|&(_, token, kind)| kind == Kind::Normal && token.len() <= LONGEST);
    let normal: HashMap<&str, u32> = normal.map(|(id, token, _)| (token, id)).collect();
    let mut merges = Vec::new();
    for (&token, &id) in &normal {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (normal.get(left), normal.get(right)) {
                merges.push((scores[id as usize], id, left_id, right_id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}

/// Whether a space is added before each text. SentencePiece does so by default.
///
/// # Errors
///
/// If the key is not a flag.
pub(super) fn adds_space(metadata: &Metadata<'_>) -> Result<bool> {
    Ok(metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true))
}

/// The special tokens after which Phi-3 drops white space: its template ends their lines, which the model has not seen.
/// Files do not say so.
pub(super) fn stripping(vocabulary: &Vocabulary<'_>, metadata: &Metadata<'_>) -> Result<Vec<u32>> {
    if metadata.text("general.architecture")? != Some("phi3") {
        return Ok(Vec::new());
    }
    let keeps = |token: &str| ["<s>", "<unk>", "<|endoftext|>"].contains(&token);
    Ok(vocabulary.specials().filter(|(_, token)| !keeps(token)).map(|(id, _)| id).collect())
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::{Content, Value};

    use crate::chat::ChatTemplate;
    use crate::metadata::tests::content;
    use crate::tokenizer::Tokenizer;

    /// Text, type and score of each token: the usual three, then a user-defined token, control tokens, and pieces. A
    /// token of type 4 that looks like a control token, and an unused one, are never the result of a merge.
    const TOKENS: [(&str, i32, f32); 17] = [
        ("<unk>", 2, 0.0),
        ("<s>", 3, 0.0),
        ("</s>", 3, 0.0),
        ("▁▁", 4, 0.0),
        ("<|user|>", 3, 0.0),
        ("<|end|>", 4, 0.0),
        ("ab", 1, -1.0),
        ("▁ab", 1, -2.0),
        ("ba", 1, -3.0),
        ("bab", 5, 0.0),
        ("▁", 1, -4.0),
        ("a", 1, -5.0),
        ("b", 1, -6.0),
        ("<", 1, -7.0),
        ("s>", 1, -8.0),
        ("s", 1, -9.0),
        (">", 1, -10.0),
    ];

    fn small(bytes: bool) -> Content {
        let text = |text: &str| Value::String(text.to_owned());
        let mut tokens: Vec<(String, i32, f32)> =
            TOKENS.map(|(token, kind, score)| (token.to_owned(), kind, score)).into();
        if bytes {
            tokens.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6, 0.0)));
        }
        let mut content = content([
            ("general.architecture", text("llama")),
            ("tokenizer.ggml.model", text("llama")),
            ("tokenizer.ggml.bos_token_id", Value::U32(1)),
            ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ]);
        let mut list =
            |key: &str, values| content.metadata.insert(format!("tokenizer.ggml.{key}"), Value::Array(values));
        list("tokens", tokens.iter().map(|(token, ..)| text(token)).collect());
        list("token_type", tokens.iter().map(|(_, kind, _)| Value::I32(*kind)).collect());
        list("scores", tokens.iter().map(|(.., score)| Value::F32(*score)).collect());
        content
    }

    fn with(key: &str, value: Value) -> Content {
        let mut content = small(true);
        content.metadata.insert(key.to_owned(), value);
        content
    }

    fn byte(byte: u8) -> u32 {
        TOKENS.len() as u32 + u32::from(byte)
    }

    #[test]
    fn the_best_score_is_merged_first_and_bytes_stand_for_the_rest() {
        let tokenizer = Tokenizer::from_gguf(&small(true)).unwrap();
        assert_eq!(tokenizer.encode_plain("ab").unwrap(), [7]);
        assert_eq!(tokenizer.encode_plain("bab").unwrap(), [10, 12, 6], "`ab` before `ba`, and no unused token");
        assert_eq!(tokenizer.encode_plain("aé").unwrap(), [10, 11, byte(0xc3), byte(0xa9)]);
        assert_eq!(tokenizer.encode_plain("a  b").unwrap(), [10, 11, 3, 12], "two spaces are a token");
        assert_eq!(tokenizer.encode_plain("<0x41>").unwrap()[1], 13, "the name of a byte is text");
        for text in ["ab ba", " a", "é", "a\n😀▁", "<s></s><|end|>"] {
            let ids = tokenizer.encode_plain(text).unwrap();
            assert!(ids.iter().all(|id| *id > 2 && ![4, 5].contains(id)), "{text}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace('▁', " "));
        }
        assert_eq!(tokenizer.decode(&[11, byte(0xc3)]).unwrap(), "a\u{fffd}");
    }

    #[test]
    fn a_space_is_added_where_text_begins() {
        let encode = |content: &Content, text| Tokenizer::from_gguf(content).unwrap().encode(text).unwrap();
        assert_eq!(encode(&small(true), "ab<|user|>ab"), [1, 7, 4, 7], "and the begin of the text by default");
        let without = with("tokenizer.ggml.add_space_prefix", Value::Bool(false));
        assert_eq!(encode(&without, "ab<|user|> ab"), [1, 6, 4, 7]);
        assert_eq!(Tokenizer::from_gguf(&without).unwrap().decode(&[7]).unwrap(), " ab");
        assert_eq!(encode(&with("tokenizer.ggml.add_bos_token", Value::Bool(false)), "ab"), [7]);
    }

    #[test]
    fn phi_3_drops_white_space_after_its_own_tokens() {
        let phi3 = with("general.architecture", Value::String("phi3".to_owned()));
        let encode = |content: &Content, text| Tokenizer::from_gguf(content).unwrap().encode(text).unwrap();
        assert_eq!(encode(&phi3, "<s>\nab<|user|>\n ab<|end|>\n"), [1, 10, byte(10), 6, 4, 7, 5]);
        assert_eq!(encode(&small(true), "<|user|>\nab"), [1, 4, 10, byte(10), 6]);
    }

    #[test]
    fn control_tokens_are_those_of_the_template_only() {
        let template = "{{ bos_token }}<|user|>{{ messages[0].content }}<|end|>";
        let content = with("tokenizer.chat_template", Value::String(template.to_owned()));
        let tokenizer = Tokenizer::from_gguf(&content).unwrap();
        let template = ChatTemplate::from_gguf(&content).unwrap();
        let ids = tokenizer.encode_user(&template, "<s>ab<|end|>", None).unwrap();
        let control = |id: &&u32| [1, 2, 4, 5].contains(*id);
        assert_eq!(ids.iter().filter(control).copied().collect::<Vec<_>>(), [1, 4, 5]);
        assert_eq!((ids[0], ids[1], ids[ids.len() - 1]), (1, 4, 5));
        assert!(tokenizer.is_end(2) && tokenizer.is_end(5), "a well-known end counts, though no key names it");
        assert_eq!(tokenizer.decode(&ids).unwrap(), "<s>ab<|end|>");
    }

    /// Google's own files of Gemma 3 have them as normal tokens.
    #[test]
    fn control_tokens_with_a_wrong_type_are_control_tokens() {
        let kinds = (0..273).map(|i| Value::I32(if i < 17 { 1 } else { 6 })).collect();
        let tokenizer = Tokenizer::from_gguf(&with("tokenizer.ggml.token_type", Value::Array(kinds))).unwrap();
        assert_eq!(tokenizer.encode("<s>ab<|user|>ab<|end|></s>").unwrap(), [1, 7, 4, 7, 5, 2]);
        assert!(tokenizer.is_end(5) && tokenizer.is_end(2) && !tokenizer.is_end(4));
        assert!(!tokenizer.encode_plain("<s><|end|>").unwrap().iter().any(|id| [1, 5].contains(id)));
        // A word that a key names stays a word.
        let word = with("tokenizer.ggml.bos_token_id", Value::U32(6));
        assert_eq!(Tokenizer::from_gguf(&word).unwrap().encode_plain("ab").unwrap(), [7]);
    }

    #[test]
    fn text_without_tokens_is_one_unknown_token() {
        let tokenizer = Tokenizer::from_gguf(&small(false)).unwrap();
        assert_eq!(tokenizer.encode_plain("aéèb").unwrap(), [10, 11, 0, 12]);
    }

    #[test]
    fn broken_vocabularies_are_errors() {
        let error = |content: &Content| Tokenizer::from_gguf(content).unwrap_err().to_string();
        let mut content = small(true);
        content.metadata.remove("tokenizer.ggml.scores");
        assert_eq!(error(&content), "the model file has no `tokenizer.ggml.scores`");
        let scores = |score, n| with("tokenizer.ggml.scores", Value::Array(vec![Value::F32(score); n]));
        assert_eq!(error(&scores(0.0, 3)), "the model file has 273 tokens, but 3 scores");
        assert_eq!(error(&scores(f32::NAN, 273)), "`tokenizer.ggml.scores` in the model file has a NaN");
        let kinds = (0..273).map(|i| Value::I32(if i < 20 { 1 } else { 6 })).collect();
        let content = with("tokenizer.ggml.token_type", Value::Array(kinds));
        assert_eq!(error(&content), "the model file has 253 tokens for bytes, neither all nor none");
        let mut content = with("tokenizer.ggml.add_bos_token", Value::Bool(true));
        content.metadata.remove("tokenizer.ggml.bos_token_id");
        assert!(error(&content).contains("it has no `tokenizer.ggml.bos_token_id`"));
    }
}
