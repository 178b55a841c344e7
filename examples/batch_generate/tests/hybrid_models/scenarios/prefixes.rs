//! Sequences that start with what others have computed.

use crate::machine::{ANSWER, Machine, prompt};
use crate::reference::Tested;

pub(crate) fn run(tested: &Tested, block_size: usize) {
    let machine = Machine::new(tested, block_size);
    let question = prompt(61);
    let mut first = machine.start_cached(&question);
    assert_eq!(first.table.len(), 0);
    machine.generate(&mut [&mut first], 10);

    // The same prompt. The windows of the first sequence have passed some of it, but nothing was evicted.
    let mut second = machine.start_cached(&question);
    assert_eq!(second.table.len(), (first.table.len() / block_size * block_size).min(question.len() - 1));
    machine.generate(&mut [&mut first, &mut second], ANSWER);
    assert_eq!(second.tokens[..], first.tokens[..second.tokens.len()]);

    // A prompt that begins in the same way, and continues in another way inside a block of 4 or 16.
    let begins = [&question[..30], &prompt(25)].concat();
    let mut third = machine.start_cached(&begins);
    assert_eq!(third.table.len(), 30);
    machine.generate(&mut [&mut second, &mut third], ANSWER);

    // The conversation has ended, and goes on later.
    let computed = first.table.len();
    let conversation = [&first.tokens[..], &prompt(9)].concat();
    drop((first, second, third));
    assert_eq!(machine.cache.pool().in_use(), 0);
    let mut continued = machine.start_cached(&conversation);
    assert!(continued.table.len() >= computed / block_size * block_size);
    assert!(continued.table.len() > question.len(), "the answer is cached, too");
    machine.generate(&mut [&mut continued], ANSWER);
    machine.cache.pool().check().unwrap();
}
