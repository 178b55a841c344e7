//! Which block is which: namespaces, and the places of blocks in their prefixes.

use std::collections::BTreeMap;

use block_pool::{PrefixKey, SaltFrom};

use crate::keys::{Bits, Keys};

/// Everything that the keys and values of the same tokens depend on: another namespace finds nothing.
///
/// These are the model's weights (a digest of its file), its rotary parameters, the type and the layout of the numbers
/// with its version, the groups of layers with their shapes and windows, and how attention rounds, since later layers
/// depend on it. The size of a block, the format of the file and the byte order are added by the tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespace(pub(crate) Bits);

impl Namespace {
    /// The namespace of these facts, each with a label. Their order does not matter; of two with the same label the
    /// later one counts.
    pub fn new<'a>(facts: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let facts: BTreeMap<&str, &[u8]> = facts.into_iter().collect();
        let mut hasher = blake3::Hasher::new_derive_key("paged-kv-disk 1 namespace");
        for (label, value) in facts {
            for part in [label.as_bytes(), value] {
                hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
            }
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// The blocks of a sequence, one after the other.
#[derive(Clone)]
pub struct Prefix {
    keys: Keys,
    block_size: usize,
    /// What the name of the next block is made from: the name of the block before, and salts.
    chain: Bits,
    /// The name of the block before the next one.
    before: Bits,
    /// The salts so far, if there are any: what the key of the next block is derived from.
    salts: Option<blake3::Hasher>,
}

/// The place of a block: in all groups of layers, the tokens of one block and everything before them.
#[derive(Clone)]
pub struct Place {
    pub(crate) name: Bits,
    pub(crate) parent: Bits,
    pub(crate) tokens: Box<[u32]>,
    /// The key of blocks under a salt.
    pub(crate) seal: Option<Bits>,
}

impl Prefix {
    pub(crate) fn new(keys: &Keys, block_size: usize, key: &PrefixKey) -> Self {
        let mut hasher = keys.names();
        hasher.update(b"first");
        if let Some(window) = key.window {
            for number in [window.tokens(), window.sink_tokens()] {
                hasher.update(&(number as u64).to_le_bytes());
            }
        }
        let chain = *hasher.finalize().as_bytes();
        let mut prefix = Self { keys: keys.clone(), block_size, chain, before: chain, salts: None };
        if let Some(salt) = key.salt.bytes() {
            prefix.add_salt(u64::MAX, salt);
        }
        prefix
    }

    /// The place of the next block, which has these tokens, and in which these salts of the sequence begin (those whose
    /// positions are within the block).
    ///
    /// The tokens are `block_size` many; with any other number the place is one that is never stored.
    pub fn next(&mut self, tokens: &[u32], salts: &[SaltFrom]) -> Place {
        for SaltFrom { position, salt } in salts {
            if let Some(bytes) = salt.bytes() {
                self.add_salt(*position as u64, bytes);
            }
        }
        let mut hasher = self.keys.names();
        hasher.update(b"block").update(&self.chain);
        tokens.iter().for_each(|token| {
            hasher.update(&token.to_le_bytes());
        });
        let name = *hasher.finalize().as_bytes();
        self.chain = name;
        let parent = std::mem::replace(&mut self.before, name);
        let seal = self.salts.as_ref().map(|salts| *salts.finalize().as_bytes());
        Place { name, parent, tokens: tokens.into(), seal }
    }

    /// Tokens in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// From the next block on everything depends on this salt, too.
    fn add_salt(&mut self, position: u64, salt: &[u8]) {
        let salts = self.salts.get_or_insert_with(|| self.keys.seals());
        salts.update(&position.to_le_bytes()).update(&(salt.len() as u64).to_le_bytes()).update(salt);
        let mut hasher = self.keys.names();
        // The key of the blocks, which nobody has without the salts.
        hasher.update(b"salts").update(&self.chain).update(salts.finalize().as_bytes());
        self.chain = *hasher.finalize().as_bytes();
    }
}

impl Place {
    /// Whether it is under a salt, and so encrypted.
    pub fn is_salted(&self) -> bool {
        self.seal.is_some()
    }

    /// The tokens of the block.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

impl std::fmt::Debug for Prefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prefix").field("block_size", &self.block_size).finish_non_exhaustive()
    }
}

/// Without the name and the key of blocks under a salt.
impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").field("is_salted", &self.is_salted()).finish_non_exhaustive()
    }
}
