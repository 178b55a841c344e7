//! A commit succeeds only if every layer has been written or was declared to stay unwritten.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::backends;
use paged_attention::{Attention, BlockTable, CommitError, KvCache, KvShape, Step};

const SHAPE: KvShape = KvShape::new(3, 1, 4);

fn cache(layers: usize) -> KvCache {
    KvCache::builder(KvShape::new(layers, SHAPE.kv_heads, SHAPE.head_dim)).blocks(16).block_size(4).build().unwrap()
}

fn prompt() -> Vec<u32> {
    (1..=32).collect()
}

fn rows(tokens: usize) -> Tensor {
    Tensor::ones((tokens, 1, 4), DType::F32, &Device::Cpu).unwrap()
}

fn write(step: &Step<'_>, layer: usize) {
    let x = rows(step.tokens());
    step.write(layer, &x, &x).unwrap();
}

fn unwritten(layer: usize) -> Result<(), CommitError> {
    Err(CommitError::Unwritten { layer, layers: SHAPE.layers })
}

/// Asserts that the commit of a step with `table` and a neighbour fails because `layer` was not written, after `with`
/// has written other layers. Both sequences are unchanged then, and their tokens cannot be matched.
fn refused(cache: &KvCache, table: &mut BlockTable, with: impl Fn(&Step<'_>), layer: usize) {
    let free = cache.pool().available();
    let mut neighbour = cache.table();
    let mut step = cache.step();
    step.push(table, &prompt()).unwrap();
    step.push(&mut neighbour, &[9, 9, 9, 9, 9]).unwrap();
    with(&step);
    assert_eq!(step.commit(), unwritten(layer));
    assert_eq!((table.len(), neighbour.len(), cache.pool().available()), (0, 0, free));
    assert_eq!((cache.table().match_prefix(&prompt()), cache.table().match_prefix(&[9, 9, 9, 9, 9])), (0, 0));
    cache.pool().check_ref_counts([table.blocks(), neighbour.blocks()]).unwrap();
}

#[test]
fn tokens_that_no_layer_has_are_not_matched() {
    let cache = cache(SHAPE.layers);
    let mut table = cache.table();
    refused(&cache, &mut table, |_| {}, 0);
    let error = unwritten(0).unwrap_err();
    assert_eq!(error.to_string(), "layer 0 was not written in this step: the cache has 3 layers");
}

#[test]
fn tokens_that_one_layer_lacks_are_not_matched() {
    let cache = cache(SHAPE.layers);
    let mut table = cache.table();
    for missing in 0..SHAPE.layers {
        // The layers are written in reverse order. The error names the first one that is missing.
        let others = |step: &Step<'_>| (0..SHAPE.layers).rev().filter(|&l| l != missing).for_each(|l| write(step, l));
        refused(&cache, &mut table, others, missing);
    }
    refused(&cache, &mut table, |step| write(step, 0), 1);
    // The same sequence, in a step that writes all layers.
    let mut step = cache.step();
    step.push(&mut table, &prompt()).unwrap();
    (0..SHAPE.layers).for_each(|layer| write(&step, layer));
    step.commit().unwrap();
    assert_eq!((table.len(), cache.table().match_prefix(&prompt())), (32, 31));
}

#[test]
fn a_layer_whose_write_failed_is_not_written() {
    for (name, configure) in backends() {
        let cache = configure(KvCache::builder(SHAPE).blocks(16).block_size(4)).build().unwrap();
        let mut table = cache.table();
        let failing = |step: &Step<'_>| {
            write(step, 0);
            write(step, 2);
            let (x, short) = (rows(step.tokens()), rows(1));
            let attention = Attention::new(1.0);
            assert!(step.write(1, &x, &short).is_err(), "{name}");
            assert!(step.write(3, &x, &x).is_err(), "{name}: there is no such layer");
            assert!(step.attend(1, &short, &x, &x, &attention).is_err(), "{name}: q is wrong, k and v are not");
            assert!(step.attend(1, &x, &x, &x, &attention.clone().soft_cap(-1.0)).is_err(), "{name}");
        };
        refused(&cache, &mut table, failing, 1);
        // A write with invalid arguments changes nothing: the layer still counts as written.
        let mut step = cache.step();
        step.push(&mut table, &prompt()).unwrap();
        (0..SHAPE.layers).for_each(|layer| write(&step, layer));
        assert!(step.write(1, &rows(32), &rows(1)).is_err());
        assert_eq!(step.commit(), Ok(()), "{name}");
    }
}

#[test]
fn accepted_tokens_must_be_written_too() {
    let cache = cache(SHAPE.layers);
    let mut table = cache.table();
    for accepted in [32, 5, 0] {
        let mut step = cache.step();
        step.push(&mut table, &prompt()).unwrap();
        write(&step, 0);
        write(&step, 2);
        assert_eq!(step.commit_accepted(&[accepted]), unwritten(1));
        assert_eq!((table.len(), cache.pool().in_use(), cache.table().match_prefix(&prompt())), (0, 0, 0));
    }
    let mut step = cache.step();
    step.push(&mut table, &prompt()).unwrap();
    (0..SHAPE.layers).for_each(|layer| write(&step, layer));
    assert_eq!(step.commit_accepted(&[9]), Ok(()));
    assert_eq!((table.len(), cache.table().match_prefix(&prompt())), (9, 8));
}

#[test]
fn layers_can_be_declared_to_stay_unwritten() {
    let cache = cache(SHAPE.layers);
    let mut table = cache.table();
    refused(&cache, &mut table, |step| step.leave_unwritten([1, 2]).unwrap(), 0);
    let beyond = |step: &Step<'_>| {
        let error = step.leave_unwritten(0..9).unwrap_err().to_string();
        assert_eq!(error.lines().next(), Some("there is no layer 3: the cache has 3 layers"));
    };
    // None of the nine layers was declared.
    refused(&cache, &mut table, beyond, 0);
    refused(&cache, &mut table, |step| step.leave_unwritten([]).unwrap(), 0);

    let mut step = cache.step();
    step.leave_unwritten([1]).unwrap();
    step.push(&mut table, &prompt()).unwrap();
    write(&step, 0);
    step.leave_unwritten(1..SHAPE.layers).unwrap();
    step.commit().unwrap();
    assert_eq!((table.len(), cache.table().match_prefix(&prompt())), (32, 31));

    // A declaration holds for one step.
    let mut step = cache.step();
    step.push(&mut table, &[7]).unwrap();
    write(&step, 0);
    assert_eq!(step.commit(), unwritten(1));
    assert_eq!(table.len(), 32);
    // A declared layer may still be written.
    let mut step = cache.step();
    step.push(&mut table, &[7]).unwrap();
    step.leave_unwritten(0..3).unwrap();
    write(&step, 1);
    step.commit().unwrap();
    assert_eq!(table.len(), 33);
}

#[test]
fn a_step_without_sequences_has_nothing_to_write() {
    let cache = cache(SHAPE.layers);
    assert_eq!(cache.step().commit(), Ok(()));
    assert_eq!(cache.step().commit_accepted(&[]), Ok(()));
}

#[test]
fn more_layers_than_a_word_has_bits() {
    for layers in [63, 64, 65, 130] {
        let cache = cache(layers);
        for missing in [None, Some(0), Some(62), Some(layers - 1), Some(layers / 2)] {
            let mut table = cache.table();
            let mut step = cache.step();
            step.push(&mut table, &[1, 2]).unwrap();
            (0..layers).filter(|&layer| Some(layer) != missing).for_each(|layer| write(&step, layer));
            let expected = missing.map_or(Ok(()), |layer| Err(CommitError::Unwritten { layer, layers }));
            assert_eq!(step.commit(), expected);
        }
    }
}

#[test]
fn several_threads_may_write_layers_of_one_step() {
    let cache = cache(40);
    for _ in 0..50 {
        let mut table = cache.table();
        let mut step = cache.step();
        step.push(&mut table, &[1, 2, 3]).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let step = &step;
                scope.spawn(move || (thread..40).step_by(4).for_each(|layer| write(step, layer)));
            }
        });
        step.commit().unwrap();
    }
}
