//! Contenders that take turns, round after round, so that other load on the machine disturbs all of them alike.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use harness::Record;
use rayon::ThreadPool;

use crate::args::Effort;
use crate::median;

/// About how long a turn is. The work is repeated for that long, because threads have to wake up and a peer in another
/// process has to receive the request.
const TURN: Duration = Duration::from_millis(20);
/// The pause before the next turn. After it, threads that spin while they wait for work have given up.
const PAUSE: Duration = Duration::from_millis(10);

/// A contender that takes longer than this for one piece of work takes part in one round only: a long turn is hardly
/// affected by other load, and the other contenders get more rounds.
const SLOW: Duration = Duration::from_secs(1);

type Run<'a> = Box<dyn FnMut(usize) -> Result<Duration> + 'a>;

/// One implementation of a case's work.
pub struct Contender<'a> {
    /// Its name in the record.
    pub name: String,
    run: Run<'a>,
    process: Option<u32>,
}

impl<'a> Contender<'a> {
    /// A contender that measures its own time: `run(times)` does the work `times` times and returns the time that it
    /// took.
    pub fn new(name: impl Into<String>, run: impl FnMut(usize) -> Result<Duration> + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run), process: None }
    }

    /// A contender that is timed here. `work` gets the number of its call, counted from 0.
    pub fn timed(name: impl Into<String>, work: impl FnMut(usize) -> Result<()> + 'a) -> Self {
        Self::new(name, repeated(work))
    }

    /// A contender that is timed here and works on these threads: one of them repeats `work`, and the others help.
    /// `work` gets the number of its call, counted from 0.
    pub fn timed_on(
        threads: &'a ThreadPool,
        name: impl Into<String>,
        work: impl FnMut(usize) -> Result<()> + Send + 'a,
    ) -> Self {
        let mut work = repeated(work);
        Self::new(name, move |times| threads.install(|| work(times)))
    }

    /// The same contender, marked as working in process `id`, whose processor time outside its turns is reported.
    pub fn in_process(self, id: u32) -> Self {
        Self { process: Some(id), ..self }
    }
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

impl std::fmt::Debug for Contender<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// The times of all contenders.
#[derive(Debug)]
pub struct Standings {
    names: Vec<String>,
    /// Nanoseconds of one piece of work, indexed by round and by contender; `None` if it did not take part.
    rounds: Vec<Vec<Option<f64>>>,
}

/// The number of rounds, and the time that they may take together.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    least: usize,
    most: usize,
    time: Duration,
}

impl From<Effort> for Budget {
    fn from(effort: Effort) -> Self {
        match effort {
            Effort::Smoke => Self { least: 2, most: 2, time: Duration::ZERO },
            Effort::Quick => Self { least: 3, most: 5, time: Duration::from_secs(3) },
            Effort::Full => Self { least: 5, most: 15, time: Duration::from_secs(8) },
        }
    }
}

/// Lets all contenders work in turn. A contender that fails is left out, with a printed line; a slow one takes part in
/// one round.
///
/// # Errors
///
/// If the first contender fails: without it there is nothing to compare with.
pub fn take(mut contenders: Vec<Contender<'_>>, budget: Budget) -> Result<Standings> {
    // For each contender: the repetitions of its work in a turn, and the number of rounds that it takes part in.
    let mut plans = Vec::new();
    let mut i = 0;
    while i < contenders.len() {
        match plan(&mut contenders[i], budget) {
            Ok(plan) => {
                plans.push(plan);
                i += 1;
            }
            Err(error) if i > 0 => {
                eprintln!("  skipped {}: {error:#}", contenders[i].name);
                drop(contenders.remove(i));
            }
            Err(error) => return Err(error),
        }
    }

    let mut idle = Idle::new(&contenders);
    let mut failed = vec![false; contenders.len()];
    let started = Instant::now();
    let mut rounds: Vec<Vec<Option<f64>>> = Vec::new();
    while rounds.len() < budget.most && (rounds.len() < budget.least || started.elapsed() < budget.time) {
        let mut round = vec![None; contenders.len()];
        for (i, contender) in contenders.iter_mut().enumerate() {
            let (times, takes_part) = plans[i];
            if failed[i] || rounds.len() >= takes_part {
                continue;
            }
            idle.begin(i);
            match (contender.run)(times) {
                Ok(taken) => round[i] = Some(taken.as_nanos() as f64 / times as f64),
                Err(error) if i > 0 => {
                    eprintln!("  left out {}: {error:#}", contender.name);
                    failed[i] = true;
                }
                Err(error) => return Err(error),
            }
            sleep(PAUSE);
            idle.end(i);
        }
        rounds.push(round);
    }
    idle.report(&contenders, started.elapsed());

    let mut standings = Standings { names: contenders.into_iter().map(|contender| contender.name).collect(), rounds };
    for i in (0..failed.len()).rev().filter(|&i| failed[i]) {
        standings.names.remove(i);
        for round in &mut standings.rounds {
            round.remove(i);
        }
    }
    Ok(standings)
}

/// The repetitions of a contender's work in a turn, and the number of its rounds. The first call warms up; the second
/// is timed.
fn plan(contender: &mut Contender<'_>, budget: Budget) -> Result<(usize, usize)> {
    let first = (contender.run)(1)?;
    if first > SLOW {
        return Ok((1, 1));
    }
    let one = (contender.run)(1)?.max(Duration::from_nanos(50));
    Ok(((TURN.as_secs_f64() / one.as_secs_f64()).clamp(1.0, 4096.0) as usize, budget.most))
}

impl Standings {
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

    /// Records the median time in nanoseconds of the first contender, with its ratios to the contender `floor` and to
    /// each of the others.
    pub fn record(&self, record: &mut Record, case: &str, floor: &str) {
        self.push(record, case, "time", self.time(0), "ns", floor);
    }

    /// Records a rate instead of the time: one piece of work is `units` tokens.
    pub fn record_rate(&self, record: &mut Record, case: &str, floor: &str, units: f64) {
        self.push(record, case, "rate", units / self.time(0) * 1e9, "tokens/s", floor);
    }

    fn push(&self, record: &mut Record, case: &str, metric: &str, value: f64, unit: &str, floor: &str) {
        let floor_ratio = self.find(floor).map(|floor| self.ratio(floor, 0));
        let peers = self.names().iter().enumerate().skip(1).filter(|(_, name)| *name != floor);
        record.compared(
            case,
            metric,
            value,
            unit,
            floor_ratio,
            peers.map(|(i, name)| (name.clone(), self.ratio(i, 0))),
        );
    }
}

/// Checks that processes are idle outside their turns.
struct Idle {
    /// For each contender: its process's processor time at the start of its turn, and the sum over its turns.
    turns: Vec<(Duration, Duration)>,
    processes: Vec<Option<u32>>,
    /// The processes, and their processor time before the first turn.
    before: Vec<(u32, Duration)>,
}

impl Idle {
    fn new(contenders: &[Contender<'_>]) -> Self {
        let processes: Vec<_> = contenders.iter().map(|contender| contender.process).collect();
        let mut distinct: Vec<u32> = processes.iter().copied().flatten().collect();
        distinct.sort_unstable();
        distinct.dedup();
        Self {
            turns: vec![(Duration::ZERO, Duration::ZERO); processes.len()],
            before: distinct.into_iter().map(|id| (id, processor_time(id))).collect(),
            processes,
        }
    }

    fn begin(&mut self, contender: usize) {
        if let Some(id) = self.processes[contender] {
            self.turns[contender].0 = processor_time(id);
        }
    }

    fn end(&mut self, contender: usize) {
        if let Some(id) = self.processes[contender] {
            let (began, sum) = &mut self.turns[contender];
            *sum += processor_time(id).saturating_sub(*began);
        }
    }

    fn report(&self, contenders: &[Contender<'_>], elapsed: Duration) {
        for &(id, before) in &self.before {
            let own: Duration = self
                .turns
                .iter()
                .zip(&self.processes)
                .filter(|(_, of)| **of == Some(id))
                .map(|((_, sum), _)| *sum)
                .sum();
            let others = processor_time(id).saturating_sub(before).saturating_sub(own);
            let name = contenders.iter().find(|contender| contender.process == Some(id)).map(|it| it.name.as_str());
            if others.as_secs_f64() > 0.02 * elapsed.as_secs_f64() {
                let name = name.unwrap_or_default();
                eprintln!("  {name} was busy for {others:.1?} of {elapsed:.1?} outside its turns");
            }
        }
    }
}

/// The processor time of a process and its threads so far; zero if the system does not report it.
fn processor_time(id: u32) -> Duration {
    /// The unit in `/proc/<id>/stat`, the same on every machine.
    const TICK: Duration = Duration::from_millis(10);
    let text = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // After the name, which may contain spaces, fields 12 and 13 are the times in user and in kernel mode.
    let ticks = text.rsplit_once(')').map_or(0, |(_, fields)| {
        fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum()
    });
    TICK * ticks
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        let names = vec!["a".into(), "b".into(), "slow".into()];
        let rounds = [[2.0, 1.0, 90.0], [40.0, 10.0, f64::NAN], [9.0, 3.0, f64::NAN]];
        let rounds = rounds.map(|round| round.map(|time| (!time.is_nan()).then_some(time)).to_vec()).to_vec();
        let standings = Standings { names, rounds };
        assert_eq!((standings.time(0), standings.time(1), standings.ratio(0, 1)), (9.0, 3.0, 3.0));
        assert_eq!((standings.find("b"), standings.find("c")), (Some(1), None));
        assert_eq!((standings.time(2), standings.ratio(2, 0)), (90.0, 45.0));
    }

    #[test]
    fn a_failing_contender_is_left_out_unless_it_is_the_first() {
        let works = || Contender::timed("works", |_| Ok(()));
        let fails = || Contender::new("fails", |_| bail!("no"));
        let mut runs = 0;
        let fails_later = Contender::new("fails later", |_| {
            runs += 1;
            if runs > 3 { bail!("no more") } else { Ok(Duration::ZERO) }
        });
        let standings = take(vec![works(), fails(), fails_later, works()], Effort::Smoke.into()).unwrap();
        assert_eq!(standings.names(), ["works", "works"]);
        assert!(standings.rounds.iter().all(|round| round.len() == 2));
        assert!(take(vec![fails(), works()], Effort::Smoke.into()).is_err());
    }

    #[test]
    fn processor_time_of_a_busy_process_grows() {
        let started = Instant::now();
        let before = processor_time(std::process::id());
        while started.elapsed() < Duration::from_millis(60) {
            std::hint::spin_loop();
        }
        if cfg!(target_os = "linux") {
            assert!(processor_time(std::process::id()) > before);
        }
    }
}
