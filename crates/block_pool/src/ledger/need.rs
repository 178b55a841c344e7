//! How many units a sequence takes to go on.

use std::ops::Range;

use smallvec::SmallVec;

use super::write::cost_of_copy;
use super::{Group, Ledger};
use crate::{BlockId, Span, Window};

impl Ledger {
    /// How many available units a sequence takes to have slots for the tokens at `positions`, at most `chunk` of them at a
    /// time, if nothing of them is cached. The first of them may be in a block that the sequence has, as it has all
    /// before block number `end`. `lists` are its blocks in each group, and the one to be written, if there is one.
    pub(crate) fn growth_in_chunks<'b>(
        &self,
        window: Option<Window>,
        positions: Range<usize>,
        end: usize,
        chunk: usize,
        lists: impl Fn(usize) -> (&'b [BlockId], Option<BlockId>),
    ) -> usize {
        let need = |(group, of): (usize, &Group)| {
            let (own, written) = lists(group);
            let others = |id: BlockId| self.ref_counts[self.entry(group, id)] - 1;
            let copy = written.map_or(0, |id| cost_of_copy(others(id)));
            let own = own.iter().filter(|id| others(**id) == 0).count();
            Need { span: of.spec.span.narrowed_by(window), units: of.units, evictable: 0, copy, own }
        };
        let needs: SmallVec<[Need; 2]> = self.groups.iter().enumerate().map(need).collect();
        most_units(&needs, self.block_size, positions, end, Some(chunk))
    }
}

/// The most units that a sequence takes to have slots for the tokens at `positions`, at once, or at most `chunk` of them
/// at a time, when it has all blocks before number `end`.
pub(super) fn most_units(
    needs: &[Need],
    block_size: usize,
    positions: Range<usize>,
    end: usize,
    chunk: Option<usize>,
) -> usize {
    let units = |passed: usize, to: usize| {
        let growth = to.div_ceil(block_size).saturating_sub(end);
        let of = |need: &Need| {
            let all = need.evictable.saturating_add(growth).saturating_add(need.copy);
            if chunk.is_none() || need.span.is_all() {
                return all.saturating_mul(need.units);
            }
            let has = to.div_ceil(block_size).saturating_sub(need.span.freed_blocks(passed, block_size));
            all.min(need.evictable + has.saturating_sub(need.evictable + need.own)).saturating_mul(need.units)
        };
        needs.iter().map(of).fold(0, usize::saturating_add)
    };
    let (from, to) = (positions.start, positions.end);
    let Some(chunk) = chunk.filter(|_| needs.iter().any(|need| !need.span.is_all())) else { return units(from, to) };
    // Chunks can be shorter, so the next one can start anywhere: in the block after one of these starts, from which on a
    // window has freed at least as much as there.
    let longest = chunk.max(1).saturating_add(block_size - 1);
    let chunks = positions.step_by(block_size).map(|at| (at, to.min(at.saturating_add(longest))));
    chunks.map(|(at, end)| units(at, end)).max().unwrap_or_else(|| units(from, from))
}

/// What a sequence that continues a match needs of one group.
pub(super) struct Need {
    pub(super) span: Span,
    /// Units of a block.
    pub(super) units: usize,
    /// Matched blocks that are not in use yet.
    pub(super) evictable: usize,
    /// 1 if the last matched block has to be copied before the first write.
    pub(super) copy: usize,
    /// Blocks that only this sequence uses. When the window passes a block that others use too, no memory becomes
    /// available.
    pub(super) own: usize,
}
