//! The thread that stores blocks in the tier.

use std::sync::Arc;

use super::queue::{Done, Evicted, Queue, Work};
use crate::prefix::Lineage;
use crate::{BlockPool, GroupBlock, StorageError, Tier, TierCursor};

/// Stores what comes until the queue is closed.
pub(super) fn run(pool: &BlockPool, tier: &dyn Tier, queue: &Queue) {
    // Also if the tier panics: no one must wait for this thread then.
    let _abandoned = AbandonedAtEnd(queue);
    let mut place = Place { tier, at: None };
    let mut bytes = Vec::new();
    while let Some(work) = queue.next() {
        match work {
            Work::Evicted(Evicted { group, lineage, bytes }) => {
                let done = done(place.store(&lineage, group, &bytes));
                queue.finish(done, Some(bytes));
            }
            Work::WrittenThrough(block) => {
                let GroupBlock { group, .. } = block.block;
                let done = if block.lineage.is_stored(group) || place.has(&block.lineage, group) {
                    Done::Already
                } else {
                    match pool.read_cached(&block, &mut bytes) {
                        Ok(true) => done(place.store(&block.lineage, group, &bytes)),
                        Ok(false) => Done::Gone,
                        Err(error) => failed(&error),
                    }
                };
                queue.finish(done, None);
            }
        }
    }
}

fn done(stored: Result<bool, StorageError>) -> Done {
    match stored {
        Ok(true) => Done::Stored,
        Ok(false) => Done::Already,
        Err(error) => failed(&error),
    }
}

fn failed(error: &StorageError) -> Done {
    tracing::debug!(%error, "a block could not be stored in a tier");
    Done::Failed
}

/// A place in the tier. Blocks mostly come in the order of their sequence, so it moves by one block.
struct Place<'t> {
    tier: &'t dyn Tier,
    at: Option<(Box<dyn TierCursor + 't>, Arc<Lineage>)>,
}

impl<'t> Place<'t> {
    fn store(&mut self, lineage: &Arc<Lineage>, group: usize, bytes: &[u8]) -> Result<bool, StorageError> {
        let stored = self.go_to(lineage).store(group, bytes)?;
        lineage.set_stored(group);
        Ok(stored)
    }

    fn has(&mut self, lineage: &Arc<Lineage>, group: usize) -> bool {
        let has = self.go_to(lineage).contains(group);
        if has {
            lineage.set_stored(group);
        }
        has
    }

    fn go_to(&mut self, lineage: &Arc<Lineage>) -> &mut (dyn TierCursor + 't) {
        let (mut cursor, path) = match self.at.take() {
            Some((cursor, at)) if Arc::ptr_eq(&at, lineage) => (cursor, Vec::new()),
            Some((cursor, at)) if lineage.follows(&at) => (cursor, vec![lineage]),
            _ => {
                let (key, path) = lineage.path();
                (self.tier.cursor(key), path)
            }
        };
        path.into_iter().for_each(|block| cursor.advance(&block.tokens, &block.salts));
        let (cursor, _) = self.at.insert((cursor, lineage.clone()));
        &mut **cursor
    }
}

struct AbandonedAtEnd<'q>(&'q Queue);

impl Drop for AbandonedAtEnd<'_> {
    fn drop(&mut self) {
        self.0.abandon();
    }
}
