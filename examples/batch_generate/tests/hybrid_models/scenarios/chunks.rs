//! Prompts that are computed in chunks.

use crate::machine::{ANSWER, Machine, Sequence, prompt};
use crate::reference::Tested;

/// The sizes of the chunks of each sequence, in turns.
const CHUNKS: [&[usize]; 6] = [&[90], &[48], &[7], &[16, 1], &[5, 33, 2], &[3, 11, 1, 1, 24]];

pub(crate) fn run(tested: &Tested, block_size: usize) {
    let machine = Machine::new(tested, block_size);
    let prompt = prompt(90);
    // Each computes the whole prompt: nothing is matched.
    let mut sequences: Vec<Sequence> = CHUNKS.iter().map(|_| machine.start(&prompt)).collect();
    for step in 0.. {
        let mut work = Vec::new();
        for (sequence, chunks) in sequences.iter_mut().zip(CHUNKS) {
            let rest = prompt.len().saturating_sub(sequence.table.len());
            if rest > 0 {
                work.push(sequence.next(rest.min(chunks[step % chunks.len()])));
            }
        }
        if work.is_empty() {
            break;
        }
        machine.step(&mut work);
    }
    machine.generate(&mut sequences.iter_mut().collect::<Vec<_>>(), ANSWER);
    for sequence in &sequences[1..] {
        assert_eq!(sequence.tokens, sequences[0].tokens);
    }
}
