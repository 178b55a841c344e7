//! Who may start: in order, except that small requests may pass large ones, and only so often.

#![allow(clippy::unwrap_used, clippy::panic)]

use block_table::{Admission, BlockPool};

/// A queue of requests, each of which is the number of blocks it needs.
fn queue(admission: Admission<usize>, requests: &[usize]) -> Admission<usize> {
    let mut admission = admission;
    requests.iter().for_each(|&request| admission.enqueue(request));
    admission
}

fn pool() -> BlockPool {
    BlockPool::new(100, 16).unwrap()
}

#[test]
fn what_fits_starts_in_order() {
    let mut waiting = queue(Admission::new(), &[3, 1, 2]);
    let mut started = vec![];
    while let Some(request) = waiting.admit(&pool(), 10, 0, |&blocks| blocks) {
        started.push(request);
    }
    assert_eq!((started, waiting.is_empty()), (vec![3, 1, 2], true));
}

#[test]
fn small_requests_pass_large_ones_but_only_so_often() {
    let mut waiting = queue(Admission::new().max_skips(2), &[50, 1, 2, 3]);
    let next = |waiting: &mut Admission<usize>| waiting.admit(&pool(), 10, 0, |&blocks| blocks);
    assert_eq!([next(&mut waiting), next(&mut waiting)], [Some(1), Some(2)]);
    assert_eq!(waiting.most_skipped(), 2);
    assert_eq!(next(&mut waiting), None, "the large one is waited for");
    assert_eq!(waiting.admit(&pool(), 60, 0, |&blocks| blocks), Some(50));
    assert_eq!(next(&mut waiting), Some(3));
}

#[test]
fn only_so_many_are_looked_at() {
    let mut waiting = queue(Admission::new().skip_ahead(3), &[50, 50, 50, 1]);
    assert_eq!(waiting.admit(&pool(), 10, 0, |&blocks| blocks), None);
    let mut strict = queue(Admission::new().skip_ahead(0), &[50, 1]);
    assert_eq!(strict.admit(&pool(), 10, 0, |&blocks| blocks), None);
    assert_eq!(strict.admit(&pool(), 50, 0, |&blocks| blocks), Some(50));
}

#[test]
fn those_who_run_have_room_to_grow() {
    // 16 tokens each are a block each.
    let mut waiting = queue(Admission::new(), &[5]);
    assert_eq!(waiting.admit(&pool(), 10, 6, |&blocks| blocks), None);
    assert_eq!(waiting.admit(&pool(), 10, 5, |&blocks| blocks), Some(5));
    let mut tight = queue(Admission::new().headroom(0), &[5]);
    assert_eq!(tight.admit(&pool(), 5, 1000, |&blocks| blocks), Some(5));
    let mut absurd = queue(Admission::new().headroom(usize::MAX), &[5]);
    assert_eq!(absurd.admit(&pool(), 100, usize::MAX, |&blocks| blocks), None);
}

#[test]
fn the_least_computed_yields_and_comes_back_first() {
    assert_eq!(Admission::<usize>::who_yields([5, 3, 9, 3]), Some(3), "among equals the last");
    assert_eq!(Admission::<usize>::who_yields([]), None);
    let mut waiting = queue(Admission::new(), &[1, 2]);
    waiting.requeue(7);
    assert_eq!(waiting.iter().copied().collect::<Vec<_>>(), [7, 1, 2]);
    assert_eq!(waiting.len(), 3);
}

#[test]
fn nobody_waits_for_ever() {
    // A large request among an endless stream of small ones, in a pool that is never empty.
    let mut waiting = queue(Admission::new(), &[90]);
    let mut running = vec![4usize; 20];
    for turn in 0.. {
        waiting.enqueue(4);
        running.remove(0);
        let available = 100 - running.iter().sum::<usize>();
        match waiting.admit(&pool(), available, 0, |&blocks| blocks) {
            Some(90) => {
                assert!(turn > 200, "it was passed over first");
                return;
            }
            Some(small) => running.push(small),
            None => assert!(waiting.most_skipped() >= 256, "nobody starts because one is waited for"),
        }
        assert!(turn < 1000);
    }
}
