//! Contenders that take turns.

use std::time::Instant;

use crate::{is_smoke_test, median};

/// One contender. A call does its work once; the contender itself drops or keeps the result.
pub type Contender<'a> = Box<dyn FnMut() + 'a>;

/// Times each contender once per round, in turn, so that other load on the machine disturbs all contenders alike. Each
/// round begins with a different contender, so that none always runs first.
#[derive(Debug)]
pub struct Race {
    /// Nanoseconds, indexed by round and by contender.
    rounds: Vec<Vec<f64>>,
}

impl Race {
    /// Runs one round that does not count, then `rounds` rounds.
    pub fn run(rounds: usize, contenders: &mut [Contender<'_>]) -> Self {
        round(contenders, 0);
        Self { rounds: (0..rounds).map(|first| round(contenders, first)).collect() }
    }

    /// Runs one round that does not count, then rounds for `seconds` seconds, but at least five. A smoke test runs one.
    pub fn run_for(seconds: f64, contenders: &mut [Contender<'_>]) -> Self {
        if is_smoke_test() {
            return Self::run(1, contenders);
        }
        let mut race = Self::run(5, contenders);
        let started = Instant::now();
        while started.elapsed().as_secs_f64() < seconds {
            race.rounds.push(round(contenders, race.rounds.len()));
        }
        race
    }

    /// The median time of a contender in nanoseconds.
    pub fn time(&self, contender: usize) -> f64 {
        median(self.rounds.iter().map(|round| round[contender]).collect())
    }

    /// The median, over the rounds, of one contender's time divided by another's.
    pub fn ratio(&self, of: usize, to: usize) -> f64 {
        median(self.rounds.iter().map(|round| round[of] / round[to]).collect())
    }
}

/// The nanoseconds of each contender in one round that begins with contender `first` and wraps around.
fn round(contenders: &mut [Contender<'_>], first: usize) -> Vec<f64> {
    let mut times = vec![0.0; contenders.len()];
    for turn in 0..contenders.len() {
        let at = (first + turn) % contenders.len();
        let started = Instant::now();
        contenders[at]();
        times[at] = started.elapsed().as_nanos() as f64;
    }
    times
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        let race = Race { rounds: vec![vec![2.0, 1.0], vec![40.0, 10.0], vec![9.0, 3.0]] };
        assert_eq!((race.time(0), race.time(1), race.ratio(0, 1)), (9.0, 3.0, 3.0));
        let mut calls = 0;
        Race::run(3, &mut [Box::new(|| calls += 1)]);
        assert_eq!(calls, 4);
    }

    #[test]
    fn each_round_begins_with_another_contender() {
        let order = RefCell::new(String::new());
        Race::run(3, &mut [Box::new(|| order.borrow_mut().push('a')), Box::new(|| order.borrow_mut().push('b'))]);
        assert_eq!(*order.borrow(), ["ab", "ab", "ba", "ab"].concat());
    }
}
