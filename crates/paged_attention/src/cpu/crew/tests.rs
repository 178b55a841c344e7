use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::gate::Gate;
use super::{MAX_PENDING_HELPERS, PENDING_HELPERS, run_parallel};

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// Waits until other threads have made `done` true. Fails after 60 seconds.
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        thread::yield_now();
    }
}

#[test]
fn the_requested_number_of_threads_works_at_once() {
    let pool = pool(8);
    for threads in 1..=8 {
        // Each call waits until all calls have begun, so each runs on a different thread.
        let barrier = Barrier::new(threads);
        let seen = Mutex::new(HashSet::new());
        let work = || {
            barrier.wait();
            seen.lock().unwrap().insert(thread::current().id());
            Ok::<(), ()>(())
        };
        pool.install(|| run_parallel(threads, work)).unwrap();
        assert_eq!(seen.into_inner().unwrap().len(), threads);
    }
}

#[test]
fn the_error_of_the_caller_is_returned_and_errors_of_helpers_are_not() {
    let pool = pool(2);
    let caller = || thread::current().id();
    let both = Barrier::new(2);
    let outcome = |fails: &(dyn Fn(bool) -> bool + Sync)| {
        pool.install(|| {
            let own = caller();
            run_parallel(2, || {
                both.wait();
                if fails(caller() == own) { Err("failed") } else { Ok(()) }
            })
        })
    };
    assert_eq!(outcome(&|is_caller| is_caller), Err("failed"));
    assert_eq!(outcome(&|is_caller| !is_caller), Ok(()));
}

#[test]
fn a_panic_of_a_helper_is_resumed_in_the_caller() {
    let pool = pool(4);
    for round in 0..100 {
        let barrier = Barrier::new(3);
        let finished = AtomicUsize::new(0);
        let call = || {
            pool.install(|| {
                let own = thread::current().id();
                run_parallel(3, || {
                    barrier.wait();
                    if thread::current().id() != own {
                        resume_unwind(Box::new(round));
                    }
                    finished.fetch_add(1, Ordering::Relaxed);
                    Ok::<(), ()>(())
                })
            })
        };
        let panic = catch_unwind(AssertUnwindSafe(call)).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&round));
        assert_eq!(finished.load(Ordering::Relaxed), 1, "the caller has finished its work");
    }
    assert_eq!(pool.install(|| run_parallel(4, || Ok::<(), ()>(()))), Ok(()), "the pool still works");
}

/// What helpers borrow must outlive them, also when the caller panics in its own work.
#[test]
fn a_caller_that_panics_waits_for_the_helpers_inside() {
    let pool = pool(2);
    for round in 0..100 {
        let barrier = Barrier::new(2);
        let done = AtomicBool::new(false);
        let call = || {
            pool.install(|| {
                let own = thread::current().id();
                run_parallel(2, || {
                    barrier.wait();
                    if thread::current().id() == own {
                        resume_unwind(Box::new("the caller's"));
                    }
                    // In later rounds longer than the caller spins.
                    thread::sleep(Duration::from_micros(round * 4));
                    done.store(true, Ordering::Relaxed);
                    Ok::<(), ()>(())
                })
            })
        };
        let panic = catch_unwind(AssertUnwindSafe(call)).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"the caller's"));
        assert!(done.load(Ordering::Relaxed), "round {round}: the caller returned before the helper");
    }
}

#[test]
fn a_closed_gate_cannot_be_entered_and_threads_inside_are_waited_for() {
    let (calls, slow) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        if slow.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(5));
        }
        calls.fetch_add(1, Ordering::Relaxed);
    };
    let mut kept = None;
    Gate::open(&work, |gate| {
        gate.enter().unwrap().work();
        gate.enter().unwrap().work();
        kept = Some(gate.clone());
    });
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    assert!(kept.unwrap().enter().is_none(), "closed");

    slow.store(true, Ordering::Relaxed);
    let (entered, helper_has_entered) = mpsc::channel();
    let helper = Gate::open(&work, |gate| {
        let gate = gate.clone();
        let helper = thread::spawn(move || {
            let inside = gate.enter().unwrap();
            entered.send(()).unwrap();
            inside.work();
        });
        helper_has_entered.recv().unwrap();
        helper
    });
    assert_eq!(calls.load(Ordering::Relaxed), 3, "`open` returned before the work inside was done");
    helper.join().unwrap();
}

/// Thousands of short calls, by callers inside the pool and outside, some of them nested. Each borrows from its own
/// stack frame, which is overwritten as soon as the call returns.
#[test]
fn short_calls_under_contention_never_touch_a_freed_stack_frame() {
    const CALLS: usize = 2_000;
    const TASKS: usize = 7;
    fn call(deeper: bool) {
        let mut done = [0usize; TASKS];
        let sum = {
            let cells: Vec<AtomicUsize> = done.iter().map(|_| AtomicUsize::new(0)).collect();
            let next = AtomicUsize::new(0);
            let work = || {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(cell) = cells.get(at) else { return Ok::<(), ()>(()) };
                    if deeper && at == TASKS / 2 {
                        call(false);
                    }
                    cell.fetch_add(at + 1, Ordering::Relaxed);
                }
            };
            run_parallel(4, work).unwrap();
            // These accesses are not atomic: a helper that were still running would race with them.
            for (done, cell) in done.iter_mut().zip(cells) {
                *done = cell.into_inner();
            }
            done.iter().sum::<usize>()
        };
        assert_eq!(sum, TASKS * (TASKS + 1) / 2);
    }
    let pool = pool(4);
    thread::scope(|scope| {
        for caller in 0..4 {
            let pool = &pool;
            scope.spawn(move || {
                let calls = || (0..CALLS).for_each(|i| call(i % 5 == 0));
                if caller % 2 == 0 { pool.install(calls) } else { calls() }
            });
        }
    });
}

/// The queue of a pool whose threads are busy for hours must not fill with helpers for calls that have long returned.
#[test]
fn helpers_spawned_for_busy_threads_do_not_pile_up() {
    let pool = pool(3);
    let pending = || PENDING_HELPERS.with(|calls| calls.load(Ordering::Relaxed));
    let release = Barrier::new(3);
    pool.in_place_scope(|scope| {
        let (busy, are_busy) = mpsc::channel();
        for _ in 0..2 {
            let (busy, release) = (busy.clone(), &release);
            scope.spawn(move |_| {
                busy.send(()).unwrap();
                release.wait();
            });
        }
        are_busy.iter().take(2).for_each(drop);
        let (done, is_done) = mpsc::channel();
        let release = &release;
        scope.spawn(move |_| {
            let before = pending();
            let mut most = 0;
            for _ in 0..10 * MAX_PENDING_HELPERS {
                run_parallel(3, || Ok::<(), ()>(())).unwrap();
                most = most.max(pending());
            }
            release.wait();
            // The other threads are free again, and start the helpers.
            wait_until("all helpers are started", || pending() == 0);
            let all = Barrier::new(3);
            let outcome = run_parallel(3, || {
                all.wait();
                Ok::<(), ()>(())
            });
            done.send((before, most, outcome)).unwrap();
        });
        assert_eq!(is_done.recv().unwrap(), (0, MAX_PENDING_HELPERS, Ok(())));
    });
}
