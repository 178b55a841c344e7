//! Sequences by id: nobody waits, nothing is lost, whatever the threads do.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::thread;

use block_table::{BlockPool, SequenceError, SequenceId, Sequences};

#[test]
fn a_taken_sequence_is_busy_for_everybody_else_and_for_its_own_thread() {
    let sequences = Sequences::new(&BlockPool::new(8, 4).unwrap());
    let id = sequences.create();
    let taken = sequences.take(id).unwrap();
    assert_eq!(sequences.take(id).unwrap_err(), SequenceError::Busy(id));
    assert_eq!(sequences.fork(id).unwrap_err(), SequenceError::Busy(id));
    assert_eq!(sequences.remove(id).unwrap_err(), SequenceError::Busy(id));
    drop(taken);
    assert_eq!(sequences.remove(id), Ok(()));
    assert_eq!(sequences.remove(id).unwrap_err(), SequenceError::Unknown(id));
}

#[test]
fn taking_several_is_all_or_nothing() {
    let sequences = Sequences::new(&BlockPool::new(8, 4).unwrap());
    let (a, b) = (sequences.create(), sequences.create());
    let stranger = SequenceId(99);
    assert_eq!(sequences.take_all([a, b, stranger]).unwrap_err(), SequenceError::Unknown(stranger));
    assert_eq!(sequences.take_all([a, b, a]).unwrap_err(), SequenceError::Busy(a));
    assert_eq!(sequences.take_all([a, b]).unwrap().len(), 2);
}

#[test]
fn a_panic_puts_the_table_back() {
    let pool = BlockPool::new(8, 4).unwrap();
    let sequences = Sequences::new(&pool);
    let id = sequences.create();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut table = sequences.take(id).unwrap();
        table.append(9).unwrap();
        panic!("in the middle of a step");
    }));
    assert!(panicked.is_err());
    assert_eq!(sequences.take(id).unwrap().len(), 9);
    sequences.remove(id).unwrap();
    assert_eq!(pool.available(), 8);
}

#[test]
fn threads_share_one_pool_and_every_block_comes_back() {
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
                    match sequences.take(id) {
                        // A refused growth is what a full pool is for.
                        Ok(mut table) if round % 5 < 4 => drop(table.append(1 + round % 3)),
                        Ok(mut table) => table.truncate(round % 11).unwrap(),
                        Err(error) => assert_eq!(error, SequenceError::Busy(id)),
                    }
                    if let Ok(fork) = sequences.fork(id) {
                        let grown = sequences.take(fork).unwrap().append(3);
                        drop(grown);
                        sequences.remove(fork).unwrap();
                    }
                }
            });
        }
    });
    let tables = sequences.take_all(shared).unwrap();
    pool.check_held(tables.iter().map(|t| t.blocks())).unwrap();
    drop(tables);
    drop(sequences);
    assert_eq!(pool.available(), 64);
}
