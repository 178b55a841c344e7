//! The memory of models whose layers differ: some see all tokens, others a sliding window of them.
//!
//! A pool with groups of layers frees the blocks that a window has passed, and gives their memory to any group. The
//! benchmark counts what that saves, and compares the one budget of all groups with the best fixed split of the same
//! memory between them. It is bookkeeping alone, except for one case that counts the memory of the process; no times are
//! measured.
//!
//! `cargo bench -p benches --bench hybrid` runs all of it.

mod demand;
mod fill;
mod memory;
mod model;
mod process;
mod shift;
mod single;

use anyhow::Result;
use benches::{Record, is_smoke_test};

use demand::Demand;
use model::Model;

fn main() -> Result<()> {
    let demand = if is_smoke_test() { Demand::small() } else { Demand::full() };
    let mut record = Record::default();
    single::five_to_one(&mut record)?;
    for model in [Model::gemma_3_27b(), Model::gpt_oss_20b(), Model::gemma_4_31b()] {
        single::compared_with_ungrouped(&model, &mut record)?;
    }
    let model = Model::gemma_3_27b();
    fill::until_refused(&model, &demand, "budget/long", demand.long, &mut record)?;
    fill::until_refused(&model, &demand, "budget/short", demand.short, &mut record)?;
    shift::from_long_to_short(&model, &demand, &mut record)?;
    process::memory_of_the_process(&mut record)?;
    record.write("hybrid")
}
