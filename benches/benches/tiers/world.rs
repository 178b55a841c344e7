//! The model, its prompt, and the file of a tier for it.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use disk_tier::{DiskTier, Geometry, Namespace, Options};
use inference::engine::{Outcome, Progress, Request, Settings, generate_over};
use inference::model::{Gguf, Model};
use inference::model_file;
use inference::sampling::Sampling;
use inference::weights::fastest;
use paged_attention::{KvCache, KvDtype, Tier};

pub(crate) const BLOCK_SIZE: usize = 16;

pub(crate) struct World {
    pub(crate) model: Model,
    /// The tokens of the prompt.
    pub(crate) prompt: Vec<u32>,
    folder: tempfile::TempDir,
}

impl World {
    /// Loads the default model in the way that computes fastest here.
    pub(crate) fn load(tokens: usize) -> Result<Self> {
        let file = model_file::obtain(None, &|line| eprintln!("{line}"))?;
        let mut gguf = Gguf::open(&file.path)?;
        let longest = tokens + 512;
        let fastest = fastest(&mut gguf, longest)?;
        eprintln!("{fastest}");
        let model = Model::load(&mut gguf, fastest.weights, longest)?;
        let vocabulary = model.vocabulary() as u32;
        let prompt = (0..tokens as u32).map(|at| at.wrapping_mul(2_654_435_761) % vocabulary).collect();
        // Beside the results: the folder for temporary files may be in memory.
        std::fs::create_dir_all(benches::results())?;
        Ok(Self { model, prompt, folder: tempfile::tempdir_in(benches::results())? })
    }

    pub(crate) fn cache(&self, dtype: KvDtype, tokens: usize) -> Result<KvCache> {
        let blocks = tokens.div_ceil(BLOCK_SIZE) + 1;
        Ok(KvCache::builder_of(self.model.groups()).blocks(blocks).block_size(BLOCK_SIZE).dtype(dtype).build()?)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Opens the file of this name as a tier for caches like this one.
    pub(crate) fn tier(&self, name: &str, cache: &KvCache, direct: bool) -> Result<Arc<DiskTier>> {
        let namespace = Namespace::new([("blocks", cache.block_identity().as_bytes())]);
        let options = Options::new(8 << 30).direct_reads(direct);
        Ok(Arc::new(DiskTier::open(self.file(name), &namespace, &Geometry::of(cache.pool()), &options)?))
    }

    pub(crate) fn generate(
        &self,
        cache: &KvCache,
        tier: Option<Arc<dyn Tier>>,
        requests: &[Request],
        progress: impl FnMut(Progress<'_>),
    ) -> Result<Outcome> {
        let settings =
            Settings { max_batch: 64, step_tokens: 512, samples: 1, seed: 0, sampling: Sampling::new(0.0, 1.0)? };
        generate_over(tier, &self.model, cache, requests, &settings, |_| false, progress)
    }
}
