//! The switch between the standard library and loom, which runs every interleaving of a small model.

use std::sync::PoisonError;

#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Mutex, MutexGuard, Weak};

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Mutex, MutexGuard};

/// loom has no weak references: under loom what they point to has always gone.
#[cfg(loom)]
pub(crate) struct Weak<T>(std::marker::PhantomData<T>);

#[cfg(not(loom))]
pub(crate) fn downgrade<T>(arc: &Arc<T>) -> Weak<T> {
    Arc::downgrade(arc)
}

#[cfg(loom)]
pub(crate) fn downgrade<T>(_: &Arc<T>) -> Weak<T> {
    Weak(std::marker::PhantomData)
}

#[cfg(not(loom))]
pub(crate) fn upgrade<T>(weak: &Weak<T>) -> Option<Arc<T>> {
    weak.upgrade()
}

#[cfg(loom)]
pub(crate) fn upgrade<T>(_: &Weak<T>) -> Option<Arc<T>> {
    None
}

/// Pauses between two attempts to get a lock that another thread has, as powers of two of spin loop hints: some ten
/// microseconds in all.
#[cfg(not(loom))]
const PAUSES: std::ops::RangeInclusive<u32> = 9..=11;

/// Locks `mutex`. The data is taken to be consistent, even if a thread has panicked.
///
/// The pool's lock is mostly kept for some nanoseconds a block, much shorter than it takes to put a thread to sleep and
/// to wake it. So a thread that finds the lock taken first waits with growing pauses, in which the owner has the lock's
/// cache line to itself, and sleeps only if that was not enough.
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
