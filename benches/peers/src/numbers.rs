//! The queries, keys and values of every contender, so that their results can be compared. `python/protocol.py`
//! generates the same numbers.

use std::ops::Range;

/// What the numbers are for.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Queries: twice as wide, so that the softmax has peaks.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
}

/// The numbers at the indices `range` of the infinite sequence of `kind`.
pub fn numbers(kind: Kind, range: Range<usize>) -> Vec<f32> {
    let (seed, width) = match kind {
        Kind::Query => (1u32, 2.0),
        Kind::Key => (2, 1.0),
        Kind::Value => (3, 1.0),
    };
    let number = |i: usize| {
        let mut x = (i as u32).wrapping_add(seed.wrapping_mul(1_000_003)).wrapping_mul(0x9e37_79b1);
        x = (x ^ (x >> 15)).wrapping_mul(0x85eb_ca77);
        x ^= x >> 13;
        ((x & 0xffff) as f32 / 32768.0 - 1.0) * width
    };
    range.map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_equal_those_of_the_python_side() {
        // Printed by `numbers` of `python/protocol.py`.
        assert_eq!(numbers(Kind::Query, 0..3), QUERIES);
        assert_eq!(numbers(Kind::Value, 1000..1003), VALUES);
    }

    const QUERIES: [f32; 3] = [-0.084_960_94, -1.958_557_1, -0.656_860_35];
    const VALUES: [f32; 3] = [0.848_663_33, 0.584_655_76, 0.513_122_56];
}
