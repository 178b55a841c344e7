//! Timing through criterion that also returns the medians for the record.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use criterion::Criterion;

/// Times routines through criterion and keeps the samples, which criterion itself only writes to its own files.
#[derive(Debug, Default, Clone)]
pub struct Stopwatch(Rc<RefCell<Vec<f64>>>);

impl Stopwatch {
    /// Times `routine` under the name `id`. Returns its median time in nanoseconds, or `None` if a filter on the
    /// command line excludes it.
    pub fn time(criterion: &mut Criterion, id: &str, mut routine: impl FnMut()) -> Option<f64> {
        Self::time_with(criterion, id, || (), |()| routine())
    }

    /// Does the same with a `setup` before each call, which is not timed.
    pub fn time_with<S>(
        criterion: &mut Criterion,
        id: &str,
        mut setup: impl FnMut() -> S,
        mut routine: impl FnMut(&mut S),
    ) -> Option<f64> {
        let samples = Self::default();
        let recorded = samples.clone();
        criterion.bench_function(id, |bencher| {
            bencher.iter_custom(|times| {
                let mut total = Duration::ZERO;
                for _ in 0..times {
                    let mut state = setup();
                    let started = Instant::now();
                    routine(&mut state);
                    total += started.elapsed();
                }
                recorded.0.borrow_mut().push(total.as_nanos() as f64 / times as f64);
                total
            });
        });
        let mut samples = samples.0.take();
        samples.sort_by(f64::total_cmp);
        samples.get(samples.len() / 2).copied()
    }
}
