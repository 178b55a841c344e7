//! Arguments that do not fit are errors, and nothing has changed after one.

use candle_core::{DType, Device, Result, Tensor};
use paged_attention::{
    AttendError, Attention, CacheError, KvCache, KvDtype, KvLayer, KvShape, LayerGroup, PoolError, PushError,
    PushOptions, Window, find_error, paged_attention, reshape_and_cache,
};

fn zeros(rows: usize, heads: usize, dims: usize) -> Tensor {
    Tensor::zeros((rows, heads, dims), DType::F32, &Device::Cpu).unwrap()
}

fn refused<T>(result: Result<T>) -> AttendError {
    match result {
        Err(error) => find_error::<AttendError>(&error).unwrap_or_else(|| panic!("{error}")).clone(),
        Ok(_) => panic!("was accepted"),
    }
}

#[test]
fn values_that_do_not_fit_the_layer() {
    let attention = Attention::new(1.0);
    let cache = |shape| KvCache::builder(shape).blocks(4).build().unwrap();
    let latent = cache(KvShape::new(1, 1, 24).values_in_keys(16));
    let own = cache(KvShape::new(1, 1, 24).value_dim(16));
    for (cache, v, expected) in [
        (&latent, Some(zeros(2, 1, 16)), "the values of this layer are in its keys: pass no v"),
        (&own, None, "this layer has values of its own: v is missing"),
        (&own, Some(zeros(2, 1, 24)), "v has shape [2, 1, 24], expected (2 tokens, 1 kv_heads, 16 value_dim)"),
    ] {
        let mut table = cache.table();
        let mut step = cache.step();
        step.push(&mut table, &[1, 2]).unwrap();
        let error = refused(step.attend(0, &zeros(2, 3, 24), &zeros(2, 1, 24), v.as_ref(), &attention));
        assert_eq!(error.to_string(), expected);
        assert_eq!(refused(step.write(0, &zeros(2, 1, 24), v.as_ref())).to_string(), expected);
        assert!(step.commit().is_err(), "nothing was written");
    }
}

#[test]
fn shapes_that_cannot_be() {
    let build = |shape| KvCache::builder(shape).blocks(4).build().unwrap_err().to_string();
    let beyond = build(KvShape::new(1, 1, 24).values_in_keys(25));
    assert_eq!(beyond, "values of 25 dimensions cannot be in keys of 24");
    assert!(build(KvShape::new(1, 1, 24).value_dim(0)).contains("values of 0 dimensions"));
    let memory = KvCache::builder(KvShape::new(1, 1, 24).value_dim(0)).memory(1000).build();
    assert!(matches!(memory, Err(CacheError::Pool(PoolError::EmptyShape { value_dim: 0, .. }))));
    let layers = |shape, dtype| KvLayer::zeros(shape, 4, 16, dtype, &Device::Cpu);
    assert!(matches!(layers(KvShape::new(1, 0, 8), KvDtype::F32), Err(CacheError::Pool(_))));
    let wide = layers(KvShape::new(1, 1, 2049), KvDtype::Int8);
    assert!(matches!(wide, Err(CacheError::TooManyDimensions { head_dim: 2049, .. })));
    assert!(layers(KvShape::new(1, 1, 2048).value_dim(4096), KvDtype::Int8).is_ok());
}

#[test]
fn sink_logits_that_do_not_fit() {
    let cache = KvCache::builder(KvShape::new(1, 1, 8)).blocks(4).build().unwrap();
    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &[1]).unwrap();
    let attend = |logits: &[f32]| {
        step.attend(0, &zeros(1, 2, 8), &zeros(1, 1, 8), &zeros(1, 1, 8), &Attention::new(1.0).sink_logits(logits))
    };
    assert_eq!(refused(attend(&[1.0])), AttendError::SinkLogits { logits: 1, heads: 2 });
    assert_eq!(refused(attend(&[1.0, f32::INFINITY])), AttendError::SinkLogit(f32::INFINITY));
    assert!(matches!(refused(attend(&[f32::NAN, 1.0])), AttendError::SinkLogit(logit) if logit.is_nan()));
    assert!(attend(&[f32::NEG_INFINITY, 1.0]).is_ok());
}

#[test]
fn ranges_that_see_each_other() {
    let cache = KvCache::builder(KvShape::new(1, 1, 8)).blocks(1).build().unwrap();
    let all: [&[(usize, usize)]; 6] =
        [&[(3, 3)], &[(3, 6)], &[(0, 2), (1, 3)], &[(2, 4), (0, 3)], &[(0, 1), (0, 1)], &[(usize::MAX, 0)]];
    for ranges in all {
        let mut table = cache.table();
        let mut step = cache.step();
        let add = |options: PushOptions, &(start, end): &_| options.bidirectional(start..end);
        let options = ranges.iter().fold(PushOptions::default(), add);
        let error = step.push_with(&mut table, &[1; 5], &options).unwrap_err();
        assert!(matches!(error, PushError::Bidirectional { tokens: 5, .. }), "{ranges:?}: {error}");
        assert_eq!((step.sequences(), cache.pool().in_use()), (0, 0));
    }
    let mut table = cache.table();
    let mut step = cache.step();
    step.push_with(&mut table, &[1; 5], &PushOptions::default().bidirectional(3..5).bidirectional(0..3)).unwrap();
}

#[test]
fn a_layer_must_be_written_before_it_is_read() {
    let cache = KvCache::builder(KvShape::new(3, 1, 8)).blocks(4).build().unwrap();
    let mut table = cache.table();
    let attention = Attention::new(1.0);
    for written_before in [false, true] {
        let mut step = cache.step();
        step.push(&mut table, &[1]).unwrap();
        let (q, k) = (zeros(1, 2, 8), zeros(1, 1, 8));
        assert_eq!(refused(step.attend_cached(0, &q, &attention)), AttendError::NotWritten { layer: 0 });
        step.write(0, &k, &k).unwrap();
        assert_eq!(step.attend_cached(0, &q, &attention).unwrap().dims(), [1, 2, 8], "{written_before}");
        step.leave_unwritten([1]).unwrap();
        assert_eq!(refused(step.attend_cached(1, &q, &attention)), AttendError::NotWritten { layer: 1 });
        assert!(matches!(refused(step.attend_cached(3, &q, &attention)), AttendError::NoLayer { layer: 3, .. }));
        assert!(matches!(refused(step.attend_cached(0, &zeros(2, 2, 8), &attention)), AttendError::Shape { .. }));
        step.write(2, &k, &k).unwrap();
        step.commit().unwrap();
    }
}

#[test]
fn tables_of_others_that_do_not_fit() {
    let device = &Device::Cpu;
    let kv = KvLayer::zeros(KvShape::new(1, 1, 8), 4, 16, KvDtype::F32, device).unwrap().swap_remove(0);
    let tensor = |numbers: &[i64], shape: &[usize]| Tensor::from_slice(numbers, shape, device).unwrap();
    let call = |tables: &Tensor, contexts: &[i64], queries: &[i64]| {
        let lens = |lens: &[i64]| tensor(lens, &[lens.len()]);
        paged_attention(&zeros(3, 2, 8), &kv, tables, &lens(contexts), &lens(queries), &Attention::new(1.0))
    };
    let tables = tensor(&[0, 1, 3, -1], &[2, 2]);
    assert!(call(&tables, &[20, 5], &[2, 1]).is_ok());
    for (tables, contexts, queries, expected) in [
        (&tables, &[20, 17][..], &[2, 1][..], "sequence 1 has block -1, but the layer has 4 blocks"),
        (&tensor(&[0, 4, 3, 0], &[2, 2]), &[20, 5], &[2, 1], "sequence 0 has block 4, but the layer has 4 blocks"),
        (
            &tables,
            &[33, 5],
            &[2, 1],
            "sequence 0 has a context of 33 tokens, but its table has room for 2 blocks of 16",
        ),
        (&tables, &[20, 1], &[1, 2], "sequence 1 has 2 queries, but a context of 1 tokens"),
        (&tables, &[20, 5], &[1, 1], "the sequences have 2 queries, but q has 3 rows"),
        (&tables, &[20, 5], &[-1, 4], "sequence 0 has a context of 20 and -1 queries"),
        (&tables, &[i64::MIN, 5], &[2, 1], "sequence 0 has a context of -9223372036854775808 and 2 queries"),
        (
            &tables,
            &[i64::MAX, 5],
            &[2, 1],
            "sequence 0 has a context of 9223372036854775807 tokens, but its table has room for \
                                            2 blocks of 16",
        ),
        (&tables, &[20], &[3], "block_tables has shape [2, 2], expected [1, 2]"),
        (&tables, &[20, 5], &[3], "query_lens has shape [1], expected [2]"),
        (&tensor(&[0, 1], &[2]), &[20, 5], &[2, 1], "block_tables has shape [2], expected [2, 0]"),
    ] {
        assert_eq!(refused(call(tables, contexts, queries)).to_string(), expected);
    }
    let floats = tables.to_dtype(DType::F32).unwrap();
    let error = refused(call(&floats, &[20, 5], &[2, 1]));
    assert_eq!(error.to_string(), "block_tables is f32, expected u32, i32 or i64");

    let write = |k: Tensor, v: Option<Tensor>, slots: &[i64]| {
        reshape_and_cache(&k, v.as_ref(), &kv, &tensor(slots, &[slots.len()]))
    };
    let one = || Some(zeros(1, 1, 8));
    assert!(write(zeros(1, 1, 8), one(), &[63]).is_ok());
    for (result, expected) in [
        (write(zeros(1, 1, 8), one(), &[64]), "slot_mapping has slot 64, but the layer has 64 slots"),
        (write(zeros(1, 1, 8), one(), &[1, 2]), "slot_mapping has shape [2], expected [1]"),
        (write(zeros(1, 1, 8), None, &[1]), "this layer has values of its own: v is missing"),
        (write(zeros(1, 1, 7), one(), &[1]), "k has shape [1, 1, 7], expected (1 tokens, 1 kv_heads, 8 head_dim)"),
        (write(zeros(0, 1, 8), Some(zeros(0, 1, 8)), &[]), "no rows were given: there is no new token to compute"),
    ] {
        assert_eq!(refused(result).to_string(), expected);
    }
}

#[test]
fn cross_attention_that_does_not_fit() {
    let [cache, other] = [(); 2].map(|()| KvCache::builder(KvShape::new(1, 1, 8)).blocks(4).build().unwrap());
    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &[1, 2]).unwrap();
    step.write(0, &zeros(2, 1, 8), &zeros(2, 1, 8)).unwrap();
    step.commit().unwrap();
    let foreign = other.table();
    let cross = Attention::new(1.0).causal(false);
    let call = |sequences: &[_], rows, attention: &Attention| {
        refused(cache.attend_cached(0, sequences, &zeros(rows, 2, 8), attention)).to_string()
    };
    assert_eq!(call(&[(&table, 1)], 2, &cross), "the sequences have 1 rows, but q has 2");
    assert_eq!(call(&[], 2, &cross), "the sequences have 0 rows, but q has 2");
    assert_eq!(call(&[(&table, 3)], 3, &Attention::new(1.0)), "sequence 0 has 3 rows, but only 2 tokens");
    assert_eq!(call(&[(&foreign, 1)], 1, &cross), "the table belongs to another pool");
    assert!(cache.attend_cached(0, &[(&table, 3)], &zeros(3, 2, 8), &cross).is_ok());
    assert!(cache.attend_cached(1, &[(&table, 3)], &zeros(3, 2, 8), &cross).is_err());
}

/// A window frees what it has passed; a row that would see it is refused, one that does not is computed.
#[test]
fn cross_attention_to_what_a_window_has_freed() {
    let group = LayerGroup::new([0], 1, 8).window(Window::new(5));
    let cache = KvCache::builder_of([group]).blocks(8).block_size(4).build().unwrap();
    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &[1; 19]).unwrap();
    step.write(0, &zeros(19, 1, 8), &zeros(19, 1, 8)).unwrap();
    step.commit().unwrap();
    assert_eq!(table.freed_blocks_of_group(0), 0..3);
    let call =
        |rows: usize, attention: &Attention| cache.attend_cached(0, &[(&table, rows)], &zeros(rows, 2, 8), attention);
    // The fourth row from the end is at position 15 and sees 11..=15, which begins in a freed block.
    assert!(call(3, &Attention::new(1.0)).is_ok());
    let error = refused(call(4, &Attention::new(1.0))).to_string();
    assert_eq!(error, "sequence 0 sees position 11, which its window has freed");
    assert!(call(4, &Attention::new(1.0).window(Window::new(4))).is_ok());
}

#[test]
fn states_that_do_not_fit() {
    let state = |rows, dims, heads| (zeros(rows, 2, dims), zeros(1, rows, heads).squeeze(0).unwrap());
    assert!(paged_attention::merge_states(&[]).is_err());
    assert!(paged_attention::merge_states(&[state(3, 8, 2), state(3, 8, 2)]).is_ok());
    for other in [state(2, 8, 2), state(3, 7, 2), state(3, 8, 1)] {
        let error = refused(paged_attention::merge_states(&[state(3, 8, 2), other]));
        assert!(matches!(error, AttendError::Shape { .. }));
    }
}
