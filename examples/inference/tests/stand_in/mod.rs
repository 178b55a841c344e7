//! A model for tests of the engine.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use candle_core::{Device, Result, Tensor};
use inference::engine::LanguageModel;
use paged_attention::{Attention, KvShape, Step};

const VOCABULARY: usize = 5;
pub const END: u32 = 4;
const CONTEXT: usize = 4096;
pub const HEAD_DIM: usize = 4;
pub const SHAPE: KvShape = KvShape::new(2, 1, HEAD_DIM);

/// A cheap model in which every error shows: the second layer's keys and values, and the logits, depend on every bit of
/// the attention before them. One wrong number in one slot changes the answer.
pub struct StandIn;

impl LanguageModel for StandIn {
    fn context(&self) -> usize {
        CONTEXT
    }

    fn attention(&self) -> Attention {
        Attention::scaled_by(HEAD_DIM)
    }

    fn forward(&self, step: &Step<'_>) -> Result<Tensor> {
        let (tokens, positions) = (step.token_ids()?.to_vec1::<u32>()?, step.positions()?.to_vec1::<u32>()?);
        let mut states: Vec<u64> =
            tokens.iter().zip(&positions).map(|(&token, &position)| mix(mix(1, token), position)).collect();
        for layer in 0..SHAPE.layers {
            let rows = |kind: u32| {
                let row = |&state: &u64| (0..HEAD_DIM as u32).map(move |i| number(mix(mix(state, kind), i)));
                let numbers: Vec<f32> = states.iter().flat_map(row).collect();
                Tensor::from_vec(numbers, (states.len(), 1, HEAD_DIM), &Device::Cpu)
            };
            let y = step.attend(layer, &rows(0)?, &rows(1)?, &rows(2)?, &self.attention())?;
            let seen = y.flatten_from(1)?.to_vec2::<f32>()?; // (tokens, head_dim)
            states = seen.iter().map(|row| row.iter().fold(3, |state, x| mix(state, x.to_bits()))).collect();
        }
        let last = step.logits_rows()?.to_vec1::<u32>()?;
        let logits = |&row: &u32| (0..VOCABULARY as u32).map(move |i| (row, i));
        let logits: Vec<f32> =
            last.iter().flat_map(logits).map(|(row, i)| 4.0 * number(mix(states[row as usize], i))).collect();
        Tensor::from_vec(logits, (last.len(), VOCABULARY), &Device::Cpu)
    }
}

/// A hash of both: the finaliser of splitmix64 (Steele et al. 2014).
pub fn mix(state: u64, more: u32) -> u64 {
    let mut x = state.wrapping_mul(31).wrapping_add(u64::from(more)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A number in [-1, 1).
fn number(state: u64) -> f32 {
    (state >> 40) as f32 / (1 << 23) as f32 - 1.0
}
