//! Every interleaving of two threads on one map of sequences. Runs with `RUSTFLAGS="--cfg loom"`.
//!
//! The map's lock and the pool's are both loom's here: a call that took one while it holds the other in the wrong order
//! would be found as a deadlock.

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
        pool.check_held([]).unwrap();
    });
}

fn append(sequences: &Sequences, id: SequenceId) {
    match sequences.take(id) {
        Ok(mut table) => {
            table.reserve(1).unwrap();
            table.commit_tokens(&[7]).unwrap();
        }
        Err(error) => assert_eq!(error, SequenceError::Busy(id)),
    }
}

#[test]
fn one_works_and_the_other_is_told_that_it_is_busy() {
    two_threads(append, append, |sequences, id| {
        let table = sequences.take(id).unwrap();
        assert!(table.len() == 1 || table.len() == 2);
        sequences.pool().check_held([table.blocks()]).unwrap();
    });
}

#[test]
fn a_sequence_is_removed_or_busy() {
    let remove = |sequences: &Sequences, id| match sequences.remove(id) {
        Ok(()) => assert_eq!(sequences.take(id).unwrap_err(), SequenceError::Unknown(id)),
        Err(error) => assert_eq!(error, SequenceError::Busy(id)),
    };
    let append = |sequences: &Sequences, id| match sequences.take(id) {
        Ok(mut table) => table.append(1).unwrap(),
        Err(error) => assert_eq!(error, SequenceError::Unknown(id)),
    };
    two_threads(append, remove, |sequences, _| assert!(sequences.len() <= 1));
}

#[test]
fn a_fork_shares_what_was_there_when_it_was_made() {
    let fork = |sequences: &Sequences, id| match sequences.fork(id) {
        Ok(fork) => {
            let mut fork = sequences.take(fork).unwrap();
            fork.reserve(1).unwrap();
            fork.commit_tokens(&[8]).unwrap();
        }
        Err(error) => assert_eq!(error, SequenceError::Busy(id)),
    };
    two_threads(append, fork, |sequences, id| {
        assert!(sequences.take(id).unwrap().len() <= 1);
    });
}

#[test]
fn swapping_out_and_evicting_lose_nothing() {
    let swap = |sequences: &Sequences, id| {
        let Ok(mut table) = sequences.take(id) else { return };
        table.reserve(1).unwrap();
        table.commit_tokens(&[7]).unwrap();
        let swapped = table.swap_out().unwrap();
        *table = swapped.swap_in().unwrap();
        assert_eq!(table.len(), 1);
    };
    let evict = |sequences: &Sequences, _| drop(sequences.pool().take(2).unwrap());
    two_threads(swap, evict, |sequences, id| assert_eq!(sequences.take(id).unwrap().len(), 1));
}
