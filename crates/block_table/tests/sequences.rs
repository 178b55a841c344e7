//! Sequences by id: no call blocks and no table is lost, whatever the threads do.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::thread;

use block_table::{BlockPool, SequenceError, SequenceId, Sequences};

#[test]
fn a_checked_out_sequence_is_busy_for_every_thread_including_its_own() {
    let sequences = Sequences::new(&BlockPool::new(8, 4).unwrap());
    let id = sequences.create();
    let table = sequences.check_out(id).unwrap();
    assert_eq!(sequences.check_out(id).unwrap_err(), SequenceError::Busy(id));
    assert_eq!(sequences.fork(id).unwrap_err(), SequenceError::Busy(id));
    assert_eq!(sequences.remove(id).unwrap_err(), SequenceError::Busy(id));
    drop(table);
    assert_eq!(sequences.remove(id), Ok(()));
    assert_eq!(sequences.remove(id).unwrap_err(), SequenceError::Unknown(id));
}

#[test]
fn checking_out_several_is_all_or_nothing() {
    let sequences = Sequences::new(&BlockPool::new(8, 4).unwrap());
    let (a, b) = (sequences.create(), sequences.create());
    let unknown = SequenceId(99);
    assert_eq!(sequences.check_out_all([a, b, unknown]).unwrap_err(), SequenceError::Unknown(unknown));
    assert_eq!(sequences.check_out_all([a, b, a]).unwrap_err(), SequenceError::Busy(a));
    assert_eq!(sequences.check_out_all([a, b]).unwrap().len(), 2);
}

#[test]
fn a_panic_puts_the_table_back() {
    let pool = BlockPool::new(8, 4).unwrap();
    let sequences = Sequences::new(&pool);
    let id = sequences.create();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut table = sequences.check_out(id).unwrap();
        table.append(9).unwrap();
        panic!("in the middle of a step");
    }));
    assert!(panicked.is_err());
    assert_eq!(sequences.check_out(id).unwrap().len(), 9);
    sequences.remove(id).unwrap();
    assert_eq!(pool.available(), 8);
}

#[test]
fn threads_share_one_pool_and_every_block_is_freed() {
    let pool = BlockPool::new(64, 2).unwrap();
    let sequences = Sequences::new(&pool);
    let shared: Vec<_> = (0..4).map(|_| sequences.create()).collect();
    let barrier = Barrier::new(6);
    thread::scope(|scope| {
        for seed in 0..6usize {
            let (sequences, shared, barrier) = (&sequences, &shared, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for round in 0..2_000 {
                    let id = shared[(seed + round * 7) % shared.len()];
                    match sequences.check_out(id) {
                        // It fails when the pool is full, which this test allows.
                        Ok(mut table) if round % 5 < 4 => drop(table.append(1 + round % 3)),
                        Ok(mut table) => table.truncate(round % 11).unwrap(),
                        Err(error) => assert_eq!(error, SequenceError::Busy(id)),
                    }
                    if let Ok(fork) = sequences.fork(id) {
                        let grown = sequences.check_out(fork).unwrap().append(3);
                        drop(grown);
                        sequences.remove(fork).unwrap();
                    }
                }
            });
        }
    });
    let tables = sequences.check_out_all(shared).unwrap();
    pool.check_ref_counts(tables.iter().map(|t| t.blocks())).unwrap();
    drop(tables);
    drop(sequences);
    assert_eq!(pool.available(), 64);
}
