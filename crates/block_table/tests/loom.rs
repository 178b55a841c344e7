//! Every interleaving of two threads on one map of sequences. Runs with `RUSTFLAGS="--cfg loom"`.
//!
//! The locks of the map and of the pool are loom's here, so loom reports a deadlock if two calls take them in opposite
//! orders.

#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::panic)]

use block_table::{BlockPool, SequenceError, SequenceId, Sequences};
use loom::sync::Arc;
use loom::thread;

fn two_threads(one: fn(&Sequences, SequenceId), other: fn(&Sequences, SequenceId), end: fn(&Sequences, SequenceId)) {
    loom::model(move || {
        let pool = BlockPool::new(4, 1).unwrap();
        let sequences = Arc::new(Sequences::new(&pool));
        let id = sequences.create();
        let thread = thread::spawn({
            let sequences = sequences.clone();
            move || one(&sequences, id)
        });
        other(&sequences, id);
        thread.join().unwrap();
        end(&sequences, id);
        drop(sequences);
        assert_eq!(pool.available(), 4);
        pool.check_ref_counts([]).unwrap();
    });
}

fn append(sequences: &Sequences, id: SequenceId) {
    match sequences.check_out(id) {
        Ok(mut table) => {
            table.reserve(1).unwrap();
            table.commit_tokens(&[7]).unwrap();
        }
        Err(error) => assert_eq!(error, SequenceError::Busy(id)),
    }
}

#[test]
fn one_thread_works_and_the_other_gets_busy() {
    two_threads(append, append, |sequences, id| {
        let table = sequences.check_out(id).unwrap();
        assert!(table.len() == 1 || table.len() == 2);
        sequences.pool().check_ref_counts([table.blocks()]).unwrap();
    });
}

#[test]
fn a_sequence_is_removed_or_busy() {
    let remove = |sequences: &Sequences, id| match sequences.remove(id) {
        Ok(()) => assert_eq!(sequences.check_out(id).unwrap_err(), SequenceError::Unknown(id)),
        Err(error) => assert_eq!(error, SequenceError::Busy(id)),
    };
    let append = |sequences: &Sequences, id| match sequences.check_out(id) {
        Ok(mut table) => table.append(1).unwrap(),
        Err(error) => assert_eq!(error, SequenceError::Unknown(id)),
    };
    two_threads(append, remove, |sequences, _| assert!(sequences.len() <= 1));
}

#[test]
fn a_fork_has_the_tokens_that_were_committed_before_it() {
    let fork = |sequences: &Sequences, id| match sequences.fork(id) {
        Ok(fork) => {
            let mut fork = sequences.check_out(fork).unwrap();
            fork.reserve(1).unwrap();
            fork.commit_tokens(&[8]).unwrap();
        }
        Err(error) => assert_eq!(error, SequenceError::Busy(id)),
    };
    two_threads(append, fork, |sequences, id| {
        assert!(sequences.check_out(id).unwrap().len() <= 1);
    });
}

#[test]
fn swapping_out_and_evicting_lose_nothing() {
    let swap = |sequences: &Sequences, id| {
        let Ok(mut table) = sequences.check_out(id) else { return };
        table.reserve(1).unwrap();
        table.commit_tokens(&[7]).unwrap();
        let swapped = table.swap_out().unwrap();
        *table = swapped.swap_in().unwrap();
        assert_eq!(table.len(), 1);
    };
    let evict = |sequences: &Sequences, _| drop(sequences.pool().allocate(2).unwrap());
    two_threads(swap, evict, |sequences, id| assert_eq!(sequences.check_out(id).unwrap().len(), 1));
}
