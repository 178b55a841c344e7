//! Threads that work together, without waiting for each other where one of them holds a lock, and without waiting for a
//! thread that has something else to do.

mod gate;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use gate::Gate;

/// How many calls for help of one thread may be unanswered. While no thread of the pool is free, a caller does not add
/// more: it would get no help sooner, and the calls would pile up.
const MOST_UNANSWERED: usize = 64;

thread_local! {
    /// Calls for help of this thread that no thread of the pool has taken up so far.
    static UNANSWERED: Arc<AtomicUsize> = Arc::default();
}

/// Calls `work` on this thread and on up to `threads - 1` others of the current rayon pool at the same time, and
/// returns when all that have begun are done. `work` takes up what is left to do until nothing is. So the caller could
/// do all of it alone, and a thread that comes later finds the gate closed: busy threads are not waited for. A panic in
/// one of the others goes on in the caller.
///
/// A thread that waits inside rayon takes up other tasks of its pool meanwhile, which may want any lock. So nobody
/// waits for rayon here: others are only told that there is work. Those that have begun are waited for without locks,
/// and without taking up other tasks, for as long as it takes to finish what each has taken up. They do nothing but
/// `work`, in which whoever holds a lock gets on and gives it back. So sequences can be stepped by tasks of one pool.
pub(super) fn together<E>(threads: usize, work: impl Fn() -> Result<(), E> + Sync) -> Result<(), E> {
    if threads <= 1 {
        return work();
    }
    let help = || {
        // What fails here fails for the caller, too, and leaves what it has not taken up to the others.
        let _ = work();
    };
    Gate::open(&help, |gate| {
        call(gate, threads - 1);
        work()
    })
}

/// Calls so many threads: two, which call the others, as waking one takes a while.
fn call(gate: &Arc<Gate>, threads: usize) {
    // A thread that is about to end has no such count any more, and works alone.
    let Ok(unanswered) = UNANSWERED.try_with(Arc::clone) else { return };
    for half in [threads.div_ceil(2), threads / 2] {
        if half == 0 || unanswered.load(Ordering::Relaxed) >= MOST_UNANSWERED {
            return;
        }
        unanswered.fetch_add(1, Ordering::Relaxed);
        let (gate, unanswered) = (Arc::clone(gate), Arc::clone(&unanswered));
        rayon::spawn(move || {
            unanswered.fetch_sub(1, Ordering::Relaxed);
            if let Some(inside) = gate.enter() {
                call(&gate, half - 1);
                inside.work();
            }
        });
    }
}
