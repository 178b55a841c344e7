//! Transposes squares of sixteen by sixteen numbers.

use std::array::from_fn;

use crate::cpu::wide::LANES;

/// The transpose of a square: four rounds, each of which interleaves row `i` with row `i + 8`. Interleaving is what
/// processors have instructions for.
#[inline(always)]
pub(super) fn square<T: Copy>(rows: [[T; LANES]; LANES]) -> [[T; LANES]; LANES] {
    (0..LANES.ilog2()).fold(rows, |rows, _| {
        from_fn(|i| {
            let (a, b) = (rows[i / 2], rows[i / 2 + LANES / 2]);
            let first = i % 2 * LANES / 2;
            from_fn(|lane| if lane % 2 == 0 { a[first + lane / 2] } else { b[first + lane / 2] })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        let rows: [[usize; LANES]; LANES] = from_fn(|row| from_fn(|column| row * LANES + column));
        let columns: [[usize; LANES]; LANES] = from_fn(|row| from_fn(|column| column * LANES + row));
        assert_eq!(square(rows), columns);
    }
}
