//! A pool that is too small for all sequences: some are dropped, and computed again later.

use std::collections::VecDeque;

use crate::machine::{ANSWER, Machine, Sequence, prompt};
use crate::reference::Tested;

const PROMPTS: [usize; 5] = [40, 61, 3, 50, 90];
const CHUNK: usize = 19;

pub(crate) fn run(tested: &Tested, block_size: usize) {
    let longest = PROMPTS.iter().max().unwrap() + ANSWER;
    let machine = Machine::small(tested, block_size, longest, CHUNK);
    let pool = machine.cache.pool();
    // A sequence is its tokens and the length of its prompt.
    let mut waiting: VecDeque<(Vec<u32>, usize)> = PROMPTS.map(|len| (prompt(len), len)).into();
    let mut running: Vec<(Sequence, usize)> = Vec::new();
    let (mut dropped, mut recomputed, mut finished) = (0, 0, 0);
    let mut has_room = true;
    for step in 0.. {
        assert!(step < 2000, "the sequences keep each other from being computed");
        if running.is_empty() && waiting.is_empty() {
            break;
        }
        // Room for a first chunk is enough: that is too little for all of them to the end. But what was dropped must not
        // come back, and use its cached blocks again, before the others have got theirs.
        if (has_room || running.is_empty())
            && let Some((tokens, _)) = waiting.front()
            && machine.cache.table().lookup_prefix(&tokens[..CHUNK.min(tokens.len())]).blocks <= pool.available()
        {
            let (tokens, prompt) = waiting.pop_front().unwrap();
            running.push((machine.start_cached(&tokens), prompt));
        }
        assert!(!running.is_empty(), "one sequence always has room");
        let mut work: Vec<_> = running
            .iter_mut()
            .map(|(sequence, _)| {
                let rest = sequence.tokens.len() - sequence.table.len();
                sequence.next(rest.min(CHUNK))
            })
            .collect();
        has_room = machine.try_step(&mut work).is_empty();
        if !has_room {
            let (youngest, prompt) = running.pop().unwrap();
            assert!(!running.is_empty(), "one sequence always has room");
            dropped += 1;
            recomputed += youngest.table.len();
            waiting.push_front((youngest.tokens, prompt));
        }
        running.retain(|(sequence, prompt)| {
            let is_finished = sequence.tokens.len() >= prompt + ANSWER;
            finished += usize::from(is_finished);
            !is_finished
        });
        pool.check().unwrap();
    }
    assert_eq!((finished, pool.in_use()), (PROMPTS.len(), 0));
    assert!(dropped > 0 && recomputed > 0, "{dropped} were dropped, with {recomputed} tokens");
}
