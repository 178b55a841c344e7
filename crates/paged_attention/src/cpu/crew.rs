//! Threads that work together, without waiting for each other where one of them holds a lock.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::Scope;

/// For how long a caller looks whether the others come to their end before it goes to sleep: about as long as it takes to
/// be woken.
const PATIENCE: Duration = Duration::from_micros(50);

/// Calls `work` on this thread and on `threads - 1` others of the current rayon pool at the same time, and returns when all
/// have been there. It takes up what is left to do until nothing is, so that who comes late is not missed.
///
/// A thread that waits inside rayon takes up other tasks of its pool meanwhile, which may want any lock. So nobody waits for
/// rayon inside `work`, where locks are held, but only behind it, with none: whoever holds a lock gets on and gives it back,
/// and sequences can be stepped by tasks of one pool.
pub(super) fn together<E: Send>(threads: usize, work: impl Fn() -> Result<(), E> + Sync) -> Result<(), E> {
    if threads <= 1 {
        return work();
    }
    let others = AtomicUsize::new(threads - 1);
    let helper = || {
        // What fails here fails for the one who called, too, and leaves what it has not taken up to the others.
        let _ = work();
        others.fetch_sub(1, Ordering::Release);
    };
    rayon::in_place_scope(|scope| {
        call(scope, threads - 1, &helper);
        let done = work();
        // A thread of the pool looks for something to do before it sleeps; others would sleep at once.
        if rayon::current_thread_index().is_none() {
            let start = Instant::now();
            while others.load(Ordering::Acquire) > 0 && start.elapsed() < PATIENCE {
                std::hint::spin_loop();
            }
        }
        done
    })
}

/// Calls so many threads: two, who call the others, as waking one takes a while.
fn call<'s>(scope: &Scope<'s>, threads: usize, work: &'s (impl Fn() + Sync)) {
    for half in [threads.div_ceil(2), threads / 2] {
        if half > 0 {
            scope.spawn(move |scope| {
                call(scope, half - 1, work);
                work();
            });
        }
    }
}
