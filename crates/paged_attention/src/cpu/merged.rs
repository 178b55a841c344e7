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
