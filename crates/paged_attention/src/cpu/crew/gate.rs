//! A gate through which other threads run work that borrows from the stack of the thread that opened it.
//!
//! Other threads arrive when they have time, possibly after the opening thread has returned. Each has an `Arc` of the
//! gate, so the gate itself is still alive. The borrowed data is alive while the gate is open and while a thread is
//! inside: the opening thread closes the gate, also when it panics, and returns only when all threads that entered have
//! left.
#![allow(unsafe_code)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the closing thread spins until the others have left before it sleeps: about as long as waking a thread
/// takes.
const SPIN_TIME: Duration = Duration::from_micros(50);

/// The bit of `Gate::state` that means that no thread can enter any more. It is never cleared.
const CLOSED: usize = 1;

/// What each thread inside adds to `Gate::state`.
const INSIDE: usize = 2;

pub(super) struct Gate {
    /// `CLOSED`, and `INSIDE` for each thread inside.
    state: AtomicUsize,
    /// A borrowed `W`. It is used only between a successful `enter` and the drop of its `Inside`.
    work: *const (),
    /// `call::<W>`.
    call: unsafe fn(*const ()),
    /// The first panic of a thread inside.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Notifies the thread that closed the gate, and waits on the mutex `panic`, that no thread is inside any more.
    emptied: Condvar,
}

// SAFETY: of the fields, only the pointer is not `Send` by itself. On any thread, the gate uses it as a `&W` and for
// nothing else, and `open` demands that `W` is `Sync`. The gate does not own the `W`: dropping the gate does not touch
// it.
unsafe impl Send for Gate {}
// SAFETY: as for `Send`; all that threads change through a `&Gate` is an atomic or inside a mutex.
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
    /// Calls `body`. Until it returns, threads that have the gate can enter and call `work`. Then closes the gate, and
    /// waits for the threads inside. A panic of one of them is resumed here.
    pub(super) fn open<W: Fn() + Sync, R>(work: &W, body: impl FnOnce(&Arc<Gate>) -> R) -> R {
        let gate = Arc::new(Gate {
            state: AtomicUsize::new(0),
            work: std::ptr::from_ref(work).cast(),
            call: call::<W>,
            panic: Mutex::new(None),
            emptied: Condvar::new(),
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

    /// Enters the gate, unless it is closed.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        // The transfer of the `Arc` has made everything that was done before the gate was opened visible to this
        // thread: relaxed operations suffice.
        let enter = |state| (state & CLOSED == 0).then_some(state + INSIDE);
        self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).ok().map(|_| Inside(self))
    }

    /// Closes the gate to further threads, and returns when no thread is inside.
    fn close(&self) {
        // A thread that has left has released its writes, and this acquires them.
        if self.state.fetch_or(CLOSED, Ordering::Acquire) == 0 {
            return;
        }
        let is_empty = || self.state.load(Ordering::Acquire) == CLOSED;
        let start = Instant::now();
        while start.elapsed() < SPIN_TIME {
            if is_empty() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock();
        while !is_empty() {
            guard = self.emptied.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the gate when dropped, also by a panic.
struct Open<'g>(&'g Arc<Gate>);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A thread inside. The thread that opened the gate waits until this is dropped.
pub(super) struct Inside<'g>(&'g Gate);

impl Inside<'_> {
    /// Calls `work`. A panic is kept for the thread that opened the gate.
    pub(super) fn work(&self) {
        let Gate { work, call, .. } = *self.0;
        // SAFETY: `work` comes from the `&W` of `open`, and `call` is `call::<W>` for the same `W`. The reference is
        // valid until `open` ends, by a return or a panic. Both come after `close`, which returns only when `state`
        // counts no thread inside and no thread can enter any more. This `Inside` was added to the count before
        // `CLOSED` was set, and is subtracted after this call. Every change of `state` reads the one before it, so
        // everything that a thread did inside, including its last use of `work`, happens before `close` reads the count
        // without that thread.
        let done = catch_unwind(AssertUnwindSafe(|| unsafe { call(work) }));
        if let Err(panic) = done {
            self.0.lock().get_or_insert(panic);
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if self.0.state.fetch_sub(INSIDE, Ordering::Release) == CLOSED | INSIDE {
            // Notify under the lock: the closing thread holds it from its last check of the state until it sleeps.
            let _guard = self.0.lock();
            self.0.emptied.notify_one();
        }
    }
}
