//! Whether a peer's process is idle outside its turns: if not, it takes time from the other contenders.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use harness::Contender;

/// The processor time of one process, shared by its contenders.
#[derive(Debug)]
pub struct Watch {
    process: u32,
    /// The time of its first turn, and its processor time then.
    first: Option<(Instant, Duration)>,
    /// Its processor time during its turns.
    turns: Duration,
}

impl Watch {
    /// Watches the process with this id from its first turn on.
    pub fn new(process: u32) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self { process, first: None, turns: Duration::ZERO }))
    }

    /// The same contender, whose turns are watched.
    pub fn over<'a>(watch: &Rc<RefCell<Self>>, mut contender: Contender<'a>) -> Contender<'a> {
        let watch = watch.clone();
        Contender::new(contender.name.clone(), move |prepared| {
            let process = watch.borrow().process;
            let began = processor_time(process);
            watch.borrow_mut().first.get_or_insert((Instant::now(), began));
            let time = contender.turn(prepared);
            watch.borrow_mut().turns += processor_time(process).saturating_sub(began);
            time
        })
    }

    /// Prints a line if the process was busy outside its turns.
    pub fn report(&self, name: &str) {
        let Some((started, before)) = self.first else { return };
        let others = processor_time(self.process).saturating_sub(before).saturating_sub(self.turns);
        let elapsed = started.elapsed();
        if others.as_secs_f64() > 0.02 * elapsed.as_secs_f64() {
            eprintln!("  {name} was busy for {others:.1?} of {elapsed:.1?} outside its turns");
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
    use super::*;

    fn spin(time: Duration) {
        let started = Instant::now();
        while started.elapsed() < time {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn only_turns_count_as_turns() {
        let watch = Watch::new(std::process::id());
        let mut contender = Watch::over(&watch, Contender::timed("busy", |()| spin(Duration::from_millis(60))));
        contender.turn(&()).unwrap();
        let turns = watch.borrow().turns;
        spin(Duration::from_millis(60));
        assert_eq!(watch.borrow().turns, turns);
        if cfg!(target_os = "linux") {
            assert!(turns > Duration::ZERO && processor_time(std::process::id()) > turns);
        }
    }
}
