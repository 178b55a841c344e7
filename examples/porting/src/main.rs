//! What `docs/porting.md` describes: the same decoder before (`before`, on candle-nn's contiguous cache, one sequence at
//! a time) and after (`after`, on the paged cache, any number of sequences in one step). `parts` is what does not change.
//!
//! `cargo run --release -p porting`

mod after;
mod before;
mod parts;

use candle_core::Result;
use paged_attention::{BlockTable, KvCache};
use parts::{Parts, VOCABULARY};

/// The most likely token of each row of logits.
fn likeliest(logits: &candle_core::Tensor) -> Result<Vec<u32>> {
    logits.argmax(candle_core::D::Minus1)?.to_vec1()
}

/// Generates `n` tokens after each prompt, in one batch.
fn generate(model: &after::Model, cache: &KvCache, prompts: &[Vec<u32>], n: usize) -> Result<Vec<Vec<u32>>> {
    let mut tables: Vec<BlockTable> = prompts.iter().map(|_| cache.table()).collect();
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut next: Vec<Vec<u32>> = prompts.to_vec();
    for _ in 0..n {
        let mut step = cache.step();
        for (table, tokens) in tables.iter_mut().zip(&next) {
            step.push(table, tokens).map_err(candle_core::Error::wrap)?;
        }
        let tokens = likeliest(&model.forward(&step)?)?;
        step.commit().map_err(candle_core::Error::wrap)?;
        answers.iter_mut().zip(&tokens).for_each(|(answer, token)| answer.push(*token));
        next = tokens.into_iter().map(|token| vec![token]).collect();
    }
    Ok(answers)
}

/// The same, one sequence at a time.
fn generate_before(model: &mut before::Model, prompt: &[u32], n: usize) -> Result<Vec<u32>> {
    model.clear();
    let (mut answer, mut next, mut position) = (Vec::new(), prompt.to_vec(), 0);
    for _ in 0..n {
        let token = likeliest(&model.forward(&next, position)?)?[0];
        position += next.len();
        answer.push(token);
        next = vec![token];
    }
    Ok(answer)
}

fn main() -> Result<()> {
    let prompts: Vec<Vec<u32>> =
        [3, 40, 17].iter().map(|&n| (0..n).map(|i| (i * 29 + n) % VOCABULARY as u32).collect()).collect();
    let mut before = before::Model::new(Parts::random()?);
    let after = after::Model::new(Parts::random()?)?;
    let cache = KvCache::builder(after.shape()).blocks(64).build().map_err(candle_core::Error::wrap)?;
    let answers = generate(&after, &cache, &prompts, 30)?;
    for (prompt, answer) in prompts.iter().zip(&answers) {
        let same = generate_before(&mut before, prompt, 30)? == *answer;
        println!("a prompt of {} tokens: {}", prompt.len(), if same { "the same 30 tokens" } else { "other tokens" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_on_the_paged_cache_says_what_each_sequence_says_on_the_contiguous_one() -> Result<()> {
        let prompts: Vec<Vec<u32>> =
            [1, 33, 16, 64].iter().map(|&n| (0..n).map(|i| (i * 31 + n) % VOCABULARY as u32).collect()).collect();
        let mut before = before::Model::new(Parts::random()?);
        let after = after::Model::new(Parts::random()?)?;
        for block_size in [1, 16] {
            let cache = KvCache::builder(after.shape()).blocks(512 / block_size).block_size(block_size).build();
            let cache = cache.map_err(candle_core::Error::wrap)?;
            let answers = generate(&after, &cache, &prompts, 40)?;
            for (prompt, answer) in prompts.iter().zip(answers) {
                assert_eq!(generate_before(&mut before, prompt, 40)?, answer, "blocks of {block_size}");
            }
        }
        Ok(())
    }

    /// The page shows the attention of both models as it is compiled here.
    #[test]
    fn the_page_shows_this_code() {
        let page = include_str!("../../../docs/porting.md");
        for source in [include_str!("before.rs"), include_str!("after.rs")] {
            let shown: Vec<&str> = source.split("// shown").skip(1).step_by(2).collect();
            assert_eq!(shown.len(), 1);
            for line in shown[0].lines().map(str::trim).filter(|line| !line.is_empty()) {
                assert!(page.lines().any(|of_page| of_page.trim() == line), "{line}");
            }
        }
    }
}
