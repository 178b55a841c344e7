//! What all programs do first: the weights, the model, the cache and what is below it, from the arguments.

use std::path::Path;

use anyhow::{Result, ensure};
use disk_tier::{DiskTier, Geometry, Namespace, Options};
use indicatif::{ProgressBar, ProgressStyle};
use paged_attention::{KvCache, LayerGroup};

use crate::flags::CacheFlags;
use crate::memory::{gib, memory};
use crate::model::{Gguf, Model};
use crate::model_file;
use crate::shown::say;
use crate::weights::{self, Weights};

/// Builds the cache.
///
/// # Errors
///
/// If it needs more memory than this machine has, or cannot be built.
pub fn cache(flags: &CacheFlags, groups: Vec<LayerGroup>) -> Result<KvCache> {
    flags.check()?;
    let dtype = flags.kv_dtype.into();
    let of_group = |group: &LayerGroup| group.shape().bytes_per_block(flags.block_size, dtype).unwrap_or(usize::MAX);
    let bytes_per_block = groups.iter().map(of_group).fold(0, usize::saturating_add);
    pool_fits(flags.memory.unwrap_or_else(|| flags.blocks.saturating_mul(bytes_per_block)))?;
    let builder = KvCache::builder_of(groups).block_size(flags.block_size).dtype(dtype);
    let builder = match flags.memory {
        Some(bytes) => builder.memory(bytes),
        None => builder.blocks(flags.blocks),
    };
    Ok(builder.build()?)
}

impl CacheFlags {
    /// Refuses what can be refused without the model.
    ///
    /// # Errors
    ///
    /// If the pool or a block would hold nothing, or the pool is larger than this machine's memory.
    pub fn check(&self) -> Result<()> {
        ensure!(self.blocks > 0, "a pool of 0 blocks holds nothing");
        ensure!(self.block_size > 0, "a block of 0 tokens holds nothing");
        pool_fits(self.memory.unwrap_or_default())
    }
}

fn pool_fits(bytes: usize) -> Result<()> {
    let memory = memory();
    ensure!(bytes <= memory, "the pool would take {}, this machine has {}", gib(bytes), gib(memory));
    Ok(())
}

/// The kind of weights that is asked for; if none is, the fastest one, which is said.
///
/// # Errors
///
/// If a tensor cannot be read.
pub fn weights(asked: Option<Weights>, gguf: &mut Gguf, longest: usize) -> Result<Weights> {
    if let Some(weights) = asked {
        return Ok(weights);
    }
    let fastest = weights::fastest(gguf, longest)?;
    say(&fastest.to_string());
    Ok(fastest.weights)
}

/// Loads the model for sequences of at most `longest` tokens, and shows how far that is.
///
/// # Errors
///
/// As [`Model::load`].
pub fn load(gguf: &mut Gguf, weights: Weights, longest: usize) -> Result<Model> {
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} layers loaded")?;
    let bar = ProgressBar::no_length().with_style(style);
    let model = Model::load_with(gguf, weights, longest, |layers, all| {
        bar.set_length(all as u64);
        bar.set_position(layers as u64);
    });
    bar.finish_and_clear();
    model
}

/// Opens the file in which keys and values outlive the program, if there is to be one. They are only of use to the same
/// model with the same `weights`, for sequences whose rotation is the same: see [`load`] for `longest`.
///
/// # Errors
///
/// If the model's file cannot be read, or that of the tier cannot be opened.
pub fn prefix_cache(
    flags: &CacheFlags,
    model: &Path,
    gguf: &Gguf,
    weights: Weights,
    longest: usize,
    cache: &KvCache,
) -> Result<Option<DiskTier>> {
    let Some(path) = &flags.prefix_cache else { return Ok(None) };
    let rope = if gguf.config().has_long_factors(longest) { "long" } else { "usual" };
    let (digest, identity) = (model_file::sha256(model)?, cache.block_identity());
    // The other rotary parameters are in the model's file.
    let facts = [("model", &*digest), ("weights", weights.name()), ("rope", rope), ("blocks", &*identity)];
    let namespace = Namespace::new(facts.map(|(label, value)| (label, value.as_bytes())));
    let options = Options::new(flags.prefix_cache_size as u64);
    let tier = DiskTier::open(path, &namespace, &Geometry::of(cache.pool()), &options)?;
    say(&format!("prefix cache: {} ({} blocks)", path.display(), tier.stats().blocks));
    Ok(Some(tier))
}
