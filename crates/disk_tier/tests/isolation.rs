//! What belongs to others is not found, whatever is done with the file.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]

mod common;

use std::fs;

use common::{bytes, found, geometry, limit, namespace, places, store, tokens};
use disk_tier::{DiskTier, Options};
use tempfile::tempdir;

const TENANTS: [&str; 3] = ["first", "second", ""];

fn open(path: &std::path::Path, options: &Options) -> DiskTier {
    DiskTier::open(path, &namespace("a"), &geometry(&[64]), options).unwrap()
}

#[test]
fn tenants_find_their_own_only() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    for (stored, tenant) in TENANTS.iter().enumerate() {
        let tier = open(&path, &limit(30));
        for (i, of) in TENANTS.iter().enumerate() {
            assert_eq!(found(&tier, 1, 3, of), if i < stored { 3 } else { 0 }, "{tenant}, {of}");
        }
        store(&tier, 1, 3, tenant);
    }
}

#[test]
fn another_secret_finds_nothing() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let secrets = [limit(30).secret(b"one"), limit(30).secret(b"two"), limit(30)];
    for (stored, options) in secrets.iter().enumerate() {
        let tier = open(&path, options);
        for tenant in TENANTS {
            assert_eq!(found(&tier, 1, 2, tenant), 0, "{stored}");
            store(&tier, 1, 2, tenant);
            assert_eq!(found(&tier, 1, 2, tenant), 2);
        }
    }
}

#[test]
fn slots_that_were_exchanged_are_noticed() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let tier = open(&path, &limit(9));
    TENANTS.iter().for_each(|tenant| store(&tier, 1, 3, tenant));
    drop(tier);
    let whole = fs::read(&path).unwrap();
    let slot = |number: usize| 4096 * (1 + number)..4096 * (2 + number);
    for (from, to) in (0..9).flat_map(|from| (0..9).map(move |to| (from, to))).filter(|(from, to)| from != to) {
        // Once as it is, once with the number of the slot that it is copied to.
        for renumbered in [false, true] {
            let mut copied = whole.clone();
            copied.resize(4096 * 10, 0);
            copied.copy_within(slot(from), slot(to).start);
            if renumbered {
                copied[slot(to).start + 16] = to as u8;
            }
            fs::write(&path, &copied).unwrap();
            let tier = open(&path, &limit(9));
            let all: usize = TENANTS.iter().map(|tenant| found(&tier, 1, 3, tenant)).sum();
            assert!(all == 8 || all == 7 && renumbered, "{from} to {to}: {all}");
        }
    }
}

#[test]
fn the_file_shows_neither_salts_nor_what_is_under_them() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let tier = open(&path, &limit(9));
    store(&tier, 1, 2, "a long and secret salt");
    store(&tier, 2, 1, "");
    let debug = format!("{tier:?} {:?}", places(&tier, 1, 1, "a long and secret salt"));
    drop(tier);
    let file = fs::read(&path).unwrap();
    let contains = |what: &[u8]| file.windows(what.len()).any(|window| window == what);
    let of = |sequence: u64| tokens(sequence, 0).iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<_>>();
    assert!(contains(&of(2)) && contains(&bytes(2, 0, 0, "", 64)));
    assert!(!contains(&of(1)) && !contains(&bytes(1, 0, 0, "a long and secret salt", 64)[..16]));
    assert!(!contains(b"secret salt") && !debug.contains("secret salt"));
}

#[test]
fn guessed_names_find_nothing() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let tier = open(&path, &limit(30).secret(b"one"));
    store(&tier, 1, 3, "tenant");
    drop(tier);
    // Whoever has the file, but not the secret, knows the salt, the tokens and everything else.
    for secret in [&b"o"[..], b"on", b"one\0", &[0; 32]] {
        assert_eq!(found(&open(&path, &limit(30).secret(secret)), 1, 3, "tenant"), 0);
    }
    // With the secret, but not the salt.
    let tier = open(&path, &limit(30).secret(b"one"));
    for salt in ["", "tenan", "tenant\0", "Tenant"] {
        assert_eq!(found(&tier, 1, 3, salt), 0);
    }
    assert_eq!(found(&tier, 1, 3, "tenant"), 3);
}
