//! Models whose layers differ, of the shapes of Gemma 2, 3 and 4, with random weights: through one cache with two groups
//! of layers, every row of logits and every greedy token is that of a reference, which computes each sequence alone.
//!
//! `decoder` computes the models with [`Step::attend`](paged_attention::Step::attend). The references are candle's own
//! models with the same weights, fed token by token (`gemma3` and `gemma4` say why), and for Gemma 2, which candle
//! computes without alternating windows, dense attention in plain f64 (`dense`), checked against candle where candle has
//! the windows (`gemma2`).

#![allow(clippy::unwrap_used, clippy::panic)]

mod decoder;
mod dense;
mod gemma2;
mod gemma3;
mod gemma4;
mod machine;
mod reference;
mod scenarios;
mod weights;

/// Each scenario is a test for each model, and runs with each of the block sizes.
macro_rules! tests {
    ($model:ident: $($test:ident = $scenario:path;)*) => {
        $(#[test]
        fn $test() {
            for block_size in machine::BLOCK_SIZES {
                $scenario(crate::$model::model(), block_size);
            }
        })*
    };
    ($($model:ident),*) => {
        $(mod $model {
            use crate::{machine, scenarios};

            tests! {
                $model:
                sequences_can_join_at_any_step = scenarios::joins::run;
                forks_continue_with_different_tokens = scenarios::forks::run;
                rejected_drafts_are_truncated = scenarios::drafts::truncated;
                rejected_drafts_are_not_committed = scenarios::drafts::not_committed;
                a_refused_truncation_changes_nothing = scenarios::drafts::refused;
                sequences_start_with_cached_prefixes = scenarios::prefixes::run;
                prompts_are_computed_in_chunks_of_any_size = scenarios::chunks::run;
                sequences_are_dropped_and_computed_again_in_a_small_pool = scenarios::small_pools::run;
            }
        })*
    };
}

mod tests {
    tests!(gemma2, gemma3, gemma4);
}
