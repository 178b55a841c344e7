//! Blocks whose bytes follow from their tokens and salt, so that any of them can be checked.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, reason = "each test uses a part of it, and a test may panic")]

use block_pool::{PrefixKey, Salt};
use disk_tier::{Buffer, DiskTier, Geometry, Namespace, Options, Place};

pub(crate) const BLOCK_SIZE: usize = 4;

pub(crate) fn geometry(bytes: &[usize]) -> Geometry {
    Geometry { block_size: BLOCK_SIZE, bytes: bytes.to_vec() }
}

pub(crate) fn namespace(model: &str) -> Namespace {
    Namespace::new([("model", model.as_bytes())])
}

/// The size of a file with this many slots of one page.
pub(crate) fn limit(slots: u64) -> Options {
    Options::new(4096 + 4096 * slots)
}

/// The finaliser of splitmix64 (Steele et al. 2014).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The tokens of a block of a sequence.
pub(crate) fn tokens(sequence: u64, block: u64) -> [u32; BLOCK_SIZE] {
    std::array::from_fn(|i| mix((sequence << 20) | (block << 4) | i as u64) as u32)
}

/// The bytes that belong to a block.
pub(crate) fn bytes(sequence: u64, block: u64, group: usize, salt: &str, len: usize) -> Vec<u8> {
    let salt = salt.bytes().fold(7, |hash, byte| mix(hash ^ u64::from(byte)));
    let seed = mix(salt ^ ((sequence << 20) | (block << 4) | group as u64));
    (0..len as u64).map(|i| mix(seed ^ (i / 8)).to_le_bytes()[i as usize % 8]).collect()
}

/// A key with this salt; none if it is empty.
pub(crate) fn key(salt: &str) -> PrefixKey {
    match salt {
        "" => PrefixKey::new(),
        salt => PrefixKey::new().salt(Salt::new(salt.as_bytes())),
    }
}

/// The places of the first blocks of a sequence.
pub(crate) fn places(tier: &DiskTier, sequence: u64, blocks: u64, salt: &str) -> Vec<Place> {
    let mut prefix = tier.prefix(&key(salt));
    (0..blocks).map(|block| prefix.next(&tokens(sequence, block), &[])).collect()
}

/// Stores the first blocks of a sequence, in all groups.
pub(crate) fn store(tier: &DiskTier, sequence: u64, blocks: u64, salt: &str) {
    let mut buffer = Buffer::default();
    for (block, place) in (0..).zip(places(tier, sequence, blocks, salt)) {
        for (group, &len) in tier.geometry().bytes.iter().enumerate() {
            tier.store(&place, group, &bytes(sequence, block, group, salt, len), &mut buffer).unwrap();
        }
    }
}

/// How many of the blocks of a sequence are found. Those that are must be right.
pub(crate) fn found(tier: &DiskTier, sequence: u64, blocks: u64, salt: &str) -> usize {
    let (mut buffer, mut found) = (Buffer::default(), 0);
    for (block, place) in (0..).zip(places(tier, sequence, blocks, salt)) {
        for (group, &len) in tier.geometry().bytes.iter().enumerate() {
            if let Some(got) = tier.load(&place, group, &mut buffer) {
                assert!(got == bytes(sequence, block, group, salt, len), "block {block} of sequence {sequence}");
                found += 1;
            }
        }
    }
    found
}
