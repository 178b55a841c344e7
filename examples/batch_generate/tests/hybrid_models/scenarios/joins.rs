//! Batches of sequences that join at different steps.

use crate::machine::{ANSWER, Machine, Sequence, prompt};
use crate::reference::Tested;

/// When a sequence joins, and the length of its prompt.
const REQUESTS: [(usize, usize); 4] = [(0, 61), (4, 3), (5, 40), (17, 90)];

pub(crate) fn run(tested: &Tested, block_size: usize) {
    let machine = Machine::new(tested, block_size);
    let prompts = REQUESTS.map(|(_, len)| prompt(len));
    let mut running: Vec<(usize, Sequence)> = Vec::new();
    let mut finished = 0;
    for step in 0.. {
        let joining = REQUESTS.iter().enumerate().filter(|(_, (at, _))| *at == step);
        running.extend(joining.map(|(i, _)| (i, machine.start(&prompts[i]))));
        if running.is_empty() {
            break;
        }
        // One step has prompts and single tokens.
        let mut work: Vec<_> = running.iter_mut().map(|(_, sequence)| sequence.rest()).collect();
        machine.step(&mut work);
        running.retain(|(i, sequence)| {
            let answer = &sequence.tokens[prompts[*i].len()..];
            let is_finished = answer.len() == ANSWER;
            if is_finished {
                finished += 1;
                assert!(varied(answer), "an answer that repeats itself shows little: {answer:?}");
            }
            !is_finished
        });
    }
    assert_eq!(finished, REQUESTS.len());
    assert_eq!(machine.cache.pool().in_use(), 0);
    machine.cache.pool().check().unwrap();
}

fn varied(answer: &[u32]) -> bool {
    let mut tokens = answer.to_vec();
    tokens.sort_unstable();
    tokens.dedup();
    tokens.len() >= 8
}
