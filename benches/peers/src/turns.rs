//! Turns of about the same length for work of any length, on any threads or in another process.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use harness::{Contender, Race, Record, Rounds};
use rayon::ThreadPool;

use crate::args::Effort;

/// The names of the machine's floors in a race: of reading, and of arithmetic.
pub const FLOORS: [&str; 2] = ["floor of reading", "floor of arithmetic"];

/// About how long a turn is. The work is repeated for that long, because threads have to wake up and a peer in another
/// process has to receive the request.
const TURN: Duration = Duration::from_millis(20);
/// The pause before the next turn. After it, threads that spin while they wait for work have given up.
const PAUSE: Duration = Duration::from_millis(10);

/// A contender that takes longer than this for one piece of work takes part in one round only: a long turn is hardly
/// affected by other load, and the other contenders get more rounds.
const SLOW: Duration = Duration::from_secs(1);

/// What a contender does in its next turn.
enum Next {
    /// The turn that does not count: the work warms up, and its length is measured.
    WarmUp,
    /// Its work, this number of times.
    Work(usize),
    /// Its work once, and then nothing any more.
    LastWork,
    Nothing,
}

/// A contender that measures its own time: `run(times)` does the work `times` times and returns the time that it took.
pub fn contender<'a>(name: impl Into<String>, mut run: impl FnMut(usize) -> Result<Duration> + 'a) -> Contender<'a> {
    let mut next = Next::WarmUp;
    Contender::new(name, move |()| {
        let times = match next {
            Next::WarmUp => {
                next = plan(&mut run)?;
                return Ok(None);
            }
            Next::Work(times) => times,
            Next::LastWork => 1,
            Next::Nothing => return Ok(None),
        };
        let taken = run(times)?;
        if matches!(next, Next::LastWork) {
            next = Next::Nothing;
        }
        sleep(PAUSE);
        Ok(Some(taken.as_nanos() as f64 / times as f64))
    })
}

/// The first call warms up; the second is timed.
fn plan(run: &mut impl FnMut(usize) -> Result<Duration>) -> Result<Next> {
    if run(1)? > SLOW {
        return Ok(Next::LastWork);
    }
    let one = run(1)?.max(Duration::from_nanos(50));
    Ok(Next::Work((TURN.as_secs_f64() / one.as_secs_f64()).clamp(1.0, 4096.0) as usize))
}

/// A contender that is timed here. `work` gets the number of its call, counted from 0.
pub fn timed<'a>(name: impl Into<String>, work: impl FnMut(usize) -> Result<()> + 'a) -> Contender<'a> {
    contender(name, repeated(work))
}

/// A contender that is timed here and works on these threads: one of them repeats `work`, and the others help. `work`
/// gets the number of its call, counted from 0.
pub fn timed_on<'a>(
    threads: &'a ThreadPool,
    name: impl Into<String>,
    work: impl FnMut(usize) -> Result<()> + Send + 'a,
) -> Contender<'a> {
    let mut work = repeated(work);
    contender(name, move |times| threads.install(|| work(times)))
}

/// Returns a function that does `work` a number of times and returns the time that it took.
fn repeated(mut work: impl FnMut(usize) -> Result<()>) -> impl FnMut(usize) -> Result<Duration> {
    let mut turn = 0;
    move |times| {
        let started = Instant::now();
        for _ in 0..times {
            work(turn)?;
            turn += 1;
        }
        Ok(started.elapsed())
    }
}

/// Lets the contenders take turns for a time that depends on the effort. A contender that fails is left out.
///
/// # Errors
///
/// If the first contender fails.
pub fn take(mut contenders: Vec<Contender<'_>>, effort: Effort) -> Result<Race> {
    let rounds = match effort {
        Effort::Smoke => Rounds::exactly(2),
        Effort::Quick => Rounds::lasting(Duration::from_secs(3), 3, 5),
        Effort::Full => Rounds::lasting(Duration::from_secs(8), 5, 15),
    };
    Race::run(rounds, &mut contenders)
}

/// Records the median time of the first contender, with its ratios to the larger floor and to each of the others.
pub fn record_time(race: &Race, record: &mut Record, case: &str) {
    record_value(race, record, case, "time", race.time(0), "ns");
}

/// Records a rate instead of the time: one piece of work is `tokens` tokens.
pub fn record_rate(race: &Race, record: &mut Record, case: &str, tokens: f64) {
    record_value(race, record, case, "rate", tokens / race.time(0) * 1e9, "tokens/s");
}

fn record_value(race: &Race, record: &mut Record, case: &str, metric: &str, value: f64, unit: &str) {
    let floor_ratio = FLOORS.iter().filter_map(|floor| race.find(floor)).map(|floor| race.ratio(floor, 0));
    let floor_ratio = floor_ratio.reduce(f64::max);
    let peers = race.names().iter().enumerate().skip(1).filter(|(_, name)| !FLOORS.contains(&name.as_str()));
    record.compared(case, metric, value, unit, floor_ratio, peers.map(|(i, name)| (name.clone(), race.ratio(i, 0))));
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn short_work_is_repeated_and_slow_work_is_done_in_one_round() {
        let calls = RefCell::new([vec![], vec![]]);
        let of = |at: usize, one: Duration| {
            let calls = &calls;
            contender("any", move |times| {
                calls.borrow_mut()[at].push(times);
                Ok(one * times as u32)
            })
        };
        let race = take(vec![of(0, TURN / 5), of(1, 2 * SLOW)], Effort::Smoke).unwrap();
        assert_eq!(*calls.borrow(), [vec![1, 1, 5, 5], vec![1, 1]]);
        assert_eq!((race.time(0), race.ratio(1, 0)), (TURN.as_nanos() as f64 / 5.0, 500.0));
    }
}
