//! A token that a row does not see cannot change the row by a bit, whatever its numbers are. A row that sees it is what
//! it is in dense attention in f64.

use paged_attention::KvDtype;

use crate::case::{Case, Numbers, Results, bound, cases, stores};
use crate::common::{Configure, agrees};
use crate::{STEPS, TOKENS, numbers_of};

/// What is not finite or too large, where it is (in an image, between two, and in another one), and the block size.
const POISONS: [(f32, usize, usize); 3] = [(f32::NAN, 30, 16), (f32::INFINITY, 60, 7), (3e38, 120, 32)];

fn run(case: &Case, configure: &Configure, dtype: KvDtype, block_size: usize, numbers: &Numbers) -> Results<f32> {
    let cache = case.cache(configure, dtype, block_size, TOKENS);
    let (mut table, mut results) = (cache.table(), Results::default());
    for positions in STEPS {
        let (q, k, v) = case.tensors(numbers, &positions);
        let mut step = cache.step();
        step.push_with(&mut table, &vec![0; positions.len()], &case.push_options(&positions)).unwrap();
        let (out, lse) = step.attend_with_lse(0, &q, &k, v.as_ref(), &case.attention()).unwrap();
        step.commit().unwrap();
        results.out.extend(numbers_of(&out));
        results.lse.extend(numbers_of(&lse));
    }
    results
}

#[test]
fn unseen_tokens_change_nothing() {
    for (name, configure, dtype) in stores() {
        for case in cases() {
            let clean = case.numbers(TOKENS, 7);
            for (poison, position, block_size) in POISONS {
                let before = run(&case, &configure, dtype, block_size, &clean);
                let places = if case.shape.values_in_keys { &["keys"][..] } else { &["keys", "values"] };
                for &place in places {
                    let mut poisoned = clean.clone();
                    let numbers = if place == "keys" { &mut poisoned.k } else { &mut poisoned.v };
                    let width = numbers.len() / TOKENS;
                    // In the first and in the last head: two such numbers in one would cancel each other out.
                    numbers[position * width + 1] = poison;
                    if case.shape.kv_heads > 1 {
                        numbers[(position + 1) * width - 1] = poison;
                    }
                    let after = run(&case, &configure, dtype, block_size, &poisoned);
                    let context = format!("{}: {name}, {poison:e} in the {place} of {position}", case.name);
                    for rows in STEPS {
                        let expected = case.dense(&poisoned, dtype, rows.clone(), rows.end);
                        for row in rows.clone() {
                            let sees = position < rows.end && case.sees(position, row);
                            let reference = if sees { Err((&expected, row - rows.start)) } else { Ok(&before) };
                            check(&case, dtype, row, &after, reference, &context);
                        }
                    }
                }
            }
        }
    }
}

/// Checks one row against the same row of the clean results, or against a row of dense attention.
fn check(
    case: &Case,
    dtype: KvDtype,
    row: usize,
    after: &Results<f32>,
    reference: Result<&Results<f32>, (&Results<f64>, usize)>,
    context: &str,
) {
    let (heads, dims) = (case.heads, case.shape.value_dim);
    for at in row * heads..(row + 1) * heads {
        let (out, lse) = (&after.out[at * dims..][..dims], after.lse[at]);
        match reference {
            Ok(before) => {
                assert_eq!(out, &before.out[at * dims..][..dims], "{context}: row {row}");
                assert_eq!(lse, before.lse[at], "{context}: row {row}");
            }
            Err((expected, expected_row)) => {
                let at = expected_row * heads + at % heads;
                let lse_agrees = agrees(&[lse], &expected.lse[at..=at], bound(dtype))
                    || (f64::from(lse) - expected.lse[at]).abs() <= rounded_scores(dtype);
                let agree = agrees(out, &expected.out[at * dims..][..dims], bound(dtype)) && lse_agrees;
                assert!(agree, "{context}: row {row}, {out:?}, {lse} for {}", expected.lse[at]);
            }
        }
    }
}

/// With 8-bit storage, by how much a score changes because a query is rounded to 13 bits, if a key has the largest
/// poison.
fn rounded_scores(dtype: KvDtype) -> f64 {
    if dtype == KvDtype::Int8 { 0.3 * 3e38 / 4095.0 } else { 0.0 }
}
