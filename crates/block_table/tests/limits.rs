//! Requests that no pool can meet fail like any other: with the numbers in the error, and without a change. No position
//! and no length overflows, and each call takes time in proportion to the table, not to the number it is given.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use block_table::{BlockPool, BlockTable, NotReserved, OutOfBlocks, PoolError, ReserveError, TableOptions, Window};

#[test]
fn absurd_requests_fail() {
    let pool = BlockPool::new(4, 8).unwrap();
    let mut table = BlockTable::new(&pool);
    table.append(3).unwrap();
    let fork = table.fork();
    for n in [usize::MAX, usize::MAX / 2, 1 << 40, 34] {
        match table.reserve(n) {
            Err(ReserveError::OutOfBlocks(OutOfBlocks { requested, available: 3 })) => assert!(requested > 3),
            other => panic!("{other:?}"),
        }
        assert!(pool.allocate(n).is_err());
    }
    assert_eq!(table.commit(usize::MAX), Err(NotReserved { committed: usize::MAX, reserved: 5 }));
    assert_eq!((table.len(), table.slot(usize::MAX)), (3, None));
    table.truncate(usize::MAX).unwrap();
    assert_eq!(fork.fork_at(usize::MAX).unwrap().len(), 3);
    pool.check_ref_counts([table.blocks(), fork.blocks()]).unwrap();
}

#[test]
fn pools_have_limits() {
    assert_eq!(BlockPool::new(0, 8).unwrap_err(), PoolError::NoBlocks);
    assert_eq!(BlockPool::new(8, 0).unwrap_err(), PoolError::EmptyBlocks);
    for (blocks, block_size) in [(usize::MAX, usize::MAX), (1 << 31, 1), (1 << 16, 1 << 15)] {
        assert!(matches!(BlockPool::new(blocks, block_size), Err(PoolError::TooLarge { .. })));
    }
}

/// Numbers that may overflow, and some ordinary ones.
const EXTREMES: [usize; 12] = [
    0,
    1,
    5,
    9,
    13,
    1 << 31,
    1 << 40,
    isize::MAX as usize,
    isize::MAX as usize + 1,
    usize::MAX / 2,
    usize::MAX - 1,
    usize::MAX,
];

/// Fails when `work`, which takes microseconds, has not ended after 20 seconds.
fn at_once(what: String, work: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let worker = thread::spawn(move || {
        work();
        done.send(()).unwrap();
    });
    match ended.recv_timeout(Duration::from_secs(20)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what} has not ended after 20 s"),
        _ => worker.join().unwrap_or_else(|_| panic!("{what} panicked")),
    }
}

/// Tables of 13 tokens in blocks of 4. Some of them have freed blocks.
fn tables(pool: &BlockPool) -> Vec<BlockTable> {
    let windows = [(3, 0), (3, 5), (usize::MAX, 0), (1, usize::MAX), (usize::MAX, usize::MAX), (0, 1)];
    let windowed = windows.map(|(tokens, sinks)| {
        let window = Window::new(tokens).with_sink_tokens(sinks);
        BlockTable::with_options(pool, &TableOptions::default().window(window))
    });
    let mut tables: Vec<_> = [BlockTable::new(pool), BlockTable::new(pool)].into_iter().chain(windowed).collect();
    tables.iter_mut().for_each(|table| table.append(13).unwrap());
    tables[0].free_before(9);
    tables
}

#[test]
fn extreme_positions_and_lengths_are_answered_at_once() {
    let pool = BlockPool::new(1000, 4).unwrap();
    for n in EXTREMES {
        for which in 0..tables(&pool).len() {
            let pool = pool.clone();
            at_once(format!("{n} for table {which}"), move || {
                let fresh = || tables(&pool).swap_remove(which);
                let mut table = fresh();
                let fork = table.fork();
                let before = (table.len(), table.blocks().to_vec());
                assert_eq!(table.slot(n).is_some(), n < 16 && table.slot(n / 4 * 4).is_some());
                match table.reserve(n) {
                    Ok(()) => assert!(n <= 13, "{n}"),
                    Err(error) => {
                        assert!(matches!(error, ReserveError::OutOfBlocks(full) if full.requested > full.available));
                        assert_eq!(before, (table.len(), table.blocks().to_vec()));
                    }
                }
                let reserved = table.capacity() - table.len();
                assert_eq!(table.commit(n).is_ok(), n <= reserved);

                let mut table = fresh();
                assert_eq!(table.append(n).is_ok(), n <= 13);
                let mut table = fresh();
                let (forked, truncated) = (table.fork_at(n), table.truncate(n));
                assert_eq!(forked.as_ref().err(), truncated.as_ref().err());
                if forked.is_ok() {
                    assert_eq!((table.len(), table.blocks().is_empty()), (n.min(13), n == 0));
                }
                let mut table = fresh();
                table.reserve(9).unwrap();
                table.shrink_to(n);
                assert_eq!((table.len(), table.capacity()), (13, n.clamp(13, 24).next_multiple_of(4)));
                let mut table = fresh();
                let before = table.blocks().len();
                table.free_before(n);
                let freed = if which == 1 { n.min(13) / 4 } else { before - table.blocks().len() };
                assert_eq!((table.len(), table.blocks().len()), (13, before - freed));
                assert!(which < 2 || freed == 0);

                for end in EXTREMES {
                    let mut table = fork.fork();
                    table.make_writable(n..end).unwrap();
                    assert_eq!(table.len(), 13);
                    for position in 0..16 {
                        let (before, after) = (fork.slot(position), table.slot(position));
                        assert_eq!(before.is_some(), after.is_some());
                        let touched = position < end.div_ceil(4).saturating_mul(4) && position >= n / 4 * 4 && n < end;
                        assert_eq!(before != after, touched && before.is_some(), "{position} of {n}..{end}");
                    }
                }
                for window in [Window::new(n), Window::new(3).with_sink_tokens(n)] {
                    for position in EXTREMES {
                        let start = window.start(position);
                        assert!(start <= position && position - start == position.min(window.tokens() - 1));
                    }
                }
            });
        }
    }
    assert_eq!(pool.available(), 1000);
}
