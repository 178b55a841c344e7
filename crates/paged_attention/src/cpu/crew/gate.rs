//! A gate to work that borrows from the stack of the thread that opened it.
//!
//! Other threads come when they have time, which may be after that thread has gone on. They bring an `Arc` of the gate
//! with them, so the gate itself is always there. What is borrowed is there as long as the gate is open, and as long as
//! somebody is inside: the thread that opened it closes it, by a panic too, and leaves only when all that were let in
//! have left.
#![allow(unsafe_code)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// For how long the thread that closes the gate looks whether the others leave before it sleeps: about as long as it
/// takes to be woken.
const PATIENCE: Duration = Duration::from_micros(50);

/// The bit of `Gate::state` that lets nobody in any more. It is never taken back.
const CLOSED: usize = 1;

/// What each thread inside adds to `Gate::state`.
const INSIDE: usize = 2;

pub(super) struct Gate {
    /// `CLOSED`, and `INSIDE` for each thread inside.
    state: AtomicUsize,
    /// A borrowed `W`; to be used only between a successful `enter` and its end.
    work: *const (),
    /// `call::<W>`.
    call: unsafe fn(*const ()),
    /// The first panic of a thread inside.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Tells the thread that has closed the gate, and waits with the lock of `panic`, that nobody is inside any more.
    left: Condvar,
}

// SAFETY: of the fields, only the pointer is not `Send` by itself. The gate reaches through it for a `&W` and nothing
// else, wherever it is, and `open` demands that `W` is `Sync`. The gate does not own the `W`: dropping the gate does
// not touch it.
unsafe impl Send for Gate {}
// SAFETY: as for `Send`; all that threads change through a `&Gate` is an atomic or behind a mutex.
unsafe impl Sync for Gate {}

/// # Safety
///
/// `work` must come from a `&W` that is still valid, and stays so until this returns.
unsafe fn call<W: Fn() + Sync>(work: *const ()) {
    // SAFETY: the caller promises that it is a valid `&W`.
    let work = unsafe { &*work.cast::<W>() };
    work();
}

impl Gate {
    /// Calls `body`, during which threads that have the gate can enter and call `work`; then closes it, and waits for
    /// those inside. A panic of one of them goes on here.
    pub(super) fn open<W: Fn() + Sync, R>(work: &W, body: impl FnOnce(&Arc<Gate>) -> R) -> R {
        let gate = Arc::new(Gate {
            state: AtomicUsize::new(0),
            work: std::ptr::from_ref(work).cast(),
            call: call::<W>,
            panic: Mutex::new(None),
            left: Condvar::new(),
        });
        let open = Open(&gate);
        let result = body(open.0);
        drop(open);
        let panic = gate.lock().take();
        match panic {
            Some(panic) => resume_unwind(panic),
            None => result,
        }
    }

    /// Lets this thread in, unless the gate is closed.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        // Who has the gate has all that was done before it was opened: relaxed operations suffice.
        let enter = |state| (state & CLOSED == 0).then_some(state + INSIDE);
        self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).ok().map(|_| Inside(self))
    }

    /// Lets nobody in any more, and returns when nobody is inside.
    fn close(&self) {
        // Whoever left has released what it did, and this acquires it.
        if self.state.fetch_or(CLOSED, Ordering::Acquire) == 0 {
            return;
        }
        let is_empty = || self.state.load(Ordering::Acquire) == CLOSED;
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if is_empty() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock();
        while !is_empty() {
            guard = self.left.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the gate at its end, also when that is a panic.
struct Open<'g>(&'g Arc<Gate>);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A thread inside: the one that opened the gate waits for its end.
pub(super) struct Inside<'g>(&'g Gate);

impl Inside<'_> {
    /// Works. A panic is kept for the thread that opened the gate.
    pub(super) fn work(&self) {
        let Gate { work, call, .. } = *self.0;
        // SAFETY: `work` comes from the `&W` of `open`, and `call` is that of the same `W`. The reference is valid
        // until `open` ends, by a return or a panic. Both come after `close`, which returns only when `state` counts
        // nobody inside and nobody can enter any more; this `Inside` has been counted in before `CLOSED` was set, and
        // is counted out after this call. Every change of `state` reads the one before it, so what a thread did inside,
        // down to its last use of `work`, happens before `close` reads the count without it.
        let done = catch_unwind(AssertUnwindSafe(|| unsafe { call(work) }));
        if let Err(panic) = done {
            self.0.lock().get_or_insert(panic);
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if self.0.state.fetch_sub(INSIDE, Ordering::Release) == CLOSED | INSIDE {
            // With the lock: between its last look at the state and its sleep, who closes has it.
            let _guard = self.0.lock();
            self.0.left.notify_one();
        }
    }
}
