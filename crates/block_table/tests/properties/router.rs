//! What the receiver of a pool's events knows, and which prefixes can be matched according to that.

use std::collections::{HashMap, HashSet};

use block_table::{GroupBlock, KvEvent, PrefixKey, SaltFrom};
use proptest::prelude::*;

use crate::Check;
use crate::config::View;
use crate::model::{before, options};

/// The prefix of each stored block.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Router(HashMap<GroupBlock, Prefix>);

#[derive(Debug, Clone, PartialEq)]
struct Prefix {
    key: PrefixKey,
    salts: Vec<SaltFrom>,
    tokens: Vec<u32>,
}

impl Router {
    /// Does what a router does with an event. `ordered` are the groups whose tokens see all tokens before them: there,
    /// no block is removed before those that follow it, unless there are `orphans`.
    pub(crate) fn apply(&mut self, event: KvEvent, ordered: &[bool], orphans: bool) -> Check {
        match event {
            KvEvent::BlockStored { group, block, parent, tokens, key, salts } => {
                let mut prefix = match parent {
                    Some(parent) => self.0.get(&parent).ok_or(TestCaseError::fail("no parent"))?.clone(),
                    None => Prefix { key: key.clone(), salts: vec![], tokens: vec![] },
                };
                prop_assert_eq!(&prefix.key, &key);
                let positions = prefix.tokens.len()..prefix.tokens.len() + tokens.len();
                prop_assert!(salts.iter().all(|salt| positions.contains(&salt.position)));
                prefix.tokens.extend(tokens);
                prefix.salts.extend(salts);
                let stored = self.0.insert(GroupBlock { group, block }, prefix);
                prop_assert_eq!(stored, None, "stored twice");
            }
            KvEvent::BlockRemoved { group, block } => {
                let Some(removed) = self.0.remove(&GroupBlock { group, block }) else {
                    return Err(TestCaseError::fail("removed, but not stored"));
                };
                let mut others = self.0.iter().filter(|(id, _)| id.group == group);
                let is_orphan = |(_, other): (_, &Prefix)| {
                    other.key == removed.key
                        && other.tokens.starts_with(&removed.tokens)
                        && before(&other.salts, removed.tokens.len()) == removed.salts
                };
                prop_assert!(
                    removed.key.window.is_some() || !ordered[group] || orphans || !others.any(is_orphan),
                    "a parent was removed before its child"
                );
            }
            KvEvent::AllBlocksCleared => self.0.clear(),
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
        Ok(())
    }

    pub(crate) fn has(&self, block: GroupBlock) -> bool {
        self.0.contains_key(&block)
    }

    pub(crate) fn stored(&self) -> impl Iterator<Item = GroupBlock> + '_ {
        self.0.keys().copied()
    }

    /// Up to which length sequences of this kind can be continued with cached blocks, when their salts and tokens are
    /// `salts` and `stream`, and they have the blocks of the first `had` tokens: in whole blocks, and with a part of the last block.
    pub(crate) fn matchable(
        &self,
        kind: usize,
        salts: &[SaltFrom],
        stream: &[u32],
        had: usize,
        views: &[View],
        block_size: usize,
    ) -> (usize, usize) {
        let mut key = PrefixKey::new().salt(options(kind).salt);
        key.window = options(kind).window;
        // Only prefixes with the same salts in all blocks that they have in common with the sequence.
        let stored: HashSet<(usize, &[u32], &[SaltFrom])> = self
            .0
            .iter()
            .filter(|(_, of)| of.key == key)
            .map(|(id, of)| (id.group, &of.tokens[..], &of.salts[..]))
            .collect();
        let same_salts = |n: usize, of: &[SaltFrom]| {
            let end = n.next_multiple_of(block_size);
            before(of, end) == before(salts, end)
        };
        let whole = |group: usize, block: usize| {
            let end = (block + 1) * block_size;
            block < had / block_size || stored.contains(&(group, &stream[..end], before(salts, end)))
        };
        // The last block has a part of the tokens if the match ends inside it: the same block in all groups.
        let part = |n: usize| {
            let is_last = |(_, prefix, of): &&(usize, &[u32], &[SaltFrom])| {
                prefix.len() == n.next_multiple_of(block_size) && prefix.starts_with(&stream[..n]) && same_salts(n, of)
            };
            let in_all = |(_, prefix, of): &(usize, &[u32], &[SaltFrom])| {
                (0..views.len()).all(|group| stored.contains(&(group, *prefix, *of)))
            };
            n.is_multiple_of(block_size) || stored.iter().filter(is_last).any(in_all)
        };
        let all_seen = |n: usize| {
            let seen = |view: &View, block: usize| view.sees(n, block * block_size..(block + 1) * block_size);
            let of_group = |(group, view): (usize, &View)| {
                (0..n / block_size).filter(|&block| seen(view, block)).all(|block| whole(group, block))
            };
            views.iter().enumerate().all(of_group)
        };
        // The path through blocks that windows have passed must be in the tree, too.
        let leads =
            |n: usize| stored.iter().any(|(_, prefix, of)| prefix.starts_with(&stream[..n]) && same_salts(n, of));
        let can_end = |n: &usize| *n == had || (part(*n) && leads(*n) && all_seen(*n));
        let known = stream.len().saturating_sub(1).max(had);
        let most = (had..=known).rev().find(can_end).unwrap_or(had);
        let least = (had..=known).rev().filter(|n| n.is_multiple_of(block_size)).find(can_end).unwrap_or(had);
        (least, most)
    }
}
