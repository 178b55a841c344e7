//! Gemma 4: local and global layers differ in the number and size of their heads, global layers rotate some dimensions
//! only, values are normed.
//!
//! The text model of candle can be used without the others. It has no layers that share keys and values, no embeddings
//! per layer, no experts and no scalar per layer, so these are not tested; values have a projection of their own in all
//! layers. It scales scores by `1 / sqrt(head_dim)`, whatever `query_pre_attn_scalar` is. As for Gemma 3, it gets its
//! tokens one by one, because its mask of a prompt has a window of one token more.

use std::sync::OnceLock;

use candle_nn::Activation;
use candle_transformers::models::gemma4::Gemma4TextConfig;
use candle_transformers::models::gemma4::config::{Gemma4RopeLayerParams, Gemma4RopeParameters};
use candle_transformers::models::gemma4::text::TextModel;

use crate::decoder::{Decoder, EPSILON, Layer, Shape, VOCABULARY};
use crate::reference::{Tested, one_by_one};
use crate::weights::Weights;

const LOCAL: Layer = Layer { window: Some(24), kv_heads: 2, head_dim: 8, rope_base: 10_000.0, rotated_pairs: 4 };
/// A quarter of the dimensions is rotated.
const GLOBAL: Layer = Layer { window: None, kv_heads: 1, head_dim: 24, rope_base: 1_000_000.0, rotated_pairs: 3 };
const LAYERS: [Layer; 6] = [LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL];

pub(crate) fn model() -> &'static Tested {
    static MODEL: OnceLock<Tested> = OnceLock::new();
    MODEL.get_or_init(|| {
        let shape = Shape {
            hidden: 48,
            feed: 64,
            heads: 4,
            layers: LAYERS.to_vec(),
            norms_keys: true,
            norms_values: true,
            attention_cap: None,
            final_cap: Some(1.0),
        };
        let config = config(&shape);
        let weights = Weights::random(&shape, 4);
        let builder = weights.builder();
        Tested::new(Decoder { shape, weights }, move || {
            let mut model = TextModel::new(&config, builder.clone()).unwrap();
            one_by_one(move |ids, position| model.forward(ids, position))
        })
    })
}

fn config(shape: &Shape) -> Gemma4TextConfig {
    let layer_type = |layer: &Layer| if layer == &LOCAL { "sliding_attention" } else { "full_attention" };
    let rope = |layer: &Layer| Gemma4RopeLayerParams {
        rope_theta: Some(layer.rope_base),
        rope_type: None,
        partial_rotary_factor: Some(2.0 * layer.rotated_pairs as f64 / layer.head_dim as f64),
    };
    Gemma4TextConfig {
        attention_bias: false,
        head_dim: LOCAL.head_dim,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: shape.hidden,
        intermediate_size: shape.feed,
        num_attention_heads: shape.heads,
        num_hidden_layers: shape.layers.len(),
        num_key_value_heads: LOCAL.kv_heads,
        rms_norm_eps: EPSILON,
        // candle reads the base of global layers here, and nowhere else.
        rope_theta: GLOBAL.rope_base,
        vocab_size: VOCABULARY,
        sliding_window: 24,
        final_logit_softcapping: shape.final_cap,
        query_pre_attn_scalar: 1,
        max_position_embeddings: 256,
        tie_word_embeddings: true,
        // The types of the layers decide, not this.
        sliding_window_pattern: 3,
        layer_types: shape.layers.iter().map(|layer| layer_type(layer).into()).collect(),
        global_head_dim: GLOBAL.head_dim,
        num_global_key_value_heads: Some(GLOBAL.kv_heads),
        rope_parameters: Some(Gemma4RopeParameters {
            full_attention: Some(rope(&GLOBAL)),
            sliding_attention: Some(rope(&LOCAL)),
            rope_theta: None,
            rope_type: None,
            partial_rotary_factor: None,
        }),
        use_bidirectional_attention: None,
        use_flash_attn: false,
    }
}
