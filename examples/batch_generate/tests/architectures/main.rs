//! Every architecture that the program computes, with small random files that the test writes: all logits of all rows,
//! and the answers of the engine, are those of models that are computed in another way.
//!
//! - `naive` computes any of them in plain f64, token by token, from what each test says of the model, not from what
//!   the program reads. It has windows of exactly `sliding_window` tokens, the new one among them. So have the rolling
//!   buffer of Mistral 7B (Jiang et al. 2023, section 2), the masks of `transformers` (a key at `k` is seen from `q` if
//!   `k > q - sliding_window`) and those of llama.cpp (masked if `q - k >= n_swa`). The prefill masks of candle's
//!   Gemma 3, Mistral and Qwen 2 let a token see one token more, and so does the letter of Mistral's paper ("between
//!   i - W and i"); its own cache cannot, and a row would depend on whether it came in a prompt or alone.
//! - `candle` has candle's own models of the same weights, where candle has them.
//! - `cases` has the models.
//! - `commands` and `refused` run the program with them, and with bad files.
//! - `machine` runs sequences that join at different steps, in chunks, through blocks.

#![allow(clippy::unwrap_used, clippy::panic)]

mod candle;
mod cases;
mod commands;
mod files;
mod machine;
mod naive;
mod refused;
mod rotary;
