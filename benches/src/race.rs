//! Contenders that take turns.

use std::time::Instant;

use crate::is_smoke_test;

/// One contender: does its work once and returns nothing; what it leaves behind is its own business.
pub type Contender<'a> = Box<dyn FnMut() + 'a>;

/// Times each contender once per round, in turn, so that what else the machine does hits all alike.
#[derive(Debug)]
pub struct Race {
    /// Nanoseconds: round after round, contender after contender.
    rounds: Vec<Vec<f64>>,
}

impl Race {
    /// Runs rounds for some seconds, five at least, and one before them that does not count. In a smoke test one is enough.
    pub fn run(seconds: f64, contenders: &mut [Contender<'_>]) -> Self {
        let least = if is_smoke_test() { 1 } else { 5 };
        let seconds = if is_smoke_test() { 0.0 } else { seconds };
        let mut round = || -> Vec<f64> {
            let time = |contender: &mut Contender<'_>| {
                let started = Instant::now();
                contender();
                started.elapsed().as_nanos() as f64
            };
            contenders.iter_mut().map(time).collect()
        };
        round();
        let (started, mut rounds) = (Instant::now(), Vec::new());
        while rounds.len() < least || started.elapsed().as_secs_f64() < seconds {
            rounds.push(round());
        }
        Self { rounds }
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

/// The middle number; not a number if there is none.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        let race = Race { rounds: vec![vec![2.0, 1.0], vec![40.0, 10.0], vec![9.0, 3.0]] };
        assert_eq!((race.time(0), race.time(1), race.ratio(0, 1)), (9.0, 3.0, 3.0));
        let mut calls = 0;
        Race::run(0.0, &mut [Box::new(|| calls += 1)]);
        assert_eq!(calls, 6);
    }
}
