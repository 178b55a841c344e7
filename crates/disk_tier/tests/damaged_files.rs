//! A file that was damaged, cut or exchanged: a miss, or what was stored.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::Path;

use common::{found, geometry, limit, namespace, store};
use disk_tier::{DiskTier, OpenError};
use tempfile::tempdir;

/// A file of three blocks, one of them encrypted.
fn small_file(path: &Path) {
    let tier = open(path).unwrap();
    store(&tier, 1, 2, "");
    store(&tier, 2, 1, "salt");
}

fn open(path: &Path) -> Result<DiskTier, OpenError> {
    DiskTier::open(path, &namespace("a"), &geometry(&[50]), &limit(4))
}

/// How many of the three blocks are found, by a reader and by a writer. Then the file is used.
fn check(path: &Path, what: &str) -> usize {
    let reader = match DiskTier::open_read_only(path, &namespace("a"), &geometry(&[50]), &limit(4)) {
        Ok(reader) => reader,
        Err(OpenError::NotATier(_)) => return 0,
        Err(error) => panic!("{what}: {error}"),
    };
    let read = found(&reader, 1, 2, "") + found(&reader, 2, 1, "salt");
    drop(reader);
    let writer = match open(path) {
        Ok(writer) => writer,
        // As it is empty, it is no one's.
        Err(error) => panic!("{what}: {error}"),
    };
    let written = found(&writer, 1, 2, "") + found(&writer, 2, 1, "salt");
    assert_eq!(read, written, "{what}");
    store(&writer, 3, 2, "");
    assert_eq!(found(&writer, 3, 2, ""), 2, "{what}");
    written
}

#[test]
fn every_flipped_byte_is_noticed() {
    let folder = tempdir().unwrap();
    let (path, copy) = (folder.path().join("tier"), folder.path().join("copy"));
    small_file(&path);
    let bytes = fs::read(&path).unwrap();
    let of_slot = 256 + 64 + 50;
    let mut lost = 0;
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&copy, &damaged).unwrap();
        let found = check(&copy, &format!("byte {at}"));
        // Of a slot all that was written counts, up to the end of its block.
        let is_used = at < 4096 || (at - 4096) % 4096 < of_slot;
        let expected = if at < 4096 { 0 } else { 3 - usize::from(is_used) };
        assert_eq!(found, expected, "byte {at}");
        lost += 3 - found;
    }
    assert!(lost > 3 * 4096);
}

#[test]
fn a_file_is_cut_anywhere() {
    let folder = tempdir().unwrap();
    let (path, copy) = (folder.path().join("tier"), folder.path().join("copy"));
    small_file(&path);
    let bytes = fs::read(&path).unwrap();
    for len in 0..bytes.len() {
        fs::write(&copy, &bytes[..len]).unwrap();
        let expected = (len.saturating_sub(4096) + 4096 - (256 + 64 + 50)) / 4096;
        assert_eq!(check(&copy, &format!("{len} bytes")), if len < 4096 { 0 } else { expected }, "{len} bytes");
    }
}

#[test]
fn files_of_others_are_left_alone() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("letter");
    fs::write(&path, "Dear reader").unwrap();
    assert!(matches!(open(&path), Err(OpenError::NotATier(_))));
    assert_eq!(fs::read_to_string(&path).unwrap(), "Dear reader");
    assert!(matches!(open(&folder.path().join("no/such/folder")), Err(OpenError::Io { .. })));
}

#[test]
fn another_model_finds_nothing() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    small_file(&path);
    let other = DiskTier::open(&path, &namespace("b"), &geometry(&[50]), &limit(4)).unwrap();
    assert_eq!((found(&other, 1, 2, ""), found(&other, 2, 1, "salt")), (0, 0));
    // Models with blocks of one size share a file.
    store(&other, 1, 1, "");
    drop(other);
    assert_eq!(check(&path, "two models"), 3);
    // With another size of blocks the file is emptied.
    small_file(&path);
    let other = DiskTier::open(&path, &namespace("a"), &geometry(&[5000]), &limit(4)).unwrap();
    assert_eq!((found(&other, 1, 2, ""), other.stats().blocks), (0, 0));
}

#[test]
fn a_file_on_a_full_disk_stays_as_long_as_it_is() {
    // The limit of a process for the size of files gives an error like that of a full disk; it holds for a child only.
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let child = std::process::Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 20; exec \"$0\" --exact --ignored --nocapture stores_on_a_full_disk"])
        .arg(std::env::current_exe().unwrap())
        .env("DISK_TIER", &path)
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"));
    let tier = open_large(&path);
    assert_eq!([1, 2, 3].map(|sequence| found(&tier, sequence, 3, "")), [2, 1, 1]);
}

fn open_large(path: &Path) -> DiskTier {
    DiskTier::open(path, &namespace("a"), &geometry(&[50]), &limit(100)).unwrap()
}

/// The child of the test before: 20 KiB have room for the header and four slots.
#[test]
#[ignore = "runs in a process of its own"]
fn stores_on_a_full_disk() {
    let tier = open_large(Path::new(&std::env::var("DISK_TIER").unwrap()));
    store(&tier, 1, 3, "");
    store(&tier, 2, 1, "");
    let place = &common::places(&tier, 3, 1, "")[0];
    let bytes = common::bytes(3, 0, 0, "", 50);
    let mut buffer = disk_tier::Buffer::default();
    let error = tier.store(place, 0, &bytes, &mut buffer).unwrap_err();
    assert_eq!(tier.stats().failed, 1, "{error}");
    // From now on blocks take the place of others.
    store(&tier, 3, 1, "");
    assert!(tier.stats().evicted > 0);
    assert_eq!(found(&tier, 3, 1, ""), 1);
}

#[test]
fn torn_slots_are_noticed() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    small_file(&path);
    let bytes = fs::read(&path).unwrap();
    // The beginning of one slot and the end of another, at every length.
    for len in (1..256 + 64 + 50).step_by(7) {
        let mut torn = bytes.clone();
        let (first, second) = (4096, 8192);
        torn.copy_within(first..first + len, second);
        fs::write(&path, &torn).unwrap();
        // Up to the number of the slot, both begin alike.
        assert_eq!(check(&path, &format!("{len} bytes")), if len > 16 { 2 } else { 3 }, "{len} bytes");
    }
}
