//! How much memory does one sequence take?

use anyhow::Result;
use benches::Record;
use paged_attention::BlockPool;

use crate::demand::CHUNK;
use crate::memory::{Memory, Sequence};
use crate::model::{BLOCK_SIZE, Model};

/// The units that one sequence takes.
#[derive(Default)]
struct Taken {
    /// After its last token was computed.
    end: usize,
    /// At most: after a chunk has got its slots, and before the window has passed the tokens before it.
    peak: usize,
}

fn prefill(pool: BlockPool, tokens: usize) -> Result<Taken> {
    let memory = Memory::shared(pool);
    let mut sequence = Sequence::new(&memory);
    let mut taken = Taken::default();
    while sequence.len() < tokens {
        let n = CHUNK.min(tokens - sequence.len());
        anyhow::ensure!(sequence.reserve(n)?, "the pool is too small for one sequence");
        taken.peak = taken.peak.max(memory.in_use());
        sequence.commit(n)?;
    }
    taken.end = memory.in_use();
    Ok(taken)
}

/// Units that hold all tokens in all layers.
fn enough_units(model: &Model, tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE) * model.units_of_all_layers()
}

/// The blocks of each layer of a small model. vLLM holds 672 and 832; without groups it would be 3,072.
pub(crate) fn five_to_one(record: &mut Record) -> Result<()> {
    const TOKENS: usize = 8192;
    let model = Model::five_to_one();
    // All layers have one shape, so a unit is a block of one layer.
    let taken = prefill(model.grouped(enough_units(&model, TOKENS))?, TOKENS)?;
    record.value(&format!("{}/end", model.name), "layer_blocks", taken.end as f64, "");
    record.value(&format!("{}/peak_{CHUNK}", model.name), "layer_blocks", taken.peak as f64, "");
    Ok(())
}

/// What a sequence takes after its prompt was computed, compared with a pool without groups.
pub(crate) fn compared_with_ungrouped(model: &Model, record: &mut Record) -> Result<()> {
    const TOKENS: usize = 32_768;
    let units = enough_units(model, TOKENS);
    let grouped = prefill(model.grouped(units)?, TOKENS)?.end;
    let ungrouped = prefill(model.ungrouped(units)?, TOKENS)?.end;
    let case = format!("{}/{}k", model.name, TOKENS / 1024);
    record.value(&case, "bytes_of_ungrouped", grouped as f64 / ungrouped as f64, "");
    Ok(())
}
