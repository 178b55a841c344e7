//! Requests that no pool can meet are refused like any other: with the numbers, and nothing has changed.

#![allow(clippy::unwrap_used, clippy::panic)]

use block_table::{BlockPool, BlockTable, NotReserved, OutOfBlocks, PoolError, ReserveError};

#[test]
fn absurd_requests_are_refused() {
    let pool = BlockPool::new(4, 8).unwrap();
    let mut table = BlockTable::new(&pool);
    table.append(3).unwrap();
    let fork = table.fork();
    for n in [usize::MAX, usize::MAX / 2, 1 << 40, 34] {
        match table.reserve(n) {
            Err(ReserveError::OutOfBlocks(OutOfBlocks { requested, available: 3 })) => assert!(requested > 3),
            other => panic!("{other:?}"),
        }
        assert!(pool.take(n).is_err());
    }
    assert_eq!(table.commit(usize::MAX), Err(NotReserved { committed: usize::MAX, reserved: 5 }));
    assert_eq!((table.len(), table.slot(usize::MAX)), (3, None));
    table.truncate(usize::MAX).unwrap();
    assert_eq!(fork.fork_at(usize::MAX).unwrap().len(), 3);
    pool.check_held([table.blocks(), fork.blocks()]).unwrap();
}

#[test]
fn pools_have_limits() {
    assert_eq!(BlockPool::new(0, 8).unwrap_err(), PoolError::NoBlocks);
    assert_eq!(BlockPool::new(8, 0).unwrap_err(), PoolError::EmptyBlocks);
    for (blocks, block_size) in [(usize::MAX, usize::MAX), (1 << 31, 1), (1 << 16, 1 << 15)] {
        assert!(matches!(BlockPool::new(blocks, block_size), Err(PoolError::TooLarge { .. })));
    }
}
