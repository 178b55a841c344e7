//! Metrics recorders and tracing subscribers are the host's code. They are called after a change is complete, so a
//! panic in them loses nothing.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use block_table::{Admission, BlockPool, BlockTable};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Recorder, SharedString, Unit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// A recorder and a subscriber that panic.
struct Panics;

impl Recorder for Panics {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &metrics::Metadata<'_>) -> Counter {
        panic!("the recorder's panic")
    }

    fn register_gauge(&self, _: &Key, _: &metrics::Metadata<'_>) -> Gauge {
        panic!("the recorder's panic")
    }

    fn register_histogram(&self, _: &Key, _: &metrics::Metadata<'_>) -> Histogram {
        panic!("the recorder's panic")
    }
}

impl Subscriber for Panics {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        panic!("the subscriber's panic")
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Calls `change` with a recorder or a subscriber that panics.
fn observed(change: impl FnOnce(), by_metrics: bool) {
    let change = || match by_metrics {
        true => metrics::with_local_recorder(&Panics, change),
        false => tracing::subscriber::with_default(Panics, change),
    };
    let panic = catch_unwind(AssertUnwindSafe(change)).unwrap_err();
    let expected = if by_metrics { "the recorder's panic" } else { "the subscriber's panic" };
    assert_eq!(panic.downcast_ref(), Some(&expected));
}

#[test]
fn a_preempted_request_is_not_lost() {
    for by_metrics in [true, false] {
        let mut waiting = Admission::new();
        waiting.enqueue("new");
        observed(|| waiting.requeue("preempted"), by_metrics);
        assert_eq!(waiting.iter().collect::<Vec<_>>(), [&"preempted", &"new"]);
    }
}

#[test]
fn a_table_is_consistent_after_a_panic_in_swap_out_or_swap_in() {
    let pool = BlockPool::new(8, 4).unwrap();
    let mut table = BlockTable::new(&pool);
    table.reserve(10).unwrap();
    table.commit_tokens(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).unwrap();
    observed(|| drop(table.swap_out()), false);
    // The same as when the caller drops the returned value.
    assert_eq!((table.len(), table.capacity(), table.blocks().len(), pool.in_use()), (0, 0, 0, 0));
    table.reserve(5).unwrap();
    table.commit_tokens(&[1, 2, 3, 4, 5]).unwrap();
    assert_eq!(table.blocks().len(), 2);
    pool.check_ref_counts([table.blocks()]).unwrap();

    let swapped = table.swap_out().unwrap();
    observed(|| drop(swapped.swap_in()), false);
    pool.check_ref_counts([]).unwrap();
    assert_eq!(swapped.swap_in().unwrap().len(), 5);
}
