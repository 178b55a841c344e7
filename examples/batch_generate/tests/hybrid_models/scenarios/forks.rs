//! Forks in the middle of an answer, which continue with different tokens.

use crate::machine::{ANSWER, Machine, other_than, prompt};
use crate::reference::Tested;

pub(crate) fn run(tested: &Tested, block_size: usize) {
    let machine = Machine::new(tested, block_size);
    let mut parent = machine.start(&prompt(40));
    // Not the end of a block of 4 or 16, so that the forks share a block that is not full.
    machine.generate(&mut [&mut parent], 10);
    assert_eq!(parent.table.len(), 49);
    let next = *parent.tokens.last().unwrap();
    let mut first = parent.fork_with(other_than(next));
    let mut second = parent.fork_with(other_than(other_than(next)));
    let shared = parent.table.blocks_of_group(0).to_vec();
    assert_eq!(first.table.blocks_of_group(0), shared, "a fork takes no block");
    machine.generate(&mut [&mut parent, &mut first, &mut second], 12);

    // A fork of a fork, at a length that the windows still have, and the sequence that it comes from ends.
    let len = (0..first.table.len()).find(|&len| len > 49 && machine.can_truncate(&first, len));
    let len = len.unwrap_or(first.table.len());
    let mut third = first.fork_with(0);
    third.table = first.table.fork_at(len).unwrap();
    third.tokens.truncate(len);
    third.tokens.push(other_than(first.tokens[len]));
    machine.generate(&mut [&mut parent, &mut second, &mut third], ANSWER - 12);
    drop((parent, second));
    machine.generate(&mut [&mut first, &mut third], ANSWER - 12);
    drop((first, third));
    assert_eq!(machine.cache.pool().in_use(), 0);
    machine.cache.pool().check().unwrap();
}
