//! Actions that make sequences longer.

use block_table::{BlockTable, GroupBlock, ReserveError, Salt, SaltFrom, SaltTooLate};
use proptest::prelude::*;

use crate::Check;
use crate::model::{Model, in_group, options, salts, stream, written};
use crate::router::Router;
use crate::world::{World, block, blocks};

impl World {
    /// An empty table, and its salts.
    fn salted(&self, kind: usize, number: usize) -> (BlockTable, Vec<SaltFrom>) {
        let (mut table, salts) = (BlockTable::with_options(&self.pool, &options(kind)), salts(number));
        for SaltFrom { position, salt } in salts.clone() {
            table.salt_from(position, salt).unwrap();
        }
        (table, salts)
    }

    pub(crate) fn create(&mut self, kind: usize, prompt: usize, branch: u32, salts: usize) -> Check {
        let (table, salts) = self.salted(kind, salts);
        let (stream, era) = (stream(prompt, branch), self.era);
        let model = Model { stream, written: vec![], kind, era, salts, freed: 0, private: None };
        self.tables.push((table, model));
        self.match_prefix(self.tables.len() - 1)
    }

    /// A look-up uses nothing, and tells what a match and a reservation right after it use.
    pub(crate) fn look_up(&mut self, kind: usize, prompt: usize, branch: u32, salts: usize) -> Check {
        let (mut table, salts) = self.salted(kind, salts);
        let stream = stream(prompt, branch);
        let before = self.before();
        let expected = table.lookup_prefix(&stream);
        prop_assert_eq!(&before, &self.before());
        let (views, block_size) = (self.config.views(kind), self.pool.block_size());
        let (least, most) = self.router.matchable(kind, &salts, &stream, 0, &views, block_size);
        prop_assert!((least..=most).contains(&expected.tokens), "{} of {}..={}", expected.tokens, least, most);
        let matched = table.match_prefix(&stream);
        let used = blocks(&table).iter().map(Vec::len).sum();
        prop_assert_eq!((expected.tokens, expected.in_use + expected.evictable), (matched, used));
        let matched_only = self.before();
        match table.reserve(stream.len() - matched) {
            Ok(()) => prop_assert_eq!(before.available.checked_sub(expected.blocks), Some(self.pool.available())),
            Err(error) => {
                if let ReserveError::OutOfBlocks(_) = error {
                    prop_assert!(expected.blocks > before.available);
                }
                self.check_refusal(&error, &matched_only)?;
            }
        }
        Ok(())
    }

    /// A salt can begin at any position whose token is not committed.
    pub(crate) fn salt_from(&mut self, t: usize, ahead: usize, salt: usize) -> Check {
        let (table, model) = &mut self.tables[t];
        let (len, salt) = (table.len(), Salt::new([&b"a"[..], b"b"][salt]));
        let position = (len + ahead).saturating_sub(2);
        let done = table.salt_from(position, salt.clone());
        if position < len {
            prop_assert_eq!(done, Err(SaltTooLate { position, len }));
            return Ok(());
        }
        prop_assert_eq!(done, Ok(()));
        let salt = SaltFrom { position, salt };
        if !model.salts.contains(&salt) {
            model.salts.push(salt);
            model.salts.sort_by_key(|salt| salt.position);
        }
        Ok(())
    }

    /// Continues a sequence with cached blocks, and checks that they have what the sequence would have computed.
    pub(crate) fn match_prefix(&mut self, t: usize) -> Check {
        let (era, block_size) = (self.era, self.pool.block_size());
        let (table, model) = &mut self.tables[t];
        let had = table.len();
        prop_assert_eq!(had, model.written.len());
        let expected = table.lookup_prefix(&model.stream);
        let views = self.config.views(model.kind);
        let (least, most) = match model.private.is_none() && is_continued(table, &self.router) {
            true => self.router.matchable(model.kind, &model.salts, &model.stream, had, &views, block_size),
            false => (had, had),
        };
        let reached = had + expected.tokens;
        prop_assert!((least..=most).contains(&reached), "{} of {}..={}", reached, least, most);
        let matched = table.match_prefix(&model.stream);
        prop_assert!(matched == 0 || model.private.is_none(), "a table that was overwritten is not continued");
        prop_assert_eq!(table.len(), had + matched);
        prop_assert_eq!(expected.tokens, matched);
        prop_assert!(matched == 0 || table.len() < model.stream.len(), "the last token is not matched");
        if matched > 0 {
            prop_assert!(had == 0 || model.era == era, "what was computed before a reset is not continued");
            model.era = era;
        }
        for position in had..table.len() {
            model.written.push(written(model.kind, era, &model.salts, &model.stream[..=position]));
        }
        Ok(())
    }

    /// Reserves, and returns whether that worked.
    pub(crate) fn reserve(&mut self, t: usize, n: usize) -> Result<bool, TestCaseError> {
        let before = self.before();
        let table = &mut self.tables[t].0;
        let had = blocks(table);
        match table.reserve(n) {
            Ok(()) => prop_assert!(table.capacity() >= table.len() + n),
            Err(error) => {
                prop_assert_eq!(had, blocks(table));
                self.check_refusal(&error, &before)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reserves some tokens, writes them in all groups, and commits some of them.
    pub(crate) fn step(&mut self, t: usize, reserve: usize, commit: usize, known: bool, roll_back: bool) -> Check {
        if !self.reserve(t, reserve)? {
            return Ok(());
        }
        let (table, model) = &mut self.tables[t];
        let computed = table.len();
        if computed == 0 {
            model.era = self.era;
        }
        while model.stream.len() < computed + reserve {
            self.serial += 1;
            model.stream.push(self.serial % 3);
        }
        for position in computed..computed + reserve {
            let what = written(model.kind, model.era, &model.salts, &model.stream[..=position]);
            for (group, slots) in self.slots.iter().enumerate() {
                slots.write(table.slot_of_group(group, position).unwrap(), in_group(group, what));
            }
            if position < computed + commit {
                model.written.push(what);
            }
        }
        let committed = commit.min(reserve);
        let tokens = model.stream[computed..computed + committed].to_vec();
        // Tokens that were not committed are not part of the stream.
        model.stream.truncate(model.stream.len().max(computed + committed));
        if known {
            table.commit_tokens(&tokens).unwrap()
        } else {
            table.commit(committed).unwrap()
        }
        let reserved = table.capacity() - table.len();
        prop_assert!(table.commit(reserved + 1).is_err());
        prop_assert!(table.commit_tokens(&vec![0; reserved + 1]).is_err());
        if roll_back {
            table.roll_back();
        }
        Ok(())
    }
}

/// Whether cached blocks can follow those of a table: it ends with a cached block, and nothing is reserved after it.
fn is_continued(table: &BlockTable, router: &Router) -> bool {
    let Some(last) = table.len().checked_sub(1).map(|at| at / table.pool().block_size()) else {
        return table.capacity() == 0;
    };
    let of_group = |group| Some(GroupBlock { group, block: block(table, group, last)? });
    let mut blocks = (0..table.pool().groups().len()).filter_map(of_group);
    table.capacity() == table.len() && blocks.any(|block| router.has(block))
}
