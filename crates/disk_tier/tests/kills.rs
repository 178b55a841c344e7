//! A process is killed at any instant, while it stores and blocks leave. What it had stored is found, and all that is
//! found is right.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]
#![cfg(unix)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{found, geometry, mix, namespace, store};
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

/// `DISK_TIER_KILLS` sets how many there are.
#[test]
fn killed_writers_leave_whole_blocks() {
    let kills = std::env::var("DISK_TIER_KILLS").map_or(12, |kills| kills.parse().unwrap());
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let (mut blocks, mut damaged, mut wrapped) = (0, 0, false);
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "stores_until_it_is_killed"])
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
