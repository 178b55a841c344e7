//! A layer with some options, and dense attention in f64 as its reference.

use std::ops::Range;

use candle_core::{DType, Tensor};
use paged_attention::{Attention, KvCache, KvDtype, KvShape, LayerGroup, PushOptions, Window};

use crate::common::{Configure, Random, backends, poison, stored_as, tensor};

const SCALE: f32 = 0.3;

/// What a layer asks for.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) heads: usize,
    pub(crate) shape: KvShape,
    pub(crate) sinks: bool,
    pub(crate) soft_cap: Option<f32>,
    pub(crate) alibi: bool,
    pub(crate) causal: bool,
    /// The window of the group of layers.
    pub(crate) window: Option<Window>,
    pub(crate) chunks: Option<usize>,
    /// The window of the layer alone.
    pub(crate) layer_window: Option<Window>,
    /// Positions whose tokens see each other.
    pub(crate) images: Vec<Range<usize>>,
}

/// All the options, one after another, and together.
pub(crate) fn cases() -> Vec<Case> {
    let shape = KvShape::new(1, 2, 32);
    let plain = |name| Case {
        name,
        heads: 6,
        shape,
        sinks: false,
        soft_cap: None,
        alibi: false,
        causal: true,
        window: None,
        chunks: None,
        layer_window: None,
        images: Vec::new(),
    };
    let images = vec![4..37, 37..40, 90..150, 155..158];
    let latent = |name, heads, head_dim, value_dim| Case {
        heads,
        shape: KvShape::new(1, 1, head_dim).values_in_keys(value_dim),
        ..plain(name)
    };
    let everything = Case {
        sinks: true,
        soft_cap: Some(2.5),
        alibi: true,
        window: Some(Window::new(60).with_sink_tokens(3)),
        layer_window: Some(Window::new(50).with_sink_tokens(5)),
        images: images.clone(),
        ..plain("everything")
    };
    vec![
        plain("plain"),
        Case { sinks: true, ..plain("sink logits") },
        Case {
            sinks: true,
            layer_window: Some(Window::new(20).with_sink_tokens(3)),
            ..plain("sink logits and tokens")
        },
        Case { shape: shape.value_dim(16), ..plain("smaller values") },
        Case { shape: KvShape::new(1, 2, 40).value_dim(72), ..plain("larger values") },
        Case { shape: KvShape::new(1, 2, 33).value_dim(21), ..plain("odd values") },
        latent("latent", 8, 80, 64),
        latent("small odd latent", 3, 37, 22),
        latent("latent whose keys are its values", 5, 48, 48),
        Case { images: images.clone(), ..plain("images") },
        Case { images: images.clone(), window: Some(Window::new(10)), ..plain("images and a window") },
        Case { images: images.clone(), chunks: Some(64), ..plain("images and chunks") },
        Case { causal: false, sinks: true, shape: shape.value_dim(48), ..plain("not causal") },
        everything.clone(),
        Case { name: "everything, of other values", shape: shape.value_dim(24), ..everything.clone() },
        Case { name: "everything, in a latent", shape: KvShape::new(1, 1, 40).values_in_keys(24), ..everything },
    ]
}

/// The queries, keys and values of one sequence, `(tokens, heads, dims)`.
#[derive(Clone)]
pub(crate) struct Numbers {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    /// Not used if the values are in the keys.
    pub(crate) v: Vec<f32>,
    pub(crate) tokens: usize,
}

impl Numbers {
    /// Token ids that no other numbers have.
    pub(crate) fn ids(&self, positions: &Range<usize>) -> Vec<u32> {
        let width = self.k.len() / self.tokens;
        positions.clone().map(|position| self.k[position * width].to_bits()).collect()
    }
}

/// Results of rows, `(rows, heads, value_dim)`, and the logarithms of their sums of weights, `(rows, heads)`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Results<T> {
    pub(crate) out: Vec<T>,
    pub(crate) lse: Vec<T>,
}

impl Case {
    pub(crate) fn numbers(&self, tokens: usize, seed: u64) -> Numbers {
        let KvShape { kv_heads, head_dim, value_dim, .. } = self.shape;
        let mut random = Random::new(seed);
        let mut numbers = |width: usize| random.numbers(tokens * width);
        let (q, k) = (numbers(self.heads * head_dim), numbers(kv_heads * head_dim));
        Numbers { q, k, v: numbers(kv_heads * value_dim), tokens }
    }

    fn sink_logits(&self) -> Vec<f32> {
        // Some far above the scores, some far below, one that changes nothing.
        let logits = [0.5, 30.0, -30.0, 2.0, f32::NEG_INFINITY, -1.0];
        logits.into_iter().cycle().take(self.heads).collect()
    }

    pub(crate) fn attention(&self) -> Attention {
        let mut attention = Attention::new(SCALE).causal(self.causal);
        if let Some(window) = self.layer_window {
            attention = attention.window(window);
        }
        if let Some(cap) = self.soft_cap {
            attention = attention.soft_cap(cap);
        }
        if self.alibi {
            attention = attention.alibi(&Attention::alibi_slopes(self.heads));
        }
        if self.sinks {
            attention = attention.sink_logits(&self.sink_logits());
        }
        attention
    }

    pub(crate) fn cache(&self, configure: &Configure, dtype: KvDtype, block_size: usize, tokens: usize) -> KvCache {
        let KvShape { kv_heads, head_dim, value_dim, values_in_keys, .. } = self.shape;
        let group = LayerGroup::new([0], kv_heads, head_dim);
        let group = if values_in_keys { group.values_in_keys(value_dim) } else { group.value_dim(value_dim) };
        let group = match (self.window, self.chunks) {
            (Some(window), _) => group.window(window),
            (_, Some(chunk)) => group.chunks(chunk),
            _ => group,
        };
        let blocks = tokens.div_ceil(block_size) + 4;
        let cache = configure(KvCache::builder_of([group]).blocks(blocks).block_size(block_size).dtype(dtype));
        let cache = cache.build().unwrap();
        poison(&cache);
        cache
    }

    /// The options of a push of the tokens at these positions. An image lies wholly in one push.
    pub(crate) fn push_options(&self, positions: &Range<usize>) -> PushOptions {
        let images = self.images.iter().filter(|image| positions.contains(&image.start));
        images.fold(PushOptions::default(), |options, image| {
            assert!(image.end <= positions.end, "an image is cut by {positions:?}");
            options.bidirectional(image.start - positions.start..image.end - positions.start)
        })
    }

    /// The tensors of the rows at these positions.
    pub(crate) fn tensors(&self, numbers: &Numbers, rows: &Range<usize>) -> (Tensor, Tensor, Option<Tensor>) {
        let KvShape { kv_heads, head_dim, value_dim, values_in_keys, .. } = self.shape;
        let of = |numbers: &[f32], heads: usize, dims: usize| {
            let width = heads * dims;
            tensor(&numbers[rows.start * width..rows.end * width], heads, dims, DType::F32)
        };
        let v = (!values_in_keys).then(|| of(&numbers.v, kv_heads, value_dim));
        (of(&numbers.q, self.heads, head_dim), of(&numbers.k, kv_heads, head_dim), v)
    }

    /// Whether the token at `position` sees the one at `at`.
    pub(crate) fn sees(&self, at: usize, position: usize) -> bool {
        if self.images.iter().any(|image| image.contains(&at) && image.contains(&position)) {
            return true;
        }
        // Of several windows the smallest applies, and the smallest number of sink tokens.
        let smallest = |of: fn(&Window) -> usize| [self.window, self.layer_window].iter().flatten().map(of).min();
        let in_window = smallest(Window::sink_tokens).is_none_or(|sink_tokens| at < sink_tokens)
            || smallest(Window::tokens).is_none_or(|tokens| at + tokens > position);
        let in_chunk = self.chunks.is_none_or(|chunk| at / chunk >= position / chunk);
        (!self.causal || at <= position) && in_chunk && in_window
    }

    /// Dense attention in f64 of the rows at `rows`, when the sequence has `len` tokens.
    pub(crate) fn dense(&self, numbers: &Numbers, dtype: KvDtype, rows: Range<usize>, len: usize) -> Results<f64> {
        let KvShape { kv_heads, head_dim, value_dim, values_in_keys, .. } = self.shape;
        let k = stored_as(&numbers.k, head_dim, dtype);
        let (v, v_dim) =
            if values_in_keys { (k.clone(), head_dim) } else { (stored_as(&numbers.v, value_dim, dtype), value_dim) };
        let (slopes, sinks) = (Attention::alibi_slopes(self.heads), self.sink_logits());
        let mut results = Results::default();
        for (position, head) in rows.flat_map(|position| (0..self.heads).map(move |head| (position, head))) {
            let q = &numbers.q[(position * self.heads + head) * head_dim..][..head_dim];
            let key_head = head / (self.heads / kv_heads);
            let seen: Vec<usize> = (0..len).filter(|&at| self.sees(at, position)).collect();
            let score = |&at: &usize| {
                let k = &k[(at * kv_heads + key_head) * head_dim..][..head_dim];
                let product: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                let scaled = product * f64::from(SCALE);
                let capped = self.soft_cap.map_or(scaled, |cap| f64::from(cap) * (scaled / f64::from(cap)).tanh());
                let slope = if self.alibi { f64::from(slopes[head]) } else { 0.0 };
                capped + slope * (at as f64 - position as f64)
            };
            let scores: Vec<f64> = seen.iter().map(score).collect();
            let sink = if self.sinks { f64::from(sinks[head]) } else { f64::NEG_INFINITY };
            let largest = scores.iter().copied().fold(sink, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            if largest == f64::NEG_INFINITY && scores.is_empty() {
                results.out.extend(vec![0.0; value_dim]);
                results.lse.push(f64::NEG_INFINITY);
                continue;
            }
            // A sink logit of -inf has no weight, whatever the scores are.
            let total =
                weights.iter().sum::<f64>() + if sink == f64::NEG_INFINITY { 0.0 } else { (sink - largest).exp() };
            for dim in 0..value_dim {
                let value = |at: usize| f64::from(v[(at * kv_heads + key_head) * v_dim + dim]);
                let sum: f64 = seen.iter().zip(&weights).map(|(&at, weight)| weight * value(at)).sum();
                results.out.push(sum / total);
            }
            results.lse.push(largest + total.ln());
        }
        results
    }
}

/// Every backend and kernel, with every type that it can store, by name.
pub(crate) fn stores() -> Vec<(String, Configure, KvDtype)> {
    let of = |dtype: KvDtype| {
        let can_store = move |(name, _): &(&str, Configure)| *name != "gather" || dtype != KvDtype::Int8;
        let named = move |(name, configure)| (format!("{name}, {dtype}"), configure, dtype);
        backends().into_iter().filter(can_store).map(named)
    };
    KvDtype::ALL.into_iter().flat_map(of).collect()
}

/// The promised accuracy: that of f32 arithmetic; for 8-bit storage, that of queries and weights of at least 13 bits.
pub(crate) fn bound(dtype: KvDtype) -> f64 {
    if dtype == KvDtype::Int8 { 1e-3 } else { 1e-5 }
}
