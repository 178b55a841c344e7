//! Drafts that the model rejects: they are truncated, if the windows allow it, or not committed at all.

use paged_attention::BlockId;

use crate::machine::{ANSWER, Machine, Sequence, Work, other_than, prompt};
use crate::reference::Tested;

/// The token that is computed next, one draft that the model accepts, and two that it rejects.
const COMPUTED: usize = 4;
const ACCEPTED: usize = 2;

fn add_drafts(tested: &Tested, sequence: &mut Sequence) {
    assert_eq!(sequence.tokens.len(), sequence.table.len() + 1);
    let accepted = tested.next(&sequence.tokens);
    sequence.tokens.push(accepted);
    let rejected = other_than(tested.next(&sequence.tokens));
    sequence.tokens.extend([rejected, rejected]);
}

/// A sequence that was computed up to its next token. The prompt is shorter than the windows, so that they begin to
/// move while it is answered.
fn start(machine: &Machine<'_>) -> (usize, Sequence) {
    let prompt = prompt(1);
    let mut sequence = machine.start(&prompt);
    machine.step(&mut [sequence.rest()]);
    (prompt.len(), sequence)
}

pub(crate) fn truncated(tested: &Tested, block_size: usize) {
    let machine = Machine::new(tested, block_size);
    let (prompt, mut sequence) = start(&machine);
    let (mut truncated, mut refused) = (0, 0);
    while sequence.tokens.len() < prompt + ANSWER {
        add_drafts(tested, &mut sequence);
        machine.step(&mut [sequence.next(COMPUTED)]);
        let computed = sequence.table.len();
        let len = computed - (COMPUTED - ACCEPTED);
        let is_allowed = machine.can_truncate(&sequence, len);
        assert_eq!(machine.truncate(&mut sequence, len).is_ok(), is_allowed, "{len} tokens");
        if is_allowed {
            truncated += 1;
            continue;
        }
        refused += 1;
        // The window has passed what the next token sees: the sequence is started again.
        let mut tokens = sequence.tokens[..len].to_vec();
        tokens.push(tested.next(&tokens));
        sequence = machine.start_cached(&tokens);
        // Full blocks are cached, also those that the window has passed.
        assert_eq!(sequence.table.len(), len.min(computed / block_size * block_size));
        if sequence.table.len() < len {
            let rest = len - sequence.table.len();
            machine.step(&mut [sequence.next(rest)]);
        }
    }
    assert!(truncated > 0 && refused > 0, "{truncated} truncations, {refused} refusals");
    machine.generate(&mut [&mut sequence], ANSWER);
}

pub(crate) fn not_committed(tested: &Tested, block_size: usize) {
    let machine = Machine::new(tested, block_size);
    let (prompt, mut sequence) = start(&machine);
    // It computes its single tokens in the same steps.
    let (_, mut other) = start(&machine);
    while sequence.tokens.len() < prompt + ANSWER {
        add_drafts(tested, &mut sequence);
        let drafted = Work { sequence: &mut sequence, computed: COMPUTED, accepted: ACCEPTED };
        machine.step(&mut [drafted, other.rest()]);
        sequence.tokens.truncate(sequence.table.len());
        sequence.tokens.push(tested.next(&sequence.tokens));
    }
}

pub(crate) fn refused(tested: &Tested, block_size: usize) {
    let machine = Machine::new(tested, block_size);
    let mut sequence = machine.start(&prompt(61));
    let mut refusals = 0;
    for _ in 0..ANSWER {
        machine.generate(&mut [&mut sequence], 1);
        let before = State::of(&machine, &sequence);
        for len in 1..sequence.table.len() {
            if !machine.can_truncate(&sequence, len) {
                sequence.table.truncate(len).unwrap_err();
                sequence.table.fork_at(len).unwrap_err();
                refusals += 1;
            }
        }
        assert_eq!(State::of(&machine, &sequence), before);
    }
    assert!(refusals > ANSWER);
}

#[derive(Debug, PartialEq)]
struct State {
    len: usize,
    capacity: usize,
    blocks: Vec<Vec<BlockId>>,
    available: usize,
    evictable: usize,
}

impl State {
    fn of(machine: &Machine<'_>, sequence: &Sequence) -> Self {
        let (table, pool) = (&sequence.table, machine.cache.pool());
        let blocks = |group| table.blocks_of_group(group).to_vec();
        Self {
            len: table.len(),
            capacity: table.capacity(),
            blocks: (0..machine.tested.groups.len()).map(blocks).collect(),
            available: pool.available(),
            evictable: pool.evictable(),
        }
    }
}
