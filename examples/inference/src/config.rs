//! What a model's file says of the model: its dimensions and constants, checked.

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use paged_attention::{Attention, LayerGroup, Window};

use crate::architecture::Architecture;
use crate::metadata::Metadata;
use crate::rope::Rope;
use crate::shown::line;
use crate::{tensors, used};

/// f32 represents every whole number up to this one, so positions below it are exact.
const MOST_POSITIONS: usize = 1 << 24;

/// The most heads, and dimensions of a head: their product has to fit into a number.
const MOST_HEADS: usize = 1 << 20;

/// A model's dimensions and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// What the file does not say.
    pub architecture: &'static Architecture,
    /// The width of the activations between layers.
    pub width: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// The width inside the feed-forward: of one expert, if there are experts.
    pub feed_forward: usize,
    /// The experts, if the feed-forward has any.
    pub experts: Option<Experts>,
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// The most tokens in a sequence.
    pub context: usize,
    /// Added to the mean square in every norm.
    pub eps: f32,
    /// The rotary embedding.
    pub rope: Rope,
    /// Of the layers with a window.
    pub local_rope: Rope,
    /// Which tensor, if any, divides the frequencies of the rotary embedding.
    pub rope_factors: RopeFactors,
    /// Each layer's window, the newest token included; `None`: all tokens before it.
    pub windows: Vec<Option<usize>>,
    /// What scores are multiplied by before the softmax.
    pub score_scale: f32,
    /// The soft cap of the scores.
    pub score_cap: Option<f32>,
    /// The soft cap of the logits.
    pub logit_cap: Option<f32>,
    /// Whether the embedding matrix is also the output matrix.
    pub tied: bool,
    /// The matrices of a layer that have a bias.
    pub biases: Vec<&'static str>,
}

/// The feed-forwards of a layer, of which a token uses a few.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token uses.
    pub used: usize,
}

/// Tensors with a factor for each frequency of the rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeFactors {
    /// No tensor.
    None,
    /// One tensor (Llama 3.1).
    Always,
    /// One for sequences within the context of training, one for runs with longer ones (Phi-3; LongRoPE, Ding et al.
    /// 2024).
    ByLength {
        /// The context of training.
        original: usize,
    },
}

impl Config {
    /// Reads `content`, and checks that nothing unsupported in it changes the model's numbers.
    ///
    /// # Errors
    ///
    /// If something is missing, contradictory, impossible or not supported.
    pub fn of(content: &Content) -> Result<Self> {
        let metadata = Metadata::of(content);
        let architecture = architecture(&metadata)?;
        let name = architecture.name;
        let count = |key: &str| -> Result<usize> {
            let key = format!("{name}.{key}");
            let n = metadata.required(&key, Metadata::count)?;
            ensure!(n > 0, "`{key}` in the model file is 0");
            Ok(n)
        };
        let width = count("embedding_length")?;
        let heads = count("attention.head_count")?;
        let kv_heads = metadata.count(&format!("{name}.attention.head_count_kv"))?.unwrap_or(heads);
        let own_head_dim = metadata.count(&format!("{name}.attention.key_length"))?;
        ensure!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads) && (own_head_dim.is_some() || width.is_multiple_of(heads)),
            "the model file contradicts itself: width {width}, {heads} heads, {kv_heads} key heads"
        );
        let head_dim = own_head_dim.unwrap_or(width / heads);
        ensure!(
            head_dim > 0 && head_dim.is_multiple_of(2),
            "each of the model's {heads} heads has a width of {head_dim}, which cannot be rotated in pairs"
        );
        let context = count("context_length")?;
        ensure!(
            context <= MOST_POSITIONS,
            "`{name}.context_length` in the model file is {context}, more than {MOST_POSITIONS}: positions would not \
             be exact"
        );
        let layers = count("block_count")?;
        ensure!(
            layers <= content.tensor_infos.len() && [heads, kv_heads, head_dim].iter().all(|n| *n <= MOST_HEADS),
            "the model file says that it has {layers} layers of {heads} and {kv_heads} heads of {head_dim}: no file does"
        );
        let rope = Rope::of(&metadata, architecture, head_dim, context)?;
        let windows = windows(&metadata, architecture, layers, context)?;
        let has = |tensor: &str| content.tensor_infos.contains_key(tensor);
        let experts = experts(&metadata, architecture)?;

        let config = Self {
            architecture,
            width,
            heads,
            kv_heads,
            head_dim,
            feed_forward: feed_forward(content, architecture)?,
            experts,
            vocabulary: rows(content, "token_embd.weight")?,
            context,
            eps: metadata.required(&format!("{name}.attention.layer_norm_rms_epsilon"), Metadata::zero_or_more)?,
            local_rope: local_rope(&metadata, architecture, &rope)?,
            rope,
            rope_factors: rope_factors(content, &metadata, name, context)?,
            windows,
            score_scale: score_scale(&metadata, architecture, layers, [width, heads, head_dim])?,
            score_cap: cap(&metadata, &format!("{name}.attn_logit_softcapping"), architecture.caps[0])?,
            logit_cap: cap(&metadata, &format!("{name}.final_logit_softcapping"), architecture.caps[1])?,
            tied: !has("output.weight"),
            biases: tensors::biases(content, architecture),
        };
        let tokens = metadata.texts("tokenizer.ggml.tokens")?.map_or(config.vocabulary, |tokens| tokens.len());
        ensure!(
            tokens == config.vocabulary,
            "the tokenizer has {tokens} tokens, the model's embedding {}",
            config.vocabulary
        );
        used::check_keys(&metadata, &config)?;
        tensors::check(content, &config)?;
        Ok(config)
    }

    /// What the cache stores: one group for the layers that see all tokens, and one for those with a window.
    pub fn groups(&self) -> Vec<LayerGroup> {
        let mut kinds: Vec<Option<usize>> = self.windows.clone();
        kinds.sort_unstable();
        kinds.dedup();
        let group = |kind: Option<usize>| {
            let layers = self.windows.iter().enumerate().filter(|(_, window)| **window == kind).map(|(i, _)| i);
            let group = LayerGroup::new(layers, self.kv_heads, self.head_dim);
            match kind {
                Some(tokens) => group.window(Window::new(tokens)),
                None => group,
            }
        };
        kinds.into_iter().map(group).collect()
    }

    /// The options of the attention of all layers.
    pub fn attention(&self) -> Attention {
        let attention = Attention::new(self.score_scale);
        match self.score_cap {
            Some(cap) => attention.soft_cap(cap),
            None => attention,
        }
    }

    /// Whether keys are rotated with the factors for long sequences, if the longest has `context` tokens.
    pub fn has_long_factors(&self, context: usize) -> bool {
        matches!(self.rope_factors, RopeFactors::ByLength { original } if context > original)
    }

    /// The number of layers.
    pub fn layers(&self) -> usize {
        self.windows.len()
    }

    /// A matrix of a layer with which products are measured.
    pub fn measured_matrix(&self, layer: usize) -> String {
        let part = if self.experts.is_some() { "attn_output" } else { "ffn_down" };
        format!("blk.{layer}.{part}.weight")
    }

    /// The maximum number of tokens in a sequence.
    pub fn context(&self) -> usize {
        self.context
    }
}

fn architecture(metadata: &Metadata<'_>) -> Result<&'static Architecture> {
    let name = metadata.required("general.architecture", Metadata::text)?;
    Architecture::of(name).with_context(|| {
        format!("the model's architecture is `{}`, only {} are supported", line(name), Architecture::names())
    })
}

fn experts(metadata: &Metadata<'_>, architecture: &Architecture) -> Result<Option<Experts>> {
    if !architecture.experts {
        return Ok(None);
    }
    let [count, used] = ["expert_count", "expert_used_count"].map(|key| format!("{}.{key}", architecture.name));
    let experts = Experts {
        count: metadata.required(&count, Metadata::count)?,
        used: metadata.required(&used, Metadata::count)?,
    };
    ensure!(
        (1..=experts.count).contains(&experts.used),
        "each token uses {} of the model's {} experts: the model file contradicts itself",
        experts.used,
        experts.count
    );
    Ok(Some(experts))
}

/// Each layer's window.
fn windows(
    metadata: &Metadata<'_>,
    architecture: &Architecture,
    layers: usize,
    context: usize,
) -> Result<Vec<Option<usize>>> {
    let name = architecture.name;
    let window = metadata.count(&format!("{name}.attention.sliding_window"))?.or(architecture.window);
    // A window that no sequence fills changes nothing.
    let window = window.filter(|window| (1..context).contains(window));
    let pattern = format!("{name}.attention.sliding_window_pattern");
    let full_every = match metadata.value(&pattern) {
        Some(Value::Array(flags)) => {
            let flags = flags.iter().map(|flag| flag.to_bool().ok()).collect::<Option<Vec<_>>>();
            let flags = flags.filter(|flags| flags.len() == layers);
            let flags =
                flags.with_context(|| format!("`{pattern}` in the model file is not a list of {layers} flags"))?;
            return Ok(flags.into_iter().map(|windowed| window.filter(|_| windowed)).collect());
        }
        Some(_) => metadata.required(&pattern, Metadata::count)?,
        None => architecture.full_every,
    };
    let is_full = |layer: usize| full_every > 0 && layer % full_every == full_every - 1;
    Ok((0..layers).map(|layer| window.filter(|_| !is_full(layer))).collect())
}

/// The rotary embedding of layers with a window.
fn local_rope(metadata: &Metadata<'_>, architecture: &Architecture, rope: &Rope) -> Result<Rope> {
    // Converters have given the key three names.
    let mut base = None;
    for key in ["freq_base_swa", "local.freq_base", "local_freq_base"] {
        base = metadata.above_zero(&format!("{}.rope.{key}", architecture.name))?.or(base);
    }
    Ok(match architecture.local_base {
        // Such models scale only the layers without a window: the others never see far.
        Some(own) => Rope::plain(base.unwrap_or(own), rope.dims),
        None => Rope { base: base.unwrap_or(rope.base), ..rope.clone() },
    })
}

fn rope_factors(content: &Content, metadata: &Metadata<'_>, name: &str, context: usize) -> Result<RopeFactors> {
    let [freqs, long, short] = tensors::ROPE_FACTORS.map(|name| content.tensor_infos.contains_key(name));
    let long_rope = metadata.text(&format!("{name}.rope.scaling.type"))? == Some("longrope");
    ensure!(
        long == short && (long || !long_rope) && !(long && freqs),
        "the model file contradicts itself: it scales positions by length, which needs `{}` and `{}`, and nothing else",
        tensors::ROPE_FACTORS[1],
        tensors::ROPE_FACTORS[2]
    );
    if long {
        // Every converter writes it; without it, the scores of all sequences would be wrong.
        metadata.required(&format!("{name}.rope.scaling.attn_factor"), Metadata::float)?;
        let original = metadata.count(&format!("{name}.rope.scaling.original_context_length"))?.unwrap_or(context);
        return Ok(RopeFactors::ByLength { original });
    }
    Ok(if freqs { RopeFactors::Always } else { RopeFactors::None })
}

fn score_scale(
    metadata: &Metadata<'_>,
    architecture: &Architecture,
    layers: usize,
    [width, heads, head_dim]: [usize; 3],
) -> Result<f32> {
    let key = format!("{}.attention.scale", architecture.name);
    if let Some(scale) = metadata.float(&key)?.filter(|scale| *scale != 0.0) {
        ensure!(scale.is_finite(), "`{key}` in the model file is {scale}, not a number");
        return Ok(scale);
    }
    let dims = if architecture.scaled_by_width == Some(layers) { width / heads } else { head_dim };
    Ok(1.0 / (dims as f32).sqrt())
}

/// A cap of scores or logits; 0 is none.
fn cap(metadata: &Metadata<'_>, key: &str, default: Option<f32>) -> Result<Option<f32>> {
    Ok(metadata.zero_or_more(key)?.or(default).filter(|cap| *cap > 0.0))
}

fn feed_forward(content: &Content, architecture: &Architecture) -> Result<usize> {
    if architecture.experts {
        let name = "blk.0.ffn_gate_exps.weight";
        return match *tensors::dims(content, name)? {
            [_, rows, _] if rows > 0 => Ok(rows),
            ref dims => bail!("the tensor `{name}` of the model file has the shape {dims:?}, the model needs matrices"),
        };
    }
    if architecture.fused {
        // Gate and up.
        return Ok(rows(content, "blk.0.ffn_up.weight")? / 2);
    }
    rows(content, "blk.0.ffn_gate.weight")
}

fn rows(content: &Content, matrix: &str) -> Result<usize> {
    match *tensors::dims(content, matrix)? {
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

    /// A llama with two layers.
    pub(crate) fn small_config() -> Config {
        let rope = Rope::plain(10_000.0, 8);
        Config {
            architecture: Architecture::of("llama").unwrap(),
            width: 32,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            feed_forward: 64,
            experts: None,
            vocabulary: 96,
            context: 256,
            eps: 1e-5,
            local_rope: rope.clone(),
            rope,
            rope_factors: RopeFactors::None,
            windows: vec![None; 2],
            score_scale: 1.0 / 8f32.sqrt(),
            score_cap: None,
            logit_cap: None,
            tied: true,
            biases: vec![],
        }
    }

    /// The header of a file with the small model.
    pub(crate) fn small() -> Content {
        let mut content = content([
            ("general.architecture", Value::String("llama".into())),
            ("llama.embedding_length", Value::U32(32)),
            ("llama.attention.head_count", Value::U32(4)),
            ("llama.attention.head_count_kv", Value::U32(2)),
            ("llama.block_count", Value::U32(2)),
            ("llama.context_length", Value::U32(256)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ]);
        tensors::all(&small_config()).iter().for_each(|(name, shape)| add(&mut content, name, shape));
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
        assert_eq!(Config::of(&content)?, small_config());
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
        assert_eq!(Config::of(&content)?, Config { tied: false, ..small_config() });
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
        for (key, number) in [("block_count", 1u64 << 62), ("attention.key_length", 1 << 61), ("block_count", 1 << 32)]
        {
            let error = complaint(&format!("llama.{key}"), Value::U64(number));
            assert!(error.starts_with("the model file says that it has "), "{error}");
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
