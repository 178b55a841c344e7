//! What is below the cache: a sequence starts with what is there, and is stored there when it has finished.

use anyhow::Result;
use paged_attention::{BlockTable, SequenceId};

use super::state::Engine;

/// The most that is read from the tier before a step, so that running sequences do not wait long for a prompt that is
/// long. The rest is computed.
const MAX_BYTES: usize = 1 << 30;

impl Engine<'_> {
    /// Starts a sequence with what the cache and the tier have of its tokens.
    pub(super) fn match_prefix(&mut self, table: &mut BlockTable, sequence: usize) {
        let sequence = &mut self.sequences[sequence];
        let mut matched = table.match_prefix(&sequence.tokens);
        if let Some(tier) = self.tier {
            let fetched = table.fetch(tier, &sequence.tokens, MAX_BYTES);
            // What does not fit, or cannot be written, is computed.
            let inserted = table.insert(&fetched).unwrap_or(0);
            matched = table.len();
            self.outcome.tier_tokens += inserted;
        }
        sequence.count_matched(matched);
    }

    /// Stores a finished sequence.
    pub(super) fn store(&mut self, id: SequenceId) -> Result<()> {
        let Some(tier) = self.tier else { return Ok(()) };
        let [stored, failed] = &mut self.outcome.tier_blocks;
        match self.tables.check_out(id)?.store_prefix(tier) {
            Ok(blocks) => *stored += blocks.new,
            // A sequence that cannot be stored is computed again another time.
            Err(_) => *failed += 1,
        }
        Ok(())
    }
}
