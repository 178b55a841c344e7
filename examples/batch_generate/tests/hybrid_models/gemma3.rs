//! Gemma 3: five layers of six have a window, and a rotary embedding with another base.
//!
//! candle's model gets its tokens one by one. Then a token sees its window in a rotating cache of exactly `sliding_window`
//! tokens. If a prompt came at once, candle's mask would let a token see one token more; and no second chunk can follow
//! once the cache has rotated, because the mask does not fit it.
//!
//! candle scales scores by `1 / sqrt(head_dim)` and ignores `query_pre_attn_scalar`; here the two are the same.

use std::sync::OnceLock;

use candle_nn::Activation;
use candle_transformers::models::gemma3;

use crate::decoder::{Decoder, EPSILON, Layer, Shape, VOCABULARY};
use crate::reference::{Tested, one_by_one};
use crate::weights::Weights;

const PATTERN: usize = 6;
const WINDOW: usize = 7;
const LOCAL_BASE: f64 = 10_000.0;
const BASE: f64 = 1_000_000.0;

pub(crate) fn model() -> &'static Tested {
    static MODEL: OnceLock<Tested> = OnceLock::new();
    MODEL.get_or_init(|| {
        let layer = |index: usize| {
            let is_local = index % PATTERN != PATTERN - 1;
            let (window, rope_base) = if is_local { (Some(WINDOW), LOCAL_BASE) } else { (None, BASE) };
            Layer { window, kv_heads: 1, head_dim: 20, rope_base, rotated_pairs: 10 }
        };
        let shape = Shape {
            hidden: 40,
            feed: 56,
            heads: 3,
            // The last layers are local ones again, as in most sizes of the model.
            layers: (0..8).map(layer).collect(),
            norms_keys: true,
            norms_values: false,
            attention_cap: None,
            final_cap: None,
        };
        let config = gemma3::Config {
            attention_bias: false,
            head_dim: 20,
            hidden_activation: Activation::GeluPytorchTanh,
            hidden_size: shape.hidden,
            intermediate_size: shape.feed,
            num_attention_heads: shape.heads,
            num_hidden_layers: shape.layers.len(),
            num_key_value_heads: 1,
            rms_norm_eps: EPSILON,
            rope_theta: BASE,
            rope_local_base_freq: LOCAL_BASE,
            vocab_size: VOCABULARY,
            final_logit_softcapping: None,
            attn_logit_softcapping: None,
            query_pre_attn_scalar: 20,
            sliding_window: WINDOW,
            sliding_window_pattern: PATTERN,
            max_position_embeddings: 256,
        };
        let weights = Weights::random(&shape, 8);
        let builder = weights.builder();
        Tested::new(Decoder { shape, weights }, move || {
            let mut model = gemma3::Model::new(false, &config, builder.clone()).unwrap();
            one_by_one(move |ids, position| model.forward(ids, position))
        })
    })
}
