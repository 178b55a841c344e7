//! A process is killed at any instant, while it stores and blocks leave. What it had stored is found, and all that is
//! found is right.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]
#![cfg(unix)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block_pool::{BlockId, BlockPool, BlockStorage, OffloadOptions, PoolGroup, StorageError};
use common::{BLOCK_SIZE, bytes, found, geometry, key, mix, namespace, store, tokens};
use disk_tier::{DiskTier, Options};
use tempfile::tempdir;

/// Not whole pages, and large enough that a kill hits writes.
const SIZES: [usize; 2] = [300_000, 70_001];
const SLOTS: u64 = 30;
const SEQUENCES: u64 = 24;
const BLOCKS: u64 = 4;
const WRITERS: u64 = 2;

fn open(path: &Path) -> DiskTier {
    let slot = (256 + 64 + SIZES[0] as u64).next_multiple_of(4096);
    DiskTier::open(path, &namespace("a"), &geometry(&SIZES), &Options::new(4096 + SLOTS * slot)).unwrap()
}

fn salt(sequence: u64) -> &'static str {
    ["", "salt"][sequence as usize % 2]
}

const CHILDREN: [&str; 2] = ["stores_until_it_is_killed", "a_pool_is_used_until_it_is_killed"];

/// `DISK_TIER_KILLS` sets how many there are.
#[test]
fn killed_writers_leave_whole_blocks() {
    let kills = std::env::var("DISK_TIER_KILLS").map_or(12, |kills| kills.parse().unwrap());
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let (mut blocks, mut damaged, mut wrapped) = (0, 0, false);
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", CHILDREN[kill as usize % CHILDREN.len()]])
            .env("DISK_TIER", &path)
            .env("DISK_TIER_SEED", kill.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 + mix(kill) % 200));
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "it ended by itself");
        let tier = open(&path);
        let whole: usize = (0..SEQUENCES).map(|sequence| found(&tier, sequence, BLOCKS, salt(sequence))).sum();
        wrapped |= tier.stats().bytes == 4096 + SLOTS * (256 + 64 + SIZES[0] as u64).next_multiple_of(4096);
        if wrapped {
            // All but what was being written.
            assert!(whole as u64 >= SLOTS - WRITERS, "kill {kill}: {whole} blocks");
        }
        (blocks, damaged) = (blocks + whole, damaged + tier.stats().damaged);
        store(&tier, SEQUENCES, 1, "");
        assert_eq!(found(&tier, SEQUENCES, 1, ""), SIZES.len());
    }
    assert!(wrapped, "no writer came to the end of the file");
    println!("{kills} kills: {blocks} blocks found and right, {damaged} torn ones noticed");
}

#[test]
#[ignore = "runs in a process of its own, until that is killed"]
fn stores_until_it_is_killed() {
    let tier = open(Path::new(&std::env::var("DISK_TIER").unwrap()));
    let seed: u64 = std::env::var("DISK_TIER_SEED").unwrap().parse().unwrap();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let tier = &tier;
            scope.spawn(move || {
                // Bounded, in case nobody kills it.
                for round in 0..20_000 {
                    let sequence = mix(seed << 40 | writer << 32 | round) % SEQUENCES;
                    store(tier, sequence, BLOCKS, salt(sequence));
                }
            });
        }
    });
}

/// The memory of the blocks of one group.
struct Bytes(Mutex<Vec<Vec<u8>>>, usize);

impl BlockStorage for Bytes {
    fn copy(&self, from: BlockId, to: BlockId) -> Result<(), StorageError> {
        let mut all = self.0.lock().unwrap();
        all[to.index()] = all[from.index()].clone();
        Ok(())
    }

    fn read(&self, id: BlockId, bytes: &mut Vec<u8>) -> Result<(), StorageError> {
        bytes.extend_from_slice(&self.0.lock().unwrap()[id.index()]);
        Ok(())
    }

    fn write(&self, id: BlockId, bytes: &[u8]) -> Result<(), StorageError> {
        self.0.lock().unwrap()[id.index()].copy_from_slice(bytes);
        Ok(())
    }

    fn bytes_per_block(&self) -> usize {
        self.1
    }
}

/// Sequences come and go in a small pool, whose blocks are evicted, or written through, or both.
#[test]
#[ignore = "runs in a process of its own, until that is killed"]
fn a_pool_is_used_until_it_is_killed() {
    const UNITS: usize = 20;
    let tier = Arc::new(open(Path::new(&std::env::var("DISK_TIER").unwrap())));
    let seed: u64 = std::env::var("DISK_TIER_SEED").unwrap().parse().unwrap();
    let storage = |len| Box::new(Bytes(Mutex::new(vec![vec![0; len]; UNITS]), len)) as Box<dyn BlockStorage>;
    let groups = SIZES.map(|len| (PoolGroup::new(1), storage(len)));
    let pool = BlockPool::with_groups(UNITS, BLOCK_SIZE, groups).unwrap();
    let options = OffloadOptions::default().write_through(mix(seed).is_multiple_of(2));
    let _offload = pool.offload_to(tier, &options).unwrap();
    for round in 0..20_000 {
        let sequence = mix(seed << 40 | round) % SEQUENCES;
        let (salt, all) = (salt(sequence), (0..BLOCKS).flat_map(|block| tokens(sequence, block)).collect::<Vec<u32>>());
        let mut blocks = pool.allocate(0).unwrap();
        let had = blocks.match_prefix(&key(salt), 0, &all) / BLOCK_SIZE;
        blocks.grow(BLOCKS as usize - had).unwrap();
        for number in had..BLOCKS as usize {
            for (group, &len) in SIZES.iter().enumerate() {
                blocks.write(group, number, &bytes(sequence, number as u64, group, salt, len)).unwrap();
            }
        }
        blocks.cache(&key(salt), had, &[], &all[had * BLOCK_SIZE..]).unwrap();
    }
}
