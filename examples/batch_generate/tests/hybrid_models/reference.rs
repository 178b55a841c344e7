//! What a model answers, computed for one sequence at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use candle_core::{Device, Result, Tensor};
use paged_attention::LayerGroup;

use crate::decoder::Decoder;

/// A model with a cache of its own. Each call has one token more than the last one, and returns the logits after it.
pub(crate) type Model = Box<dyn FnMut(&[u32]) -> Result<Vec<f32>> + Send>;

/// How far logits may be from the reference, in relation to the largest of them.
const TOLERANCE: f32 = 1e-4;

/// A model and its reference.
pub(crate) struct Tested {
    pub(crate) decoder: Decoder,
    /// The groups of layers of its cache.
    pub(crate) groups: Vec<LayerGroup>,
    start: Box<dyn Fn() -> Model + Send + Sync>,
    computed: Mutex<Computed>,
}

#[derive(Default)]
struct Computed {
    /// The logits after a sequence.
    logits: HashMap<Vec<u32>, Arc<[f32]>>,
    /// Models, with the tokens that they have got.
    models: Vec<(Vec<u32>, Model)>,
}

impl Tested {
    /// `start` returns a model that has got no tokens yet.
    pub(crate) fn new(decoder: Decoder, start: impl Fn() -> Model + Send + Sync + 'static) -> Self {
        let groups = decoder.shape.groups();
        Self { decoder, groups, start: Box::new(start), computed: Mutex::default() }
    }

    /// The window of a group's layers.
    pub(crate) fn window(&self, group: &LayerGroup) -> Option<usize> {
        self.decoder.shape.layers[group.layers()[0]].window
    }

    /// The reference's logits after the last of these tokens.
    pub(crate) fn logits(&self, tokens: &[u32]) -> Arc<[f32]> {
        let mut computed = self.computed.lock().unwrap();
        let Computed { logits, models } = &mut *computed;
        if let Some(logits) = logits.get(tokens) {
            return logits.clone();
        }
        let furthest =
            (0..models.len()).filter(|&i| tokens.starts_with(&models[i].0)).max_by_key(|&i| models[i].0.len());
        let (mut fed, mut model) = match furthest {
            Some(i) => models.remove(i),
            None => (Vec::new(), (self.start)()),
        };
        for &token in &tokens[fed.len()..] {
            fed.push(token);
            logits.insert(fed.clone(), model(&fed).unwrap().into());
        }
        // Enough for the sequences of one batch.
        if models.len() == 16 {
            drop(models.remove(0));
        }
        models.push((fed, model));
        logits[tokens].clone()
    }

    /// The reference's next token after these.
    pub(crate) fn next(&self, tokens: &[u32]) -> u32 {
        greedy(&self.logits(tokens))
    }

    /// Logits that were computed after these tokens must be the reference's. Returns the next token.
    pub(crate) fn check(&self, tokens: &[u32], logits: &[f32]) -> u32 {
        let expected = self.logits(tokens);
        assert_eq!(logits.len(), expected.len());
        let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (id, (a, b)) in logits.iter().zip(&*expected).enumerate() {
            let difference = (a - b).abs() / largest;
            // A difference that is NaN is one, too.
            assert!(
                difference <= TOLERANCE,
                "token {} of a sequence, logit {id}: {a} instead of {b}, the largest is {largest}",
                tokens.len() - 1
            );
        }
        assert_eq!(greedy(logits), greedy(&expected), "the next token after {} tokens", tokens.len());
        greedy(logits)
    }
}

/// The token with the largest logit.
pub(crate) fn greedy(logits: &[f32]) -> u32 {
    let largest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    largest.unwrap() as u32
}

/// The logits of the last token of candle's output, `(1, 1, vocabulary)`, for a model that gets one token at a time.
pub(crate) fn one_by_one(mut forward: impl FnMut(&Tensor, usize) -> Result<Tensor> + Send + 'static) -> Model {
    Box::new(move |tokens| {
        let position = tokens.len() - 1;
        forward(&Tensor::new(&[[tokens[position]]], &Device::Cpu)?, position)?.flatten_all()?.to_vec1()
    })
}
