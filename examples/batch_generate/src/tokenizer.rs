//! The tokenizer that a GGUF file carries in its metadata.
//!
//! Candle can build one too, but does not know `smollm` and takes the default in silence: one which
//! puts a space before every text and after every special token. Here, what is not known is refused.

use std::collections::HashSet;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Content;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper};

use crate::metadata::Metadata;
use crate::used;

/// `tokenizer.ggml.token_type` of tokens which steer the model and are no text.
const CONTROL: i64 = 3;
/// `tokenizer.ggml.token_type` of tokens which are text, but are never split or merged.
const USER_DEFINED: i64 = 4;

/// Turns text into the token ids of one model, and back.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Set only if the model wants every text to begin with it.
    bos: Option<u32>,
    ends: Vec<u32>,
    vocab_size: usize,
}

impl Tokenizer {
    /// Builds the tokenizer which `content` describes: byte-level BPE with the `smollm` or the plain
    /// GPT-2 way of splitting text into words.
    ///
    /// # Errors
    ///
    /// If the metadata is incomplete or contradicts itself, or describes another kind of tokenizer.
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let metadata = Metadata::of(content);
        let model = metadata.required("tokenizer.ggml.model", Metadata::text)?;
        ensure!(model == "gpt2", "the tokenizer model `{model}` is not supported, only `gpt2` is");
        used::check_tokenizer(&metadata)?;
        let words = words(metadata.text("tokenizer.ggml.pre")?.unwrap_or("default"))?;

        let tokens = metadata.required("tokenizer.ggml.tokens", Metadata::texts)?;
        let merges = metadata.required("tokenizer.ggml.merges", Metadata::texts)?;
        let mut inner = tokenizers::Tokenizer::new(byte_pairs(&tokens, &merges)?);
        inner.with_pre_tokenizer(Some(words));
        inner.with_decoder(Some(ByteLevel::default()));
        add_tokens(&mut inner, &metadata, &tokens)?;

        let known = |key| match metadata.id(key)? {
            Some(id) if id as usize >= tokens.len() => {
                bail!("`{key}` is {id}, but the vocabulary has only {} tokens", tokens.len())
            }
            id => Ok(id),
        };
        let eos = known("tokenizer.ggml.eos_token_id")?;
        let eot = known("tokenizer.ggml.eot_token_id")?;
        let eom = known("tokenizer.ggml.eom_token_id")?;
        let bos = known("tokenizer.ggml.bos_token_id")?;
        let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?;

        Ok(Self {
            inner,
            bos: bos.filter(|_| add_bos == Some(true)),
            ends: [eos, eot, eom].into_iter().flatten().collect(),
            vocab_size: tokens.len(),
        })
    }

    /// The token ids of `text`, in which the names of special tokens stand for those tokens.
    ///
    /// Nothing is added, except a missing begin-of-text token where the model file asks for one.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| anyhow::anyhow!("cannot tokenize the text: {error}"))?;
        let ids = encoding.get_ids();
        let bos = self.bos.filter(|bos| ids.first() != Some(bos));
        Ok(bos.into_iter().chain(ids.iter().copied()).collect())
    }

    /// The text of `ids`, without special tokens.
    ///
    /// A character of which only some bytes are there becomes the replacement character.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| anyhow::anyhow!("cannot turn the tokens into text: {error}"))
    }

    /// Whether the model says with token `id` that it has finished.
    #[must_use]
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// The number of tokens: every id is smaller.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

/// How text is cut into the words within which tokens are merged.
fn words(pre: &str) -> Result<PreTokenizerWrapper> {
    let gpt2 = ByteLevel::default().add_prefix_space(false);
    match pre {
        "smollm" => Ok(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into()),
        "gpt-2" | "default" => Ok(gpt2.into()),
        other => bail!(
            "the tokenizer's `pre` is `{other}`, which is not supported, \
             only `smollm`, `gpt-2` and `default` are"
        ),
    }
}

fn byte_pairs(tokens: &[&str], merges: &[&str]) -> Result<BPE> {
    let known: HashSet<&str> = tokens.iter().copied().collect();
    let merges = merges
        .iter()
        .map(|merge| {
            merge
                .split_once(' ')
                // The builder trusts its input so far as to panic over some unknown results.
                .filter(|(left, right)| {
                    known.contains(left) && known.contains(right) && known.contains(format!("{left}{right}").as_str())
                })
                .map(|(left, right)| (left.to_owned(), right.to_owned()))
                .with_context(|| {
                    format!("the merge `{merge}` in the model file is not of two known tokens into a third")
                })
        })
        .collect::<Result<Vec<_>>>()?;
    let vocab: Vocab = tokens.iter().map(|&token| token.to_owned()).zip(0..).collect();
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .build()
        .map_err(|error| anyhow::anyhow!("the model file has a broken vocabulary: {error}"))
}

/// Takes the tokens that must be found whole in the text, before it is cut into words.
fn add_tokens(inner: &mut tokenizers::Tokenizer, metadata: &Metadata<'_>, tokens: &[&str]) -> Result<()> {
    let Some(kinds) = metadata.integers("tokenizer.ggml.token_type")? else {
        return Ok(());
    };
    ensure!(kinds.len() == tokens.len(), "the model file has {} tokens, but {} token types", tokens.len(), kinds.len());
    let of_kind = |wanted, special| {
        tokens
            .iter()
            .zip(&kinds)
            .filter(move |&(_, &kind)| kind == wanted)
            .map(move |(&token, _)| AddedToken::from(token, special).normalized(false))
    };
    inner
        .add_special_tokens(of_kind(CONTROL, true))
        .and_then(|_| inner.add_tokens(of_kind(USER_DEFINED, false)))
        .map_err(|error| anyhow::anyhow!("the model file has a broken special token: {error}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use candle_core::quantized::gguf_file::Value;

    use super::*;
    use crate::chat::ChatTemplate;
    use crate::metadata::tests::content;
    use crate::model_file;

    fn text(value: &str) -> Value {
        Value::String(value.to_owned())
    }

    fn texts(values: &[&str]) -> Value {
        Value::Array(values.iter().copied().map(text).collect())
    }

    /// Begin and end, then letters, a space, digits, the two bytes of `é`, and what they merge into.
    const TOKENS: [&str; 14] = ["<s>", "</s>", "<tab>", "a", "b", "Ġ", "1", "2", "Ã", "©", "ab", "Ġab", "12", "Ã©"];

    fn small(pre: &str) -> Content {
        let mut kinds = [1; TOKENS.len()];
        kinds[..3].copy_from_slice(&[3, 3, 4]);
        content([
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text(pre)),
            ("tokenizer.ggml.tokens", texts(&TOKENS)),
            ("tokenizer.ggml.merges", texts(&["a b", "Ġ ab", "1 2", "Ã ©"])),
            ("tokenizer.ggml.token_type", Value::Array(kinds.map(Value::I32).to_vec())),
            ("tokenizer.ggml.bos_token_id", Value::U32(0)),
            ("tokenizer.ggml.eos_token_id", Value::U32(1)),
        ])
    }

    /// What is wrong with the small model once `key` is `value`, or gone.
    fn complaint(key: &str, value: Option<Value>) -> String {
        let mut content = small("smollm");
        match value {
            Some(value) => content.metadata.insert(key.to_owned(), value),
            None => content.metadata.remove(key),
        };
        Tokenizer::from_gguf(&content).expect_err("the metadata is wrong").to_string()
    }

    #[test]
    fn smollm_takes_digits_one_by_one() -> Result<()> {
        let tokenizer = Tokenizer::from_gguf(&small("smollm"))?;
        assert_eq!(tokenizer.encode("ab ab12 1é")?, [10, 11, 6, 7, 5, 6, 13]);
        assert_eq!(tokenizer.vocab_size(), TOKENS.len());
        Ok(())
    }

    #[test]
    fn plain_gpt2_takes_digits_together() -> Result<()> {
        for pre in ["gpt-2", "default"] {
            let tokenizer = Tokenizer::from_gguf(&small(pre))?;
            assert_eq!(tokenizer.encode("ab ab12 1é")?, [10, 11, 12, 5, 6, 13]);
        }
        Ok(())
    }

    #[test]
    fn special_tokens_are_found_in_text_and_left_out_of_it() -> Result<()> {
        let tokenizer = Tokenizer::from_gguf(&small("smollm"))?;
        let ids = tokenizer.encode("<s>ab<tab></s> <s")?;
        assert_eq!(ids, [0, 10, 2, 1, 5]);
        assert_eq!(tokenizer.decode(&ids)?, "ab<tab> ");
        Ok(())
    }

    #[test]
    fn half_a_character_is_replaced() -> Result<()> {
        let tokenizer = Tokenizer::from_gguf(&small("smollm"))?;
        assert_eq!(tokenizer.decode(&[3, 8])?, "a\u{fffd}");
        assert_eq!(tokenizer.decode(&[3, 8, 9])?, "aé");
        Ok(())
    }

    #[test]
    fn a_text_ends_at_either_end_token() -> Result<()> {
        let mut content = small("smollm");
        let ends = |content: &Content| -> Result<Vec<u32>> {
            let tokenizer = Tokenizer::from_gguf(content)?;
            Ok((0..20).filter(|&id| tokenizer.is_end(id)).collect())
        };
        assert_eq!(ends(&content)?, [1]);
        content.metadata.insert("tokenizer.ggml.eot_token_id".to_owned(), Value::U8(2));
        assert_eq!(ends(&content)?, [1, 2]);
        Ok(())
    }

    #[test]
    fn a_text_begins_once_if_the_model_asks_for_it() -> Result<()> {
        let mut content = small("smollm");
        content.metadata.insert("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(true));
        let tokenizer = Tokenizer::from_gguf(&content)?;
        assert_eq!(tokenizer.encode("ab")?, [0, 10]);
        assert_eq!(tokenizer.encode("<s>ab")?, [0, 10]);
        Ok(())
    }

    #[test]
    fn other_tokenizers_are_refused_by_name() {
        assert_eq!(
            complaint("tokenizer.ggml.model", Some(text("llama"))),
            "the tokenizer model `llama` is not supported, only `gpt2` is"
        );
        assert_eq!(
            complaint("tokenizer.ggml.pre", Some(text("qwen2"))),
            "the tokenizer's `pre` is `qwen2`, which is not supported, only `smollm`, `gpt-2` and `default` are"
        );
    }

    #[test]
    fn broken_metadata_is_an_error() {
        for key in ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
            assert_eq!(complaint(key, None), format!("the model file has no `{key}`"));
        }
        assert_eq!(
            complaint("tokenizer.ggml.tokens", Some(Value::Array(vec![text("a"), Value::U32(1)]))),
            "`tokenizer.ggml.tokens` in the model file is not a list of texts"
        );
        assert_eq!(
            complaint("tokenizer.ggml.token_type", Some(Value::Array(vec![Value::I32(1)]))),
            "the model file has 14 tokens, but 1 token types"
        );
        assert_eq!(
            complaint("tokenizer.ggml.eos_token_id", Some(Value::I32(-1))),
            "`tokenizer.ggml.eos_token_id` in the model file is not a token id"
        );
        assert_eq!(
            complaint("tokenizer.ggml.eos_token_id", Some(Value::U32(14))),
            "`tokenizer.ggml.eos_token_id` is 14, but the vocabulary has only 14 tokens"
        );
        for merge in ["ab", "a x", "</s> </s>"] {
            assert_eq!(
                complaint("tokenizer.ggml.merges", Some(texts(&[merge]))),
                format!("the merge `{merge}` in the model file is not of two known tokens into a third")
            );
        }
    }

    /// Texts and their tokens after llama.cpp, for SmolLM2.
    #[rustfmt::skip]
    const GOLDEN: &[(&str, &[u32])] = &[
        ("Hello, world!", &[19556, 28, 905, 17]),
        ("I'm you're they've it'll he'd she's can't don't o'clock", &[57, 5248, 346, 2316, 502, 3543, 357, 3060, 384, 6737, 1041, 506, 416, 982, 1326, 982, 263, 23, 17466]),
        ("x1y2z3", &[104, 33, 105, 34, 106, 35]),
        ("2024-11-24T07:31:00Z", &[34, 32, 34, 36, 29, 33, 33, 29, 34, 36, 68, 32, 39, 42, 35, 33, 42, 32, 32, 74]),
        ("½ ¾ Ⅷ ² ³ ①②③ ੩", &[16738, 216, 43124, 216, 173, 223, 117, 216, 19133, 216, 39050, 216, 173, 235, 250, 173, 235, 111, 173, 235, 112, 216, 171, 119, 119]),
        ("٠١٢٣ १२३ 一二三 １２３", &[164, 250, 164, 111, 164, 112, 164, 113, 216, 9310, 117, 9310, 118, 9310, 119, 216, 22924, 16736, 230, 7906, 227, 216, 8083, 235, 8083, 236, 8083, 237]),
        ("   \n   \n x   ", &[333, 472, 198, 1792, 333]),
        ("a\n\n  b", &[81, 8866, 278]),
        ("\t\t x", &[1656, 1792]),
        ("\u{a0}nbsp\u{a0}", &[15442, 94, 32093, 15442]),
        ("Grüße aus München, straße, ẞ", &[27302, 7170, 34878, 85, 253, 376, 30919, 94, 7554, 28, 4040, 34878, 85, 28, 15822, 135, 248]),
        ("nai\u{308}ve cafe\u{301}", &[40143, 151, 226, 307, 1020, 4565, 151, 219]),
        ("Привет, мир! Как дела?", &[155, 249, 46879, 16464, 32547, 28, 41337, 7872, 9175, 17, 5470, 244, 6511, 13760, 33427, 42292, 6511, 47]),
        ("漢字123漢字", &[177, 137, 112, 36518, 33, 34, 35, 177, 137, 112, 36518]),
        ("👨\u{200d}👩\u{200d}👧\u{200d}👦 family", &[10813, 235, 118, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 321, 231, 10813, 235, 116, 1564]),
        ("a😀b 😀 c", &[81, 10813, 242, 218, 82, 40303, 218, 265]),
        ("def f(x):\n    return x**2  # square\n", &[1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 5222, 198]),
        ("C:\\Users\\name\\file.txt", &[51, 19199, 29200, 76, 1245, 76, 2153, 30, 9047]),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", &[1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]),
        ("<|im_end|>1<|im_end|> 2", &[2, 33, 2, 216, 34]),
        ("< |im_end|>", &[44, 2504, 306, 79, 486, 108, 46]),
        ("", &[]),
    ];

    #[test]
    fn smollm2_gets_the_tokens_that_it_was_trained_on() -> Result<()> {
        let Some(path) = model_file::for_test()? else { return Ok(()) };
        let content = Content::read(&mut File::open(path)?)?;
        let tokenizer = Tokenizer::from_gguf(&content)?;
        for &(text, ids) in GOLDEN {
            assert_eq!(tokenizer.encode(text)?, ids, "{text:?}");
            if !text.contains("<|im_") {
                assert_eq!(tokenizer.decode(ids)?, text);
            }
        }
        assert_eq!(tokenizer.vocab_size(), 49_152);
        assert!(tokenizer.is_end(2) && !tokenizer.is_end(1));
        assert_eq!(
            ChatTemplate::from_gguf(&content)?.render_user("Hi", Some("Be brief."))?,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        Ok(())
    }
}
