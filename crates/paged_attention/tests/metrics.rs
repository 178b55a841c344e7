//! What is reported to a metrics recorder, and that a recorder that panics does no harm.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use paged_attention::{BlockTable, KvCache, KvCacheBuilder, KvShape, LayerGroup, Window};

const SHAPE: KvShape = KvShape::new(1, 1, 4);

/// The name and the number of free blocks of each cache that reports `kv_cache_blocks` when a step of each of `caches`
/// is dropped.
fn reported(caches: &[KvCache]) -> Vec<(String, f64)> {
    let recorder = DebuggingRecorder::new();
    metrics::with_local_recorder(&recorder, || caches.iter().for_each(|cache| drop(cache.step())));
    let mut found = vec![];
    for (key, _, _, value) in recorder.snapshotter().snapshot().into_vec() {
        let label = |name| key.key().labels().find(|label| label.key() == name).map(|label| label.value().to_owned());
        if let (DebugValue::Gauge(blocks), Some("free")) = (value, label("state").as_deref()) {
            found.push((label("cache").unwrap(), blocks.into_inner()));
        }
    }
    found
}

fn build(blocks: usize, with: impl Fn(KvCacheBuilder) -> KvCacheBuilder) -> KvCache {
    with(KvCache::builder(SHAPE).blocks(blocks)).build().unwrap()
}

#[test]
fn caches_without_a_name_do_not_overwrite_each_other() {
    let builder = KvCache::builder(SHAPE).blocks(6);
    let caches = [build(4, |b| b), build(5, |b| b), builder.clone().build().unwrap(), builder.build().unwrap()];
    let mut reported = reported(&caches);
    let names: BTreeSet<_> = reported.iter().map(|(name, _)| name.clone()).collect();
    assert_eq!(names.len(), 4, "{reported:?}");
    // `kv`, `kv-2` and so on. Other tests of this process may have used some of the numbers.
    assert!(names.iter().all(|name| name == "kv" || name.strip_prefix("kv-").unwrap().parse::<u64>().unwrap() > 1));
    reported.sort_by(|a, b| a.1.total_cmp(&b.1));
    assert_eq!(reported.iter().map(|(_, blocks)| *blocks).collect::<Vec<_>>(), [4.0, 5.0, 6.0, 6.0]);

    // A clone has the same name. A given name is used unchanged, and uses up no number.
    let same = caches[0].clone();
    assert_eq!(self::reported(&[caches[0].clone(), same]).len(), 1);
    assert_eq!(
        self::reported(&[build(4, |b| b.name("draft")), build(7, |b| b.name("draft"))]),
        [("draft".into(), 7.0)]
    );
    assert!(KvCache::builder(SHAPE).blocks(0).build().is_err());
}

#[test]
fn each_group_of_layers_reports_its_blocks() {
    // A block of the first group takes one unit, a block of the second two.
    let groups = [LayerGroup::new([2], 1, 4), LayerGroup::new([0, 1], 1, 4).window(Window::new(4))];
    let cache = KvCache::builder_of(groups).blocks(10).block_size(4).name("hybrid").build().unwrap();
    let mut table = cache.table();
    table.append(11).unwrap();
    let recorder = DebuggingRecorder::new();
    metrics::with_local_recorder(&recorder, || drop(cache.step()));
    let mut found = BTreeSet::new();
    for (key, _, _, value) in recorder.snapshotter().snapshot().into_vec() {
        let label = |name| key.key().labels().find(|label| label.key() == name).map(|label| label.value().to_owned());
        if let (DebugValue::Gauge(blocks), Some(group), Some(state)) = (value, label("group"), label("state")) {
            found.insert((group, state, blocks.into_inner() as usize));
        }
    }
    // Of 30 units, three blocks of the first group and one of the second are in use. The window has passed two blocks.
    let expected = [("0", [25, 3, 0]), ("1", [12, 1, 0])].into_iter().flat_map(|(group, blocks)| {
        ["free", "in_use", "evictable"].into_iter().zip(blocks).map(move |(state, n)| (group.into(), state.into(), n))
    });
    assert_eq!(found, expected.collect());
}

/// A recorder that panics.
struct Panics;

impl Recorder for Panics {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        panic!("the recorder's panic")
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        panic!("the recorder's panic")
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        panic!("the recorder's panic")
    }
}

/// A second panic during a panic would abort the process, and the first one could not be caught.
#[test]
fn a_panic_during_a_step_does_not_call_the_recorder() {
    let cache = build(4, |b| b);
    let mut table = cache.table();
    let panics = |table: &mut BlockTable| {
        let mut step = cache.step();
        step.push(table, &[1, 2]).unwrap();
        resume_unwind(Box::new("layer 0 fails"))
    };
    let panicked = catch_unwind(AssertUnwindSafe(|| metrics::with_local_recorder(&Panics, || panics(&mut table))));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"layer 0 fails"));
    assert_eq!((table.len(), cache.pool().available()), (0, 4));
    cache.pool().check_ref_counts([table.blocks()]).unwrap();

    // Without a panic the recorder is called, but only after the sequences have been rolled back.
    let drops = |table: &mut BlockTable| {
        let mut step = cache.step();
        step.push(table, &[1, 2]).unwrap();
    };
    let panicked = catch_unwind(AssertUnwindSafe(|| metrics::with_local_recorder(&Panics, || drops(&mut table))));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"the recorder's panic"));
    cache.pool().check_ref_counts([table.blocks()]).unwrap();
    assert_eq!(cache.pool().available(), 4);
}
