//! Gemma 2: every second layer has a window, scores and logits are capped.
//!
//! candle's model has no alternating windows: it has none at all where tokens come one by one, and if a prompt comes at
//! once, its mask gives all layers a window, of one token more than `sliding_window`. So the reference is dense attention
//! with the windows of the paper, in which every second layer from the first one on is local. Both it and the paged model
//! are compared with candle in the two cases that candle computes: all layers without a window, and all with the same.
//!
//! candle scales scores by `1 / sqrt(head_dim)` and ignores `query_pre_attn_scalar`; here the two are the same.

use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use candle_nn::Activation;
use candle_transformers::models::gemma2;
use paged_attention::{LayerGroup, Window};

use crate::decoder::{Decoder, EPSILON, Layer, Shape, VOCABULARY};
use crate::dense;
use crate::machine::{ANSWER, Machine, prompt};
use crate::reference::{Model, Tested, one_by_one};
use crate::weights::Weights;

const LAYERS: usize = 6;
const WINDOW: usize = 11;

fn decoder(windows: &[Option<usize>]) -> Decoder {
    let layer =
        |&window: &Option<usize>| Layer { window, kv_heads: 2, head_dim: 16, rope_base: 10_000.0, rotated_pairs: 8 };
    let shape = Shape {
        hidden: 32,
        feed: 64,
        heads: 4,
        layers: windows.iter().map(layer).collect(),
        norms_keys: false,
        norms_values: false,
        // Low enough for the random scores and logits to feel them.
        attention_cap: Some(4.0),
        final_cap: Some(1.0),
    };
    let weights = Weights::random(&shape, 2);
    Decoder { shape, weights }
}

pub(crate) fn model() -> &'static Tested {
    static MODEL: OnceLock<Tested> = OnceLock::new();
    MODEL.get_or_init(|| {
        let windows: Vec<Option<usize>> = (0..LAYERS).map(|layer| (layer % 2 == 0).then_some(WINDOW)).collect();
        let decoder = decoder(&windows);
        let plain = decoder.clone();
        let local = Some(WINDOW);
        Tested::new(decoder, move || dense::model(&plain, &[local, None, local, None, local, None]))
    })
}

/// candle's model.
fn candle(decoder: &Decoder, sliding_window: Option<usize>) -> gemma2::Model {
    let shape = &decoder.shape;
    let config = gemma2::Config {
        attention_bias: false,
        head_dim: shape.layers[0].head_dim,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: shape.hidden,
        intermediate_size: shape.feed,
        num_attention_heads: shape.heads,
        num_hidden_layers: shape.layers.len(),
        num_key_value_heads: shape.layers[0].kv_heads,
        rms_norm_eps: EPSILON,
        rope_theta: shape.layers[0].rope_base,
        vocab_size: VOCABULARY,
        final_logit_softcapping: shape.final_cap,
        attn_logit_softcapping: shape.attention_cap,
        query_pre_attn_scalar: shape.layers[0].head_dim,
        sliding_window,
        max_position_embeddings: 256,
    };
    gemma2::Model::new(false, &config, decoder.weights.builder()).unwrap()
}

/// candle without windows.
fn without_windows(decoder: &Decoder) -> Model {
    let mut model = candle(decoder, None);
    one_by_one(move |ids, position| model.forward(ids, position))
}

/// candle with a window in all layers: it computes the whole sequence again for each token.
fn all_windowed(decoder: &Decoder, window: usize) -> Model {
    let mut model = candle(decoder, Some(window - 1));
    Box::new(move |tokens| {
        model.clear_kv_cache();
        model.forward(&Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?, 0)?.flatten_all()?.to_vec1()
    })
}

/// The decoder, tested against candle.
fn tested(decoder: &Decoder, window: Option<usize>) -> Tested {
    let plain = decoder.clone();
    Tested::new(decoder.clone(), move || match window {
        None => without_windows(&plain),
        Some(window) => all_windowed(&plain, window),
    })
}

#[test]
fn the_dense_reference_is_candle_where_candle_has_the_windows() {
    let tokens = prompt(61);
    for window in [None, Some(WINDOW)] {
        let windows = [window; LAYERS];
        let decoder = decoder(&windows);
        let expected = tested(&decoder, window);
        let mut dense = dense::model(&decoder, &windows);
        for end in 1..=tokens.len() {
            expected.check(&tokens[..end], &dense(&tokens[..end]).unwrap());
        }
    }
}

#[test]
fn the_paged_model_is_candle_where_candle_has_the_windows() {
    for window in [None, Some(WINDOW)] {
        let mut tested = tested(&decoder(&[window; LAYERS]), window);
        // Two groups, although the layers are of one kind.
        tested.groups = [0, 1].map(|first| every_second(first, window)).into();
        let machine = Machine::new(&tested, 4);
        let mut sequence = machine.start(&prompt(40));
        machine.generate(&mut [&mut sequence], ANSWER);
    }
}

fn every_second(first: usize, window: Option<usize>) -> LayerGroup {
    let group = LayerGroup::new((first..LAYERS).step_by(2), 2, 16);
    match window {
        Some(tokens) => group.window(Window::new(tokens)),
        None => group,
    }
}
