//! A prompt whose keys and values are in the pool, or in a tier below it, instead of computed: the time to its first
//! token, with a real model. And what it costs others when blocks are written through to a tier while they decode.
//!
//! `cargo bench -p benches --bench tiers` runs all of it.

mod decode;
mod device;
mod first_token;
mod world;

use anyhow::Result;
use benches::{Record, is_smoke_test};
use paged_attention::KvDtype;

use world::World;

fn main() -> Result<()> {
    let world = World::load(if is_smoke_test() { 100 } else { 4096 })?;
    let mut record = Record::default();
    for dtype in [KvDtype::F32, KvDtype::F16] {
        first_token::measure(&world, dtype, &mut record)?;
    }
    decode::with_write_through(&world, &mut record)?;
    record.write("tiers")
}
