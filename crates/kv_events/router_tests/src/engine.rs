//! An engine: a pool, tables, and a publisher. The model is left out, since no number of it matters here.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use block_table::{BlockPool, BlockTable, Offload, OffloadOptions, PrefixKey, Salt, TableOptions, Tier as _};
use disk_tier::{DiskTier, Geometry, Namespace, Options};
use kv_events::{Medium, PublishedTier, Publisher};

use crate::BLOCK_SIZE;

/// Computes prompts, and publishes which blocks it has cached.
#[derive(Debug)]
pub struct Engine {
    pool: BlockPool,
    publisher: Publisher,
    tier: Option<(Arc<DiskTier>, Offload)>,
}

impl Engine {
    /// Starts an engine with so many blocks, whose publisher keeps so many batches for replays.
    ///
    /// # Errors
    ///
    /// When the publisher cannot start.
    pub fn start(blocks: usize, buffered_batches: usize) -> Result<Self, Box<dyn Error>> {
        let pool = BlockPool::new(blocks, BLOCK_SIZE)?;
        let publisher = Publisher::builder("tcp://127.0.0.1:0")
            .replay_endpoint("tcp://127.0.0.1:0")
            .buffered_batches(buffered_batches)
            .start(&pool)?;
        Ok(Self { pool, publisher, tier: None })
    }

    /// The same, over a file with room for so many blocks, which gets all that is cached.
    ///
    /// # Errors
    ///
    /// When the publisher cannot start, or the file cannot be opened.
    pub fn start_over(file: &Path, room: u64, blocks: usize) -> Result<Self, Box<dyn Error>> {
        let pool = BlockPool::new(blocks, BLOCK_SIZE)?;
        let geometry = Geometry { block_size: BLOCK_SIZE, bytes: vec![0] };
        // A header, and a page for each block.
        let options = Options::new(4096 * (1 + room));
        let tier = Arc::new(DiskTier::open(file, &Namespace::new([]), &geometry, &options)?);
        let published = PublishedTier::new(tier.clone(), &pool, Medium::Storage).ok_or("the tier cannot be watched")?;
        let published = Arc::new(published);
        let publisher = Publisher::builder("tcp://127.0.0.1:0")
            .replay_endpoint("tcp://127.0.0.1:0")
            .tier(published.clone())
            .start(&pool)?;
        let offload = pool.offload_to(published, &OffloadOptions::default().write_through(true))?;
        Ok(Self { pool, publisher, tier: Some((tier, offload)) })
    }

    /// How many blocks at the start of a prompt are in the file, by its own account.
    pub fn blocks_on_disk(&self, prompt: &[u32]) -> usize {
        let Some((tier, offload)) = &self.tier else { return 0 };
        offload.flush();
        let mut cursor = tier.cursor(&PrefixKey::new());
        let has = |tokens: &&[u32]| {
            cursor.advance(tokens, &[]);
            cursor.contains(0)
        };
        prompt.chunks_exact(BLOCK_SIZE).take_while(has).count()
    }

    /// Computes a prompt, as one does with a prefix cache: what is cached is used. Its blocks stay cached.
    ///
    /// # Errors
    ///
    /// When the pool has too few blocks.
    pub fn compute(&self, prompt: &[u32], salt: Salt) -> Result<(), Box<dyn Error>> {
        let mut table = BlockTable::with_options(&self.pool, &TableOptions::default().salt(salt));
        let matched = table.match_prefix(prompt);
        table.reserve(prompt.len() - matched)?;
        table.commit_tokens(&prompt[matched..])?;
        Ok(())
    }

    /// How many blocks at the start of a prompt are cached, by the pool's own account. Routers count full blocks, also
    /// of the last token; the pool never matches the last token. So it is asked for one token more.
    pub fn cached_blocks(&self, prompt: &[u32], salt: Salt) -> usize {
        let longer = [prompt, &[u32::MAX]].concat();
        self.pool.lookup_prefix(&PrefixKey::new().salt(salt), &longer).tokens / BLOCK_SIZE
    }

    /// Forgets all that is cached.
    pub fn reset(&self) {
        self.pool.reset_prefix_cache();
    }

    /// How many blocks were evicted so far.
    pub fn evictions(&self) -> u64 {
        self.pool.stats().evictions
    }

    /// Where its events are.
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }
}
