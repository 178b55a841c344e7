//! Contenders that take turns, round after round, so that other load on the machine disturbs all of them alike.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{is_smoke_test, median};

type Turn<'a, P> = Box<dyn FnMut(&P) -> Result<Option<f64>> + 'a>;

/// One implementation of the work, which can use what was prepared for the round, a `P`.
pub struct Contender<'a, P = ()> {
    /// Its name in the record.
    pub name: String,
    turn: Turn<'a, P>,
}

impl<'a, P> Contender<'a, P> {
    /// A contender that measures its own time: `turn` returns the nanoseconds of one piece of work, or `None` if it does
    /// not take part in the round.
    pub fn new(name: impl Into<String>, turn: impl FnMut(&P) -> Result<Option<f64>> + 'a) -> Self {
        Self { name: name.into(), turn: Box::new(turn) }
    }

    /// A contender that is timed here: a call of `work` is one piece of work.
    pub fn timed(name: impl Into<String>, mut work: impl FnMut(&P) + 'a) -> Self {
        Self::new(name, move |prepared| {
            let started = Instant::now();
            work(prepared);
            Ok(Some(started.elapsed().as_nanos() as f64))
        })
    }

    /// Takes one turn.
    ///
    /// # Errors
    ///
    /// If the work fails.
    pub fn turn(&mut self, prepared: &P) -> Result<Option<f64>> {
        (self.turn)(prepared)
    }
}

impl<P> std::fmt::Debug for Contender<'_, P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// How many rounds a race has.
#[derive(Debug, Clone, Copy)]
pub struct Rounds {
    warm_up: usize,
    least: usize,
    most: usize,
    time: Duration,
}

impl Rounds {
    /// This number of rounds, after one that does not count.
    pub fn exactly(n: usize) -> Self {
        Self { warm_up: 1, least: n, most: n, time: Duration::ZERO }
    }

    /// Rounds until this time has passed, but at least `least` and at most `most`, after one that does not count.
    pub fn lasting(time: Duration, least: usize, most: usize) -> Self {
        Self { warm_up: 1, least, most, time }
    }

    /// Rounds for this time, but at least five. A smoke test has one.
    pub fn for_seconds(seconds: f64) -> Self {
        if is_smoke_test() { Self::exactly(1) } else { Self::lasting(Duration::from_secs_f64(seconds), 5, usize::MAX) }
    }

    /// The same rounds after this number of rounds that do not count.
    #[must_use]
    pub fn after_warm_up(self, rounds: usize) -> Self {
        Self { warm_up: rounds, ..self }
    }
}

/// The times of all contenders that took part to the end.
#[derive(Debug)]
pub struct Race {
    names: Vec<String>,
    /// Nanoseconds of one piece of work, indexed by round and by contender; `None` if it did not take part.
    rounds: Vec<Vec<Option<f64>>>,
}

impl Race {
    /// Each contender takes one turn per round. Each round begins with a different contender, so that none always runs
    /// first.
    ///
    /// A contender that fails is left out, with a printed line.
    ///
    /// # Errors
    ///
    /// If the first contender fails: without it there is nothing to compare with.
    pub fn run(rounds: Rounds, contenders: &mut [Contender<'_>]) -> Result<Self> {
        Self::run_with(rounds, contenders, || ())
    }

    /// Does the same with a `prepare` before each round, which is not timed.
    ///
    /// # Errors
    ///
    /// If the first contender fails.
    pub fn run_with<P>(
        rounds: Rounds,
        contenders: &mut [Contender<'_, P>],
        mut prepare: impl FnMut() -> P,
    ) -> Result<Self> {
        let mut failed = vec![false; contenders.len()];
        for first in 0..rounds.warm_up {
            round(contenders, &mut failed, first, &prepare())?;
        }
        let started = Instant::now();
        let mut times: Vec<Vec<Option<f64>>> = Vec::new();
        while times.len() < rounds.most && (times.len() < rounds.least || started.elapsed() < rounds.time) {
            times.push(round(contenders, &mut failed, times.len(), &prepare())?);
        }
        let kept = || failed.iter().map(|failed| !failed);
        let names = contenders.iter().zip(kept()).filter(|(_, kept)| *kept).map(|(it, _)| it.name.clone()).collect();
        for round in &mut times {
            let mut kept = kept();
            round.retain(|_| kept.next().unwrap_or_default());
        }
        Ok(Self { names, rounds: times })
    }

    /// The names of the contenders, in their order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The index of a contender, if it took part to the end.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|other| other == name)
    }

    /// The median time of a contender in nanoseconds.
    pub fn time(&self, contender: usize) -> f64 {
        median(self.rounds.iter().filter_map(|round| round[contender]).collect())
    }

    /// The median, over the rounds, of one contender's time divided by another's.
    pub fn ratio(&self, of: usize, to: usize) -> f64 {
        median(self.rounds.iter().filter_map(|round| Some(round[of]? / round[to]?)).collect())
    }
}

/// The time of each contender in one round that begins with contender `first` and wraps around.
fn round<P>(
    contenders: &mut [Contender<'_, P>],
    failed: &mut [bool],
    first: usize,
    prepared: &P,
) -> Result<Vec<Option<f64>>> {
    let n = contenders.len();
    let mut times = vec![None; n];
    for at in (0..n).map(|turn| (first + turn) % n).filter(|&at| !failed[at]).collect::<Vec<_>>() {
        match contenders[at].turn(prepared) {
            Ok(time) => times[at] = time,
            Err(error) if at > 0 => {
                eprintln!("  left out {}: {error:#}", contenders[at].name);
                failed[at] = true;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(times)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::RefCell;

    use anyhow::bail;

    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        let names = vec!["a".into(), "b".into(), "slow".into()];
        let rounds = vec![
            vec![Some(2.0), Some(1.0), Some(90.0)],
            vec![Some(40.0), Some(10.0), None],
            vec![Some(9.0), Some(3.0), None],
        ];
        let race = Race { names, rounds };
        assert_eq!((race.time(0), race.time(1), race.ratio(0, 1)), (9.0, 3.0, 3.0));
        assert_eq!((race.find("b"), race.find("c")), (Some(1), None));
        assert_eq!((race.time(2), race.ratio(2, 0)), (90.0, 45.0));
    }

    #[test]
    fn each_round_begins_with_another_contender() {
        let order = RefCell::new(String::new());
        let mut contenders = ['a', 'b'].map(|name| {
            let order = &order;
            Contender::timed(name, move |prepared: &i32| {
                assert_eq!(*prepared, 7);
                order.borrow_mut().push(name);
            })
        });
        let race = Race::run_with(Rounds::exactly(3).after_warm_up(2), &mut contenders, || 7).unwrap();
        assert_eq!(*order.borrow(), ["ab", "ba", "ab", "ba", "ab"].concat());
        assert_eq!(race.rounds.len(), 3);
    }

    #[test]
    fn a_failing_contender_is_left_out_unless_it_is_the_first() {
        let works = || Contender::timed("works", |_| ());
        let fails = || Contender::new("fails", |()| bail!("no"));
        let mut runs = 0;
        let fails_later = Contender::new("fails later", |()| {
            runs += 1;
            if runs > 2 { bail!("no more") } else { Ok(Some(0.0)) }
        });
        let race = Race::run(Rounds::exactly(3), &mut [works(), fails(), fails_later, works()]).unwrap();
        assert_eq!(race.names(), ["works", "works"]);
        assert!(race.rounds.iter().all(|round| round.len() == 2));
        assert!(Race::run(Rounds::exactly(3), &mut [fails(), works()]).is_err());
    }
}
