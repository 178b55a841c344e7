//! A transformer shaped like BitNet's 2B model, with few layers and random ternary weights: RMSNorm, rotary embedding,
//! grouped-query attention with 20 query and 5 key heads of 128 dimensions, a gated feed-forward with squared ReLU.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use candle_core::{D, Device, Result, Tensor};

use super::{Random, RandomTensor};

pub const LAYERS: usize = 2;
pub const HEADS: usize = 20;
pub const KV_HEADS: usize = 5;
pub const DIM: usize = 128;
const WIDTH: usize = HEADS * DIM;
const INNER: usize = 512;
const VOCABULARY: usize = 512;
const ROPE_BASE: f32 = 500_000.0;

/// A cache, and attention over it.
pub trait Cache {
    /// How many tokens a layer has. This is also the position of the next token.
    fn len(&self, layer: usize) -> usize;

    /// Appends `k` and `v`, `[1, KV_HEADS, T, DIM]`, and returns causal attention of `q`, `[1, HEADS, T, DIM]`.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}

pub struct Model {
    embedding: Tensor,
    layers: Vec<Layer>,
    /// Not tied to the embedding: with random weights, each token would then predict itself.
    head: Tensor,
}

struct Layer {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Model {
    pub fn random(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let embedding = random.tensor(&[VOCABULARY, WIDTH]);
        let layers = (0..LAYERS).map(|_| Layer::random(&mut random)).collect();
        let head = random.tensor(&[WIDTH, VOCABULARY]);
        Self { embedding, layers, head }
    }

    /// The logits after the last of these tokens.
    pub fn forward(&self, tokens: &[u32], cache: &mut dyn Cache) -> Result<Vec<f32>> {
        let index = Tensor::new(tokens, &Device::Cpu)?;
        let mut x = self.embedding.index_select(&index, 0)?; // (T, WIDTH)
        for (i, layer) in self.layers.iter().enumerate() {
            x = (&x + layer.attention(&norm(&x)?, i, cache)?)?;
            x = (&x + layer.feed_forward(&norm(&x)?)?)?;
        }
        let last = norm(&x.narrow(0, tokens.len() - 1, 1)?)?;
        last.matmul(&self.head)?.squeeze(0)?.to_vec1()
    }

    /// Generates `n` tokens after the prompt, greedily. The cache already has the first `from` tokens of the prompt.
    pub fn generate(&self, prompt: &[u32], from: usize, n: usize, cache: &mut dyn Cache) -> Vec<u32> {
        let mut next = likeliest(&self.forward(&prompt[from..], cache).unwrap());
        let mut tokens = vec![next];
        while tokens.len() < n {
            next = likeliest(&self.forward(&[next], cache).unwrap());
            tokens.push(next);
        }
        tokens
    }

    /// The same without a cache: all tokens are computed again for each new token.
    pub fn recompute(&self, prompt: &[u32], n: usize) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        for _ in 0..n {
            let logits = self.forward(&tokens, &mut super::caches::Concatenating::default()).unwrap();
            tokens.push(likeliest(&logits));
        }
        tokens.split_off(prompt.len())
    }
}

impl Layer {
    fn random(random: &mut Random) -> Self {
        let mut weights = |rows: usize, columns: usize| {
            let numbers: Vec<f32> = (0..rows * columns).map(|_| random.below(3) as f32 - 1.0).collect();
            let ternary = Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap();
            (ternary / (rows as f64).sqrt()).unwrap()
        };
        Self {
            q: weights(WIDTH, WIDTH),
            k: weights(WIDTH, KV_HEADS * DIM),
            v: weights(WIDTH, KV_HEADS * DIM),
            o: weights(WIDTH, WIDTH),
            gate: weights(WIDTH, INNER),
            up: weights(WIDTH, INNER),
            down: weights(INNER, WIDTH),
        }
    }

    fn attention(&self, x: &Tensor, layer: usize, cache: &mut dyn Cache) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let project = |w: &Tensor, heads| x.matmul(w)?.reshape((1, tokens, heads, DIM))?.transpose(1, 2);
        let at = cache.len(layer);
        let (q, k) = (rope(&project(&self.q, HEADS)?, at)?, rope(&project(&self.k, KV_HEADS)?, at)?);
        let y = cache.attend(layer, &q, &k, &project(&self.v, KV_HEADS)?)?;
        norm(&y.transpose(1, 2)?.reshape((tokens, WIDTH))?)?.matmul(&self.o)
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = x.matmul(&self.gate)?.relu()?.sqr()?;
        norm(&(gate * x.matmul(&self.up)?)?)?.matmul(&self.down)
    }
}

fn norm(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?)
}

/// Applies the rotary embedding to `[1, heads, T, DIM]`, whose first token is at position `at`.
fn rope(x: &Tensor, at: usize) -> Result<Tensor> {
    let (_, _, tokens, _) = x.dims4()?;
    let half = DIM / 2;
    let angles: Vec<f32> = (at..at + tokens)
        .flat_map(|position| (0..half).map(move |i| position as f32 / ROPE_BASE.powf(i as f32 / half as f32)))
        .collect();
    let angles = Tensor::from_vec(angles, (tokens, half), &Device::Cpu)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}

pub fn likeliest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}
