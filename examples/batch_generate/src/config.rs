//! The dimensions and constants of a model, as read from its file and checked.

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Content;
use paged_attention::KvShape;

use crate::metadata::Metadata;
use crate::used;

/// f32 represents every whole number up to this one, so positions below it are exact.
const MOST_POSITIONS: usize = 1 << 24;

/// The dimensions and constants of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    pub(crate) layers: usize,
    pub(crate) width: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) feed_forward: usize,
    pub(crate) vocabulary: usize,
    pub(crate) context: usize,
    /// Added to the mean square in every norm.
    pub(crate) eps: f32,
    /// The base of the rotary embedding's frequencies.
    pub(crate) base: f32,
    /// Whether the embedding matrix is also the output matrix.
    pub(crate) tied: bool,
}

impl Config {
    /// Reads `content`, and checks that nothing unsupported in it changes the model's numbers.
    ///
    /// # Errors
    ///
    /// If something is missing, contradictory, impossible or not supported.
    pub fn of(content: &Content) -> Result<Self> {
        let metadata = Metadata::of(content);
        let count = |key: &str| -> Result<usize> {
            let n = metadata.required(key, Metadata::count)?;
            ensure!(n > 0, "`{key}` in the model file is 0");
            Ok(n)
        };
        let width = count("llama.embedding_length")?;
        let heads = count("llama.attention.head_count")?;
        let kv_heads = metadata.count("llama.attention.head_count_kv")?.unwrap_or(heads);
        ensure!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads) && width.is_multiple_of(heads),
            "the model file contradicts itself: width {width}, {heads} heads, {kv_heads} key heads"
        );
        let head_dim = width / heads;
        ensure!(
            head_dim.is_multiple_of(2),
            "each of the model's {heads} heads has a width of {head_dim}, which cannot be rotated in pairs"
        );
        let context = count("llama.context_length")?;
        ensure!(
            context <= MOST_POSITIONS,
            "`llama.context_length` in the model file is {context}, more than {MOST_POSITIONS}: positions would not be \
             exact"
        );
        let eps = metadata.required("llama.attention.layer_norm_rms_epsilon", Metadata::float)?;
        ensure!(
            eps >= 0.0 && eps.is_finite(),
            "`llama.attention.layer_norm_rms_epsilon` in the model file is {eps}, not 0 or more"
        );
        let base = metadata.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
        ensure!(base > 0.0 && base.is_finite(), "`llama.rope.freq_base` in the model file is {base}, not above 0");

        let config = Self {
            layers: count("llama.block_count")?,
            width,
            heads,
            kv_heads,
            head_dim,
            feed_forward: rows(content, "blk.0.ffn_gate.weight")?,
            vocabulary: rows(content, "token_embd.weight")?,
            context,
            eps,
            base,
            tied: !content.tensor_infos.contains_key("output.weight"),
        };
        let tokens = metadata.texts("tokenizer.ggml.tokens")?.map_or(config.vocabulary, |tokens| tokens.len());
        ensure!(
            tokens == config.vocabulary,
            "the tokenizer has {tokens} tokens, the model's embedding {}",
            config.vocabulary
        );
        used::check_keys(&metadata, &config)?;
        used::check_tensors(content, &config)?;
        Ok(config)
    }

    /// What the cache stores for each token: the number of layers and heads, and the size of a head.
    pub fn shape(&self) -> KvShape {
        KvShape::new(self.layers, self.kv_heads, self.head_dim)
    }

    /// The maximum number of tokens in a sequence.
    pub fn context(&self) -> usize {
        self.context
    }
}

fn rows(content: &Content, matrix: &str) -> Result<usize> {
    let info = content.tensor_infos.get(matrix).with_context(|| format!("the model file has no tensor `{matrix}`"))?;
    match *info.shape.dims() {
        [rows, _] if rows > 0 => Ok(rows),
        ref dims => bail!("the tensor `{matrix}` of the model file has the shape {dims:?}, which is not a matrix"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::quantized::GgmlDType;
    use candle_core::quantized::gguf_file::{TensorInfo, Value};

    use super::*;
    use crate::metadata::tests::content;

    pub(crate) const SMALL: Config = Config {
        layers: 2,
        width: 32,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        feed_forward: 64,
        vocabulary: 96,
        context: 256,
        eps: 1e-5,
        base: 10_000.0,
        tied: true,
    };

    /// The header of a file with the small model.
    pub(crate) fn small() -> Content {
        let mut content = content([
            ("llama.embedding_length", Value::U32(32)),
            ("llama.attention.head_count", Value::U32(4)),
            ("llama.attention.head_count_kv", Value::U32(2)),
            ("llama.block_count", Value::U32(2)),
            ("llama.context_length", Value::U32(256)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ]);
        used::tensors(&SMALL).for_each(|(name, shape)| add(&mut content, &name, &shape));
        content
    }

    pub(crate) fn add(content: &mut Content, name: &str, shape: &[usize]) {
        let info = TensorInfo { ggml_dtype: GgmlDType::F32, shape: shape.into(), offset: 0 };
        content.tensor_infos.insert(name.to_owned(), info);
    }

    /// The error for the small model after `key` is set to `value`.
    pub(crate) fn complaint(key: &str, value: Value) -> String {
        let mut content = small();
        content.metadata.insert(key.to_owned(), value);
        Config::of(&content).expect_err(key).to_string()
    }

    #[test]
    fn a_model_s_numbers_are_read_from_every_type() -> Result<()> {
        let mut content = small();
        assert_eq!(Config::of(&content)?, SMALL);
        for (key, value) in [
            ("llama.embedding_length", Value::U64(32)),
            ("llama.attention.head_count", Value::I32(4)),
            ("llama.block_count", Value::U16(2)),
            ("llama.context_length", Value::I64(256)),
            ("llama.rope.freq_base", Value::F64(10_000.0)),
        ] {
            content.metadata.insert(key.to_owned(), value);
        }
        add(&mut content, "output.weight", &[96, 32]);
        assert_eq!(Config::of(&content)?, Config { tied: false, ..SMALL });
        content.metadata.remove("llama.attention.head_count_kv");
        for i in 0..2 {
            add(&mut content, &format!("blk.{i}.attn_k.weight"), &[32, 32]);
            add(&mut content, &format!("blk.{i}.attn_v.weight"), &[32, 32]);
        }
        assert_eq!(Config::of(&content)?.kv_heads, 4);
        Ok(())
    }

    #[test]
    fn impossible_numbers_are_refused() {
        for key in ["embedding_length", "attention.head_count", "block_count", "context_length"] {
            let key = format!("llama.{key}");
            assert_eq!(complaint(&key, Value::U32(0)), format!("`{key}` in the model file is 0"));
            let error = complaint(&key, Value::String("many".into()));
            assert_eq!(error, format!("`{key}` in the model file is not a whole number, 0 or more"));
            let mut content = small();
            content.metadata.remove(&key);
            let error = Config::of(&content).expect_err(&key).to_string();
            assert_eq!(error, format!("the model file has no `{key}`"));
        }
        let contradiction = "the model file contradicts itself: width 32, ";
        assert_eq!(
            complaint("llama.attention.head_count_kv", Value::U32(0)),
            format!("{contradiction}4 heads, 0 key heads")
        );
        assert_eq!(
            complaint("llama.attention.head_count_kv", Value::U32(3)),
            format!("{contradiction}4 heads, 3 key heads")
        );
        assert_eq!(
            complaint("llama.attention.head_count", Value::U32(6)),
            format!("{contradiction}6 heads, 2 key heads")
        );
        assert_eq!(
            complaint("llama.attention.head_count", Value::U32(32)),
            "each of the model's 32 heads has a width of 1, which cannot be rotated in pairs"
        );
        for context in [(1 << 24) + 1, u32::MAX] {
            assert_eq!(
                complaint("llama.context_length", Value::U32(context)),
                format!(
                    "`llama.context_length` in the model file is {context}, more than 16777216: positions would not \
                     be exact"
                )
            );
        }
        for eps in [-1e-5, f32::NAN, f32::INFINITY] {
            assert_eq!(
                complaint("llama.attention.layer_norm_rms_epsilon", Value::F32(eps)),
                format!("`llama.attention.layer_norm_rms_epsilon` in the model file is {eps}, not 0 or more")
            );
        }
        for base in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(
                complaint("llama.rope.freq_base", Value::F32(base)),
                format!("`llama.rope.freq_base` in the model file is {base}, not above 0")
            );
        }
    }

    #[test]
    fn the_tokenizer_has_as_many_tokens_as_the_embedding() {
        let tokens = Value::Array(vec![Value::String("a".into())]);
        assert_eq!(complaint("tokenizer.ggml.tokens", tokens), "the tokenizer has 1 tokens, the model's embedding 96");
    }
}
