//! What is stored is found, by the same tier, the next one and readers, until it leaves.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]

mod common;

use std::time::Duration;

use block_pool::{PrefixKey, Salt, SaltFrom, Window};
use common::{bytes, found, geometry, key, limit, namespace, places, store, tokens};
use disk_tier::{Buffer, DiskTier, Geometry, OpenError, Options, StoreError, Stored};
use tempfile::tempdir;

#[test]
fn the_next_process_finds_what_was_stored() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let open = || DiskTier::open(&path, &namespace("a"), &geometry(&[100, 7, 0, 5000]), &limit(200)).unwrap();
    let tier = open();
    store(&tier, 1, 3, "");
    store(&tier, 2, 2, "tenant");
    assert_eq!((found(&tier, 1, 4, ""), found(&tier, 2, 2, "tenant")), (12, 8));
    let place = &places(&tier, 1, 1, "")[0];
    let again = tier.store(place, 0, &bytes(1, 0, 0, "", 100), &mut Buffer::default()).unwrap();
    assert_eq!(again, Stored::Already);
    let stats = tier.stats();
    assert_eq!((stats.blocks, stats.stored, stats.loaded, stats.misses, stats.damaged), (20, 20, 20, 4, 0));
    assert_eq!(stats.bytes, std::fs::metadata(&path).unwrap().len().next_multiple_of(4096));
    drop(tier);
    let tier = open();
    assert_eq!((found(&tier, 1, 4, ""), found(&tier, 2, 2, "tenant"), tier.stats().blocks), (12, 8, 20));
}

#[test]
fn places_differ_in_all_that_matters() {
    let folder = tempdir().unwrap();
    let tier = DiskTier::open(folder.path().join("tier"), &namespace("a"), &geometry(&[8]), &limit(20)).unwrap();
    let mut buffer = Buffer::default();
    let salt_at = |position| [SaltFrom { position, salt: Salt::new(b"image") }];
    let block = |key: &PrefixKey, before: &[u32], salts: &[SaltFrom]| {
        let mut prefix = tier.prefix(key);
        prefix.next(before, &[]);
        prefix.next(&tokens(1, 1), salts)
    };
    let (plain, first) = (PrefixKey::new(), tokens(1, 0));
    let places = [
        block(&plain, &first, &[]),
        block(&plain, &tokens(2, 0), &[]),
        block(&plain.clone().window(Window::new(8)), &first, &[]),
        block(&plain.clone().window(Window::new(8).with_sink_tokens(1)), &first, &[]),
        block(&plain.clone().salt(Salt::new(b"")), &first, &[]),
        block(&plain.clone().salt(Salt::new(b"image")), &first, &[]),
        block(&plain, &first, &salt_at(4)),
        block(&plain, &first, &salt_at(5)),
    ];
    for (i, place) in places.iter().enumerate() {
        assert_eq!(tier.load(place, 0, &mut buffer), None, "{i}");
        assert_eq!(place.is_salted(), i >= 4);
        tier.store(place, 0, &[i as u8; 8], &mut buffer).unwrap();
    }
    for (i, place) in places.iter().enumerate() {
        assert_eq!(tier.load(place, 0, &mut buffer), Some(&[i as u8; 8][..]));
    }
}

#[test]
fn a_full_file_keeps_what_was_used_last() {
    let folder = tempdir().unwrap();
    let tier = DiskTier::open(folder.path().join("tier"), &namespace("a"), &geometry(&[8]), &limit(6)).unwrap();
    store(&tier, 1, 3, "");
    store(&tier, 2, 3, "");
    assert_eq!(found(&tier, 1, 3, ""), 3);
    store(&tier, 3, 2, "");
    // The end of the second sequence left, its beginning stayed.
    assert_eq!([1, 2, 3].map(|sequence| found(&tier, sequence, 3, "")), [3, 1, 2]);
    assert!(tier.contains(&places(&tier, 2, 1, "")[0], 0));
    assert_eq!((tier.stats().evicted, tier.stats().bytes), (2, 7 * 4096));
}

#[test]
fn blocks_grow_old() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let open = |age| {
        let options = limit(9).max_age(Duration::from_secs(age));
        DiskTier::open(&path, &namespace("a"), &geometry(&[8]), &options).unwrap()
    };
    store(&open(1), 1, 2, "");
    assert_eq!(found(&open(3600), 1, 2, ""), 2);
    std::thread::sleep(Duration::from_millis(2100));
    assert_eq!(found(&open(1), 1, 2, ""), 0);
    assert_eq!(found(&open(3600), 1, 2, ""), 2);
}

#[test]
fn a_file_has_one_writer_and_any_number_of_readers() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let (model, sizes) = (namespace("a"), geometry(&[8]));
    let open_writer = || DiskTier::open(&path, &model, &sizes, &limit(3));
    let writer = open_writer().unwrap();
    assert!(matches!(open_writer(), Err(OpenError::HasWriter(_))));
    let readers = [0, 1].map(|_| DiskTier::open_read_only(&path, &model, &sizes, &limit(3)).unwrap());
    store(&writer, 1, 3, "");
    for reader in &readers {
        assert_eq!(found(reader, 1, 3, ""), 0);
        reader.refresh().unwrap();
        assert_eq!(found(reader, 1, 3, ""), 3);
        let place = &places(reader, 1, 1, "")[0];
        assert!(matches!(reader.store(place, 0, &[0; 8], &mut Buffer::default()), Err(StoreError::ReadOnly)));
    }
    // What was written over is a miss.
    store(&writer, 2, 3, "");
    assert_eq!((found(&readers[0], 1, 3, ""), found(&readers[0], 2, 3, "")), (0, 0));
    readers[0].refresh().unwrap();
    assert_eq!(found(&readers[0], 2, 3, ""), 3);
    drop(writer);
    assert_eq!(found(&open_writer().unwrap(), 2, 3, ""), 3);
}

#[test]
fn wrong_sizes_are_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("tier");
    let open = |geometry: &Geometry, options: &Options| DiskTier::open(&path, &namespace("a"), geometry, options);
    for (block_size, bytes) in [(0, vec![1]), (1, vec![]), (1, vec![1 << 40])] {
        let geometry = Geometry { block_size, bytes };
        assert!(matches!(open(&geometry, &limit(1)), Err(OpenError::Geometry { .. })));
    }
    assert!(matches!(open(&geometry(&[8]), &limit(0)), Err(OpenError::LimitTooSmall { needed: 8192, .. })));
    let tier = open(&geometry(&[8, 9]), &limit(1)).unwrap();
    let place = &places(&tier, 1, 1, "")[0];
    let short = tier.prefix(&key("")).next(&[1], &[]);
    let mut buffer = Buffer::default();
    for (place, group, len, expected) in [(place, 1, 8, 9), (place, 2, 0, 0), (&short, 0, 8, 8)] {
        let error = tier.store(place, group, &vec![0; len], &mut buffer).unwrap_err();
        assert!(matches!(error, StoreError::Size { expected: of, .. } if of == expected), "{error}");
    }
    assert_eq!(tier.load(place, 2, &mut buffer), None);
    assert_eq!(tier.stats().blocks, 0);
    drop(tier);
    // A smaller limit cuts the file.
    let tier = open(&geometry(&[8]), &limit(5)).unwrap();
    store(&tier, 1, 5, "");
    drop(tier);
    let tier = open(&geometry(&[8]), &limit(2)).unwrap();
    assert_eq!((found(&tier, 1, 5, ""), tier.stats().bytes), (2, 3 * 4096));
}

#[test]
fn threads_store_and_load_at_once() {
    let folder = tempdir().unwrap();
    let tier = DiskTier::open(folder.path().join("tier"), &namespace("a"), &geometry(&[3000, 5]), &limit(40)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let tier = &tier;
            scope.spawn(move || {
                for round in 0..60 {
                    let sequence = common::mix(thread << 32 | round) % 9;
                    let salt = ["", "a"][sequence as usize % 2];
                    store(tier, sequence, 4, salt);
                    found(tier, common::mix(round) % 9, 4, salt);
                }
            });
        }
    });
    let stats = tier.stats();
    assert_eq!((stats.damaged, stats.failed, stats.blocks), (0, 0, 40));
}
