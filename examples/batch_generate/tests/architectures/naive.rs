//! Any of the architectures in plain f64, one token at a time.

use std::collections::HashMap;

use crate::files::{ModelFile, VOCABULARY};
use crate::rotary::Rotary;

/// What a test says of its model.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) architecture: &'static str,
    pub(crate) width: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// How many dimensions of a head are rotated.
    pub(crate) rotated: usize,
    /// Dimension `i` is rotated with `i + rotated / 2`, otherwise `2 i` with `2 i + 1`.
    pub(crate) halves: bool,
    pub(crate) feed_forward: usize,
    pub(crate) context: usize,
    pub(crate) eps: f64,
    pub(crate) windows: Vec<Option<usize>>,
    /// Of layers without a window, and of those with one.
    pub(crate) rotary: [Rotary; 2],
    pub(crate) score_scale: f64,
    pub(crate) caps: [Option<f64>; 2],
    pub(crate) fused: bool,
    pub(crate) biases: &'static [&'static str],
    pub(crate) key_norms: bool,
    pub(crate) post_norms: bool,
    pub(crate) embedding_scale: f64,
    pub(crate) gelu: bool,
    pub(crate) experts: Option<(usize, usize)>,
    pub(crate) tied: bool,
}

impl Spec {
    /// A llama of `layers` layers.
    pub(crate) fn llama(layers: usize) -> Self {
        Self {
            architecture: "llama",
            width: 32,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            rotated: 8,
            halves: false,
            feed_forward: 64,
            context: 256,
            eps: 1e-5,
            windows: vec![None; layers],
            rotary: [Rotary::plain(8, 10_000.0), Rotary::plain(8, 10_000.0)],
            score_scale: 1.0 / 8f64.sqrt(),
            caps: [None, None],
            fused: false,
            biases: &[],
            key_norms: false,
            post_norms: false,
            embedding_scale: 1.0,
            gelu: false,
            experts: None,
            tied: true,
        }
    }

    /// The tensors of its file.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (width, feed) = (self.width, self.feed_forward);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![("token_embd.weight".to_owned(), vec![VOCABULARY, width])];
        all.push(("output_norm.weight".to_owned(), vec![width]));
        if !self.tied {
            all.push(("output.weight".to_owned(), vec![VOCABULARY, width]));
        }
        for layer in 0..self.windows.len() {
            let mut add = |name: &str, shape: &[usize]| {
                all.push((format!("blk.{layer}.{name}.weight"), shape.to_vec()));
                if self.biases.contains(&name) {
                    all.push((format!("blk.{layer}.{name}.bias"), shape[..1].to_vec()));
                }
            };
            add("attn_norm", &[width]);
            add("ffn_norm", &[width]);
            if self.fused {
                add("attn_qkv", &[q + 2 * kv, width]);
                add("ffn_up", &[2 * feed, width]);
                add("ffn_down", &[width, feed]);
            } else {
                add("attn_q", &[q, width]);
                add("attn_k", &[kv, width]);
                add("attn_v", &[kv, width]);
            }
            add("attn_output", &[width, q]);
            if let Some((count, _)) = self.experts {
                add("ffn_gate_inp", &[count, width]);
                add("ffn_gate_exps", &[count, feed, width]);
                add("ffn_up_exps", &[count, feed, width]);
                add("ffn_down_exps", &[count, width, feed]);
            } else if !self.fused {
                add("ffn_gate", &[feed, width]);
                add("ffn_up", &[feed, width]);
                add("ffn_down", &[width, feed]);
            }
            if self.key_norms {
                add("attn_q_norm", &[self.head_dim]);
                add("attn_k_norm", &[self.head_dim]);
            }
            if self.post_norms {
                add("post_attention_norm", &[width]);
                add("post_ffw_norm", &[width]);
            }
        }
        all
    }
}

/// The model, and the keys and values of one sequence.
pub(crate) struct Naive {
    spec: Spec,
    weights: HashMap<String, Vec<f64>>,
    /// Of each layer and token: all heads.
    keys: Vec<Vec<Vec<f64>>>,
    values: Vec<Vec<Vec<f64>>>,
}

impl Naive {
    pub(crate) fn new(spec: &Spec, file: &ModelFile) -> Self {
        let numbers = |name: &String| file.numbers(name).into_iter().map(f64::from).collect();
        let weights = file.tensors.keys().map(|name| (name.clone(), numbers(name))).collect();
        let none = vec![Vec::new(); spec.windows.len()];
        Self { spec: spec.clone(), weights, keys: none.clone(), values: none }
    }

    /// The logits after the next token.
    pub(crate) fn next(&mut self, token: u32) -> Vec<f32> {
        let Spec { width, heads, kv_heads, head_dim, .. } = self.spec;
        let spec = self.spec.clone();
        let embedding = &self.weights["token_embd.weight"];
        let row = &embedding[token as usize * width..][..width];
        let mut x: Vec<f64> = row.iter().map(|x| x * spec.embedding_scale).collect();
        for layer in 0..spec.windows.len() {
            let y = self.norm(&x, &format!("blk.{layer}.attn_norm"));
            let (mut q, mut k, v) = if spec.fused {
                let all = self.product(&format!("blk.{layer}.attn_qkv"), &y);
                let (q, kv) = all.split_at(heads * head_dim);
                let (k, v) = kv.split_at(kv_heads * head_dim);
                (q.to_vec(), k.to_vec(), v.to_vec())
            } else {
                let [q, k, v] =
                    ["attn_q", "attn_k", "attn_v"].map(|part| self.product(&format!("blk.{layer}.{part}"), &y));
                (q, k, v)
            };
            let rotary = &spec.rotary[usize::from(spec.windows[layer].is_some())];
            let position = self.keys[layer].len();
            for (x, norm) in [(&mut q, "attn_q_norm"), (&mut k, "attn_k_norm")] {
                for head in x.chunks_mut(head_dim) {
                    if spec.key_norms {
                        head.copy_from_slice(&self.norm(head, &format!("blk.{layer}.{norm}")));
                    }
                    rotary.apply(&mut head[..spec.rotated], position, spec.halves);
                }
            }
            self.keys[layer].push(k);
            self.values[layer].push(v);
            let attended = self.attend(layer, &q);
            let mut y = self.product(&format!("blk.{layer}.attn_output"), &attended);
            if spec.post_norms {
                y = self.norm(&y, &format!("blk.{layer}.post_attention_norm"));
            }
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
            let y = self.norm(&x, &format!("blk.{layer}.ffn_norm"));
            let mut y = self.feed_forward(layer, &y);
            if spec.post_norms {
                y = self.norm(&y, &format!("blk.{layer}.post_ffw_norm"));
            }
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        }
        let output = if spec.tied { "token_embd" } else { "output" };
        let logits = self.product(output, &self.norm(&x, "output_norm"));
        logits.into_iter().map(|x| capped(x, spec.caps[1]) as f32).collect()
    }

    fn attend(&self, layer: usize, q: &[f64]) -> Vec<f64> {
        let Spec { heads, kv_heads, head_dim, .. } = self.spec;
        let (keys, values) = (&self.keys[layer], &self.values[layer]);
        let first = self.spec.windows[layer].map_or(0, |window| keys.len().saturating_sub(window));
        let mut out = Vec::new();
        for head in 0..heads {
            let range = (head / (heads / kv_heads)) * head_dim..(head / (heads / kv_heads) + 1) * head_dim;
            let q = &q[head * head_dim..][..head_dim];
            let score = |k: &Vec<f64>| capped(dot(q, &k[range.clone()]) * self.spec.score_scale, self.spec.caps[0]);
            let scores: Vec<f64> = keys[first..].iter().map(score).collect();
            let weights = softmax(&scores);
            for dim in range {
                out.push(values[first..].iter().zip(&weights).map(|(v, weight)| v[dim] * weight).sum());
            }
        }
        out
    }

    fn feed_forward(&self, layer: usize, x: &[f64]) -> Vec<f64> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let Some((count, used)) = self.spec.experts else {
            let (gate, up) = if self.spec.fused {
                let both = self.product(&name("ffn_up"), x);
                let (gate, up) = both.split_at(self.spec.feed_forward);
                (gate.to_vec(), up.to_vec())
            } else {
                (self.product(&name("ffn_gate"), x), self.product(&name("ffn_up"), x))
            };
            return self.product(&name("ffn_down"), &self.gated(&gate, &up));
        };
        let weights = softmax(&self.product(&name("ffn_gate_inp"), x));
        let mut best: Vec<usize> = (0..count).collect();
        best.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        best.truncate(used);
        let sum: f64 = best.iter().map(|&expert| weights[expert]).sum();
        let mut out = vec![0.0; x.len()];
        for expert in best {
            let part = |part: &str, x: &[f64]| {
                let all = &self.weights[&format!("blk.{layer}.{part}.weight")];
                product(&all[expert * all.len() / count..][..all.len() / count], x)
            };
            let y = part("ffn_down_exps", &self.gated(&part("ffn_gate_exps", x), &part("ffn_up_exps", x)));
            out.iter_mut().zip(y).for_each(|(sum_of, y)| *sum_of += y * weights[expert] / sum);
        }
        out
    }

    fn gated(&self, gate: &[f64], up: &[f64]) -> Vec<f64> {
        let activation = |x: f64| match self.spec.gelu {
            // Hendrycks and Gimpel 2016, section 2: the approximation.
            true => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh()),
            false => x / (1.0 + (-x).exp()),
        };
        gate.iter().zip(up).map(|(gate, up)| activation(*gate) * up).collect()
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let weight = &self.weights[&format!("{name}.weight")];
        x.iter().zip(weight).map(|(x, weight)| x / (mean + self.spec.eps).sqrt() * weight).collect()
    }

    fn product(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mut y = product(&self.weights[&format!("{name}.weight")], x);
        if let Some(bias) = self.weights.get(&format!("{name}.bias")) {
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
        y
    }
}

fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

fn capped(x: f64, cap: Option<f64>) -> f64 {
    cap.map_or(x, |cap| cap * (x / cap).tanh())
}
