//! Runs work on several threads of the rayon pool. The caller holds no lock while it waits for the other threads, and
//! it does not wait for threads that are busy with something else.

mod gate;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use gate::Gate;

/// The most helpers that a thread may have spawned and the pool has not started yet. While no thread of the pool is
/// free, a caller spawns no more: it would get no help sooner, and the spawned tasks would pile up.
const MAX_PENDING_HELPERS: usize = 64;

thread_local! {
    /// Helpers that this thread has spawned and that no thread of the pool has started yet.
    static PENDING_HELPERS: Arc<AtomicUsize> = Arc::default();
}

/// Calls `work` on this thread and on up to `threads - 1` helpers, other threads of the current rayon pool, at the same
/// time. Returns when every call that has begun has returned. `work` claims tasks until none is left. So the caller can
/// do all of it alone, and a helper that comes later finds the gate closed: busy threads are not waited for. A panic in
/// a helper is resumed in the caller.
///
/// A thread that blocks inside rayon executes other tasks of its pool meanwhile, and these may need any lock. So no
/// thread blocks inside rayon here: helpers are spawned, not joined. The caller waits until each helper that has begun
/// has finished the tasks that it has claimed. While it waits, it holds no lock and executes no other tasks. Helpers do
/// nothing but `work`, in which a thread that holds a lock always makes progress and releases it. So sequences can be
/// stepped by the tasks of one pool.
pub(super) fn run_parallel<E>(threads: usize, work: impl Fn() -> Result<(), E> + Sync) -> Result<(), E> {
    if threads <= 1 {
        return work();
    }
    let help = || {
        // What fails here also fails in the caller. Tasks that this thread has not claimed are left to the others.
        let _ = work();
    };
    Gate::open(&help, |gate| {
        spawn_helpers(gate, threads - 1);
        work()
    })
}

/// Spawns `threads` helpers as a tree: two here, each of which spawns half of the rest, since waking a thread takes a
/// while.
fn spawn_helpers(gate: &Arc<Gate>, threads: usize) {
    // The counter is gone in a thread that is about to end: it works alone.
    let Ok(pending) = PENDING_HELPERS.try_with(Arc::clone) else { return };
    for half in [threads.div_ceil(2), threads / 2] {
        if half == 0 || pending.load(Ordering::Relaxed) >= MAX_PENDING_HELPERS {
            return;
        }
        pending.fetch_add(1, Ordering::Relaxed);
        let (gate, pending) = (Arc::clone(gate), Arc::clone(&pending));
        rayon::spawn(move || {
            pending.fetch_sub(1, Ordering::Relaxed);
            if let Some(inside) = gate.enter() {
                spawn_helpers(&gate, half - 1);
                inside.work();
            }
        });
    }
}
