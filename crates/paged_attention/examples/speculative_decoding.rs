//! Speculative decoding: a cheap guess of the next tokens is checked in one step, and what is wrong is rolled back.

mod toy_model;

use paged_attention::{KvCache, KvShape, Logits, PushOptions};
use toy_model::{HEAD_DIM, KV_HEADS, ToyModel};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = ToyModel::new(2)?;
    let cache = KvCache::builder(KvShape::new(2, KV_HEADS, HEAD_DIM)).blocks(64).build()?;
    let mut table = cache.table();
    let mut tokens: Vec<u32> = vec![5, 9, 5, 9, 5];
    let (mut steps, mut accepted_drafts) = (0, 0);

    while tokens.len() < 60 {
        // The draft: what followed the last time that the last token came (prompt look-up).
        let last = tokens[tokens.len() - 1];
        let before = tokens[..tokens.len() - 1].iter().rposition(|token| *token == last);
        let draft: Vec<u32> = before.map_or(vec![], |at| tokens[at + 1..].iter().take(3).copied().collect());

        // The tokens that are known, then the draft; the logits of all of them.
        let computed = table.len();
        let pushed = [&tokens[computed..], &draft].concat();
        let known = pushed.len() - draft.len();
        let mut step = cache.step();
        step.push_with(&mut table, &pushed, &PushOptions::default().logits(Logits::All))?;
        let next = model.forward(&step)?;

        // The model's own token after each row; as long as the draft agrees, it is what the model would have said.
        let says = &next[known - 1..];
        let agree = draft.iter().zip(says).take_while(|(draft, says)| draft == says).count();
        step.commit_accepted(&[known + agree])?; // the rest is rolled back, and its blocks are freed
        tokens.extend(&says[..=agree]);
        (steps, accepted_drafts) = (steps + 1, accepted_drafts + agree);
    }
    println!("{} tokens in {steps} steps, {accepted_drafts} of them guessed", tokens.len());
    assert_eq!(table.len(), tokens.len() - 1);
    Ok(())
}
