//! The tokens that end an answer.

use anyhow::Result;

use super::vocabulary::Vocabulary;
use crate::metadata::Metadata;

/// The names of ends. Many models have two, that of a text and that of a turn, and many files name only one of them.
const NAMES: [&str; 8] = [
    "<|eot_id|>",      // Llama 3
    "<|eom_id|>",      // Llama 3.1, after a call of a tool
    "<|end_of_text|>", // Llama 3
    "<|im_end|>",      // Qwen, and all of ChatML
    "<|endoftext|>",   // Qwen, Phi
    "<|end|>",         // Phi-3
    "<end_of_turn>",   // Gemma
    "<EOT>",           // DeepSeek Coder
];

/// The ids of all ends that the file names by a key, or has as control tokens with one of the names.
///
/// # Errors
///
/// If a key is wrong.
pub(super) fn ends(vocabulary: &Vocabulary<'_>, metadata: &Metadata<'_>) -> Result<Vec<u32>> {
    let mut ends = Vec::new();
    for key in ["eos", "eot", "eom"] {
        ends.extend(vocabulary.id(metadata, &format!("tokenizer.ggml.{key}_token_id"))?);
    }
    if let Some(ids) = metadata.integers("tokenizer.ggml.eos_token_ids")? {
        ends.extend(ids.into_iter().filter_map(|id| u32::try_from(id).ok()));
    }
    ends.extend(vocabulary.specials().filter(|(_, token)| NAMES.contains(token)).map(|(id, _)| id));
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}
