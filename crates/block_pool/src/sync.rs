//! The one switch between the standard library and loom, which explores every interleaving of a small model.

use std::sync::PoisonError;

#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Mutex, MutexGuard};

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Mutex, MutexGuard};

/// Pauses between two looks at a lock that somebody else has, as powers of two of spin loop hints: some ten microseconds.
#[cfg(not(loom))]
const PAUSES: std::ops::RangeInclusive<u32> = 9..=11;

/// Locks `mutex`. What it guards is taken to be whole, even if a thread has panicked.
///
/// The pool's lock is mostly held for some nanoseconds a block, much shorter than putting a thread to sleep and waking it
/// takes. So a thread that finds it taken first waits with growing pauses, in which the owner has the lock's cache line
/// for itself, and sleeps only if that was not enough.
#[inline]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    #[cfg(not(loom))]
    match mutex.try_lock() {
        Ok(guard) => return guard,
        Err(std::sync::TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
        Err(std::sync::TryLockError::WouldBlock) => {}
    }
    lock_taken(mutex)
}

#[cfg(not(loom))]
#[cold]
fn lock_taken<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    for exponent in PAUSES {
        for _ in 0..1 << exponent {
            std::hint::spin_loop();
        }
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => {}
        }
    }
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(loom)]
fn lock_taken<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
