//! Merges the states of a query tile's tasks.
//!
//! In each key head, states are merged in the order of their chunks, whichever thread finishes first. So the sums of a
//! row are the same however many threads there are. What comes in its turn is merged at once, so that little memory is
//! held.

use std::ops::Range;

use super::state::{Rows, State};

/// The states of a query tile's rows, merged as far as they have been computed.
pub(super) struct Merged {
    /// What is merged: parts of different key heads.
    parts: Vec<Part>,
    /// States that were finished before their turn.
    early: Vec<Part>,
    /// How many tasks have not been added.
    missing: usize,
}

/// The state of a query tile's rows in some key heads.
pub(super) struct Part {
    pub(super) heads: Range<usize>,
    /// How many tasks in these key heads come before it.
    pub(super) turn: usize,
    /// `(heads, rows)`.
    pub(super) state: State,
}

impl Part {
    fn overlaps(&self, heads: &Range<usize>) -> bool {
        self.heads.start < heads.end && heads.start < self.heads.end
    }

    /// The rows of one of its key heads.
    fn rows(&self, head: usize) -> Rows<'_> {
        let rows = self.state.rows() / self.heads.len().max(1);
        let first = (head - self.heads.start) * rows;
        self.state.part(self.state.rows(), first..first + rows)
    }

    /// The same, each key head for itself.
    fn by_head(self) -> impl Iterator<Item = Part> {
        let heads = self.heads.clone();
        heads.map(move |head| Part { heads: head..head + 1, turn: self.turn, state: self.rows(head).copy() })
    }
}

impl Merged {
    /// Nothing of `tasks` tasks.
    pub(super) fn of(tasks: usize) -> Self {
        Self { parts: Vec::with_capacity(tasks.min(8)), early: Vec::new(), missing: tasks }
    }

    /// Adds the state of a task. Returns whether it was the last.
    pub(super) fn add(&mut self, part: Part) -> bool {
        match self.is_next(&part.heads, part.turn) {
            true => self.merge(part),
            false => self.early.push(part),
        }
        self.is_complete()
    }

    /// The same for the state of a task of several query tiles. It is copied if it cannot be merged now.
    pub(super) fn add_rows(&mut self, heads: &Range<usize>, turn: usize, rows: &Rows<'_>) -> bool {
        let is_next = self.is_next(heads, turn);
        match self.parts.iter_mut().find(|own| is_next && own.heads == *heads) {
            Some(own) => {
                own.state.merge_rows(rows);
                own.turn += 1;
                self.is_complete()
            }
            None => self.add(Part { heads: heads.clone(), turn, state: rows.copy() }),
        }
    }

    /// Merges what has its turn now that one more task was added. Returns whether that was the last.
    fn is_complete(&mut self) -> bool {
        while let Some(next) = self.early.iter().position(|part| self.is_next(&part.heads, part.turn)) {
            let part = self.early.swap_remove(next);
            self.merge(part);
        }
        self.missing -= 1;
        self.missing == 0
    }

    /// Whether all tasks before this one are merged.
    fn is_next(&self, heads: &Range<usize>, turn: usize) -> bool {
        let next = |head: usize| self.parts.iter().find(|own| own.heads.contains(&head)).map_or(0, |own| own.turn);
        heads.clone().all(|head| next(head) == turn)
    }

    fn merge(&mut self, part: Part) {
        if let Some(own) = self.parts.iter_mut().find(|own| own.heads == part.heads) {
            own.state.merge(&part.state);
            own.turn += 1;
        } else if part.turn == 0 {
            self.parts.push(Part { turn: 1, ..part });
        } else {
            // Tasks of several sequences and of one may have different numbers of key heads.
            let whole = self.parts.extract_if(.., |own| own.heads.len() > 1 && own.overlaps(&part.heads));
            let whole: Vec<Part> = whole.collect();
            self.parts.extend(whole.into_iter().flat_map(Part::by_head));
            for own in self.parts.iter_mut().filter(|own| own.overlaps(&part.heads)) {
                own.state.merge_rows(&part.rows(own.heads.start));
                own.turn += 1;
            }
        }
    }

    /// The merged states, in the order of the key heads.
    pub(super) fn into_parts(mut self) -> Vec<Part> {
        self.parts.sort_unstable_by_key(|part| part.heads.start);
        self.parts
    }
}

#[cfg(test)]
mod tests {
    use super::super::wide::LANES;
    use super::*;

    const ROWS: usize = 3;

    /// A random number below `n`.
    fn below(random: &mut u64, n: usize) -> usize {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) as usize % n
    }

    /// The state of some rows of a head, of which a turn sees other tokens than the others.
    fn row(head: usize, turn: usize, row: usize) -> State {
        let mut state = State::new(1, LANES);
        state.accumulators(0..1)[0] = std::array::from_fn(|i| ((head * 7 + turn * 31 + row * 5 + i) % 13) as f32 - 6.3);
        state.set_seen(((head + turn * 3 + row) % 5) as f32, 1.0 + turn as f32);
        state
    }

    fn state(heads: Range<usize>, turn: usize) -> State {
        let rows = heads.flat_map(|head| (0..ROWS).map(move |i| row(head, turn, i)));
        State::of_rows(rows.collect())
    }

    #[test]
    fn parts_of_any_heads_in_any_order_are_merged_in_the_order_of_their_turns() {
        let mut random = 1;
        for _ in 0..300 {
            let (kv_heads, turns) = (1 + below(&mut random, 8), 1 + below(&mut random, 6));
            let mut parts = Vec::new();
            for turn in 0..turns {
                let step = 1 + below(&mut random, kv_heads);
                for first in (0..kv_heads).step_by(step) {
                    parts.push((first..kv_heads.min(first + step), turn));
                }
            }
            let mut merged = Merged::of(parts.len());
            while !parts.is_empty() {
                let (heads, turn) = parts.swap_remove(below(&mut random, parts.len()));
                let part = state(heads.clone(), turn);
                let last = match below(&mut random, 2) {
                    0 => merged.add(Part { heads, turn, state: part }),
                    _ => merged.add_rows(&heads, turn, &part.part(part.rows(), 0..part.rows())),
                };
                assert_eq!(last, parts.is_empty());
            }
            let mut next = 0;
            for Part { heads, mut state, .. } in merged.into_parts() {
                assert_eq!(heads.start, next);
                next = heads.end;
                for (i, head) in heads.flat_map(|head| [head; ROWS]).enumerate() {
                    let mut expected = row(head, 0, i % ROWS);
                    for turn in 1..turns {
                        expected.merge(&row(head, turn, i % ROWS));
                    }
                    assert_eq!(state.lse(i).to_bits(), expected.lse(0).to_bits());
                    assert_eq!(state.accumulators(i..i + 1), expected.accumulators(0..1));
                }
            }
            assert_eq!(next, kv_heads);
        }
    }
}
