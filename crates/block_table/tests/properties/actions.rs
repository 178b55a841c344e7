//! What happens in a history.

use proptest::prelude::*;

#[derive(Debug, Clone)]
pub(crate) enum Action {
    /// A new sequence with a prompt of this length, whose last few tokens depend on the branch.
    Create {
        kind: usize,
        prompt: usize,
        branch: u32,
        salts: usize,
    },
    /// Look up what a new sequence with such a prompt would take, then match and reserve it.
    LookUp {
        kind: usize,
        prompt: usize,
        branch: u32,
        salts: usize,
    },
    /// A salt from a position on, this many tokens after two before the end.
    SaltFrom {
        table: usize,
        ahead: usize,
        salt: usize,
    },
    /// Continue a sequence with the cached blocks of its next tokens.
    MatchPrefix {
        table: usize,
    },
    /// Reserve some tokens, write them, commit some of them, and roll the rest back or leave it reserved.
    Step {
        table: usize,
        reserve: usize,
        commit: usize,
        known: bool,
        roll_back: bool,
    },
    Reserve {
        table: usize,
        tokens: usize,
    },
    Truncate {
        table: usize,
        len: usize,
    },
    /// Write some positions again, as layers do that do not process their tokens together.
    MakeWritable {
        table: usize,
        start: usize,
        tokens: usize,
    },
    ShrinkTo {
        table: usize,
        end: usize,
    },
    FreeBefore {
        table: usize,
        position: usize,
    },
    Fork {
        table: usize,
        len: usize,
    },
    Drop {
        table: usize,
    },
    SwapOut {
        table: usize,
    },
    SwapIn {
        swapped: usize,
    },
    Reset,
    /// Allocate every available block, so that the next reservations fail. [`Relax`](Self::Relax) frees them.
    Exhaust,
    Relax,
    /// From now on the copies, reads and writes of a group fail, or work.
    Fail {
        group: usize,
        fails: bool,
    },
}

pub(crate) fn action() -> impl Strategy<Value = Action> {
    let table = 0..8usize;
    let flag = prop::bool::weighted(0.8);
    let salts = prop_oneof![Just(0), 0..12usize];
    prop_oneof![
        4 => (0..6usize, 0..40usize, 0..3u32, salts.clone())
            .prop_map(|(kind, prompt, branch, salts)| Action::Create { kind, prompt, branch, salts }),
        3 => (0..6usize, 0..60usize, 0..3u32, salts)
            .prop_map(|(kind, prompt, branch, salts)| Action::LookUp { kind, prompt, branch, salts }),
        1 => (table.clone(), 0..12usize, 0..2usize)
            .prop_map(|(table, ahead, salt)| Action::SaltFrom { table, ahead, salt }),
        2 => table.clone().prop_map(|table| Action::MatchPrefix { table }),
        8 => (table.clone(), 0..30usize, 0..30usize, flag, flag)
            .prop_map(|(table, reserve, commit, known, roll_back)| {
                Action::Step { table, reserve, commit, known, roll_back }
            }),
        1 => (table.clone(), 0..30usize).prop_map(|(table, tokens)| Action::Reserve { table, tokens }),
        3 => (table.clone(), 0..60usize).prop_map(|(table, len)| Action::Truncate { table, len }),
        1 => (table.clone(), 0..60usize, 0..20usize)
            .prop_map(|(table, start, tokens)| Action::MakeWritable { table, start, tokens }),
        1 => (table.clone(), 0..90usize).prop_map(|(table, end)| Action::ShrinkTo { table, end }),
        1 => (table.clone(), 0..60usize).prop_map(|(table, position)| Action::FreeBefore { table, position }),
        3 => (table.clone(), 0..60usize).prop_map(|(table, len)| Action::Fork { table, len }),
        3 => table.clone().prop_map(|table| Action::Drop { table }),
        1 => table.clone().prop_map(|table| Action::SwapOut { table }),
        2 => table.prop_map(|swapped| Action::SwapIn { swapped }),
        1 => prop::bool::weighted(0.3).prop_map(|reset| if reset { Action::Reset } else { Action::Relax }),
        1 => Just(Action::Exhaust),
        2 => Just(Action::Relax),
        1 => (0..3usize, any::<bool>()).prop_map(|(group, fails)| Action::Fail { group, fails }),
    ]
}
