//! Kernels of others over our blocks, and our kernels over tables of others.

use candle_core::{DType, Device, Tensor};
use paged_attention::{
    Backend, BlockTable, KvCache, KvDtype, KvLayer, KvShape, LayerGroup, Step, paged_attention,
    paged_attention_with_lse, reshape_and_cache,
};

use crate::case::{Case, Results, bound, cases, stores};
use crate::common::{Configure, Random, difference};
use crate::numbers_of;

/// What a foreign kernel is given.
struct Exported {
    k: Tensor,
    v: Tensor,
    block_tables: Vec<Vec<u32>>,
    /// The same tables, one after another.
    indices: Vec<u32>,
    indptr: Vec<u32>,
    last_page_len: Vec<u32>,
    context_lens: Vec<u32>,
    cu_query_lens: Vec<u32>,
}

impl Exported {
    fn of(cache: &KvCache, step: &Step<'_>) -> Self {
        let (k, v) = cache.nhd_views(0).unwrap();
        let metadata = step.metadata(0).unwrap();
        let numbers = |tensor: Tensor| tensor.to_vec1::<u32>().unwrap();
        Self {
            k,
            v,
            block_tables: metadata.block_tables().unwrap().to_vec2().unwrap(),
            indices: numbers(metadata.kv_indices().unwrap()),
            indptr: numbers(metadata.kv_indptr().unwrap()),
            last_page_len: numbers(metadata.kv_last_page_len().unwrap()),
            context_lens: numbers(metadata.context_lens().unwrap()),
            cu_query_lens: numbers(metadata.cu_query_lens().unwrap()),
        }
    }

    /// The number at these indices of a view, by its strides: what a kernel does with a pointer.
    fn at(view: &Tensor, all: &[f32], indices: [usize; 4]) -> f64 {
        let layout = view.layout();
        let offset: usize = layout.stride().iter().zip(indices).map(|(stride, index)| stride * index).sum();
        all[layout.start_offset() + offset].into()
    }

    /// Dense causal attention in f64 of the rows of all sequences.
    fn attend(&self, case: &Case, q: &[f32]) -> Vec<f64> {
        let KvShape { kv_heads, head_dim, value_dim, .. } = case.shape;
        let (storage, _) = self.k.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else { panic!("not on a CPU") };
        let all = storage.as_slice::<f32>().unwrap();
        let block_size = self.k.dims()[1];
        let mut out = Vec::new();
        for (sequence, rows) in self.cu_query_lens.windows(2).enumerate() {
            let context = self.context_lens[sequence] as usize;
            let pages = &self.indices[self.indptr[sequence] as usize..self.indptr[sequence + 1] as usize];
            assert_eq!(&self.block_tables[sequence][..pages.len()], pages);
            assert!(self.block_tables[sequence][pages.len()..].iter().all(|block| *block == 0));
            assert_eq!((pages.len() - 1) * block_size + self.last_page_len[sequence] as usize, context);
            for row in rows[0]..rows[1] {
                let seen = context - (rows[1] - 1 - row) as usize;
                for head in 0..case.heads {
                    let key_head = head / (case.heads / kv_heads);
                    let slot = |at: usize| (pages[at / block_size] as usize, at % block_size);
                    let q = &q[(row as usize * case.heads + head) * head_dim..][..head_dim];
                    let score = |at: usize| {
                        let (block, offset) = slot(at);
                        let product = |(dim, q): (usize, &f32)| {
                            f64::from(*q) * Self::at(&self.k, all, [block, offset, key_head, dim])
                        };
                        (0.3f32 as f64) * q.iter().enumerate().map(product).sum::<f64>()
                    };
                    let weights: Vec<f64> = (0..seen).map(|at| score(at).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for dim in 0..value_dim {
                        let value = |at: usize| {
                            let (block, offset) = slot(at);
                            Self::at(&self.v, all, [block, offset, key_head, dim])
                        };
                        out.push(
                            weights.iter().enumerate().map(|(at, weight)| weight * value(at)).sum::<f64>() / total,
                        );
                    }
                }
            }
        }
        out
    }
}

/// Computes some steps of three sequences, and calls `check` with each step, its queries and its result.
fn steps(case: &Case, cache: &KvCache, mut check: impl FnMut(&Step<'_>, &Tensor, &Tensor, Option<&Tensor>, &Tensor)) {
    let mut random = Random::new(9);
    let mut tables: Vec<BlockTable> = (0..3).map(|_| cache.table()).collect();
    for new in [[20, 1, 7], [1, 40, 1], [1, 1, 33], [1, 1, 1]] {
        let mut step = cache.step();
        for (i, (table, n)) in tables.iter_mut().zip(new).enumerate() {
            step.push(table, &vec![i as u32; n]).unwrap();
        }
        let KvShape { kv_heads, head_dim, value_dim, values_in_keys, .. } = case.shape;
        let mut rows = |heads: usize, dims: usize| {
            crate::common::tensor(&random.numbers(step.tokens() * heads * dims), heads, dims, DType::F32)
        };
        let (q, k, v) = (rows(case.heads, head_dim), rows(kv_heads, head_dim), rows(kv_heads, value_dim));
        let v = (!values_in_keys).then_some(v);
        let y = step.attend(0, &q, &k, v.as_ref(), &case.attention()).unwrap();
        check(&step, &q, &k, v.as_ref(), &y);
        step.commit().unwrap();
    }
}

/// The exported views and metadata are all that a kernel needs.
#[test]
fn a_foreign_kernel_computes_the_same_from_exported_tensors() {
    let gather: Configure = Box::new(|builder| builder.backend(Backend::Gather));
    let plain = ["plain", "smaller values", "larger values", "odd values", "latent", "small odd latent"];
    for case in cases().into_iter().filter(|case| plain.contains(&case.name)) {
        for block_size in [1, 16, 32] {
            let cache = case.cache(&gather, KvDtype::F32, block_size, 400);
            steps(&case, &cache, |step, q, _, _, y| {
                let expected = Exported::of(&cache, step).attend(&case, &numbers_of(q));
                let worst = difference(&numbers_of(y), &expected);
                assert!(worst < 1e-5, "{}, blocks of {block_size}: {worst:e}", case.name);
            });
        }
    }
}

#[test]
fn views_exist_in_the_order_nhd_only() {
    let case = cases().swap_remove(0);
    let fused: Configure = Box::new(|builder| builder.backend(Backend::Fused));
    let error = case.cache(&fused, KvDtype::F32, 16, 16).nhd_views(0).unwrap_err().to_string();
    assert!(error.contains("Panels"), "{error}");
    let gather: Configure = Box::new(|builder| builder.backend(Backend::Gather));
    let cache = case.cache(&gather, KvDtype::F32, 16, 16);
    assert!(cache.nhd_views(1).is_err());
    let (k, v) = cache.nhd_views(0).unwrap();
    assert_eq!((k.dims(), v.dims()), (&[5, 16, 2, 32][..], &[5, 16, 2, 32][..]));
    // FlashInfer's and vLLM's order: all keys of a block, then all its values.
    assert_eq!((k.stride(), v.layout().start_offset() - k.layout().start_offset()), (&[2048, 64, 32, 1][..], 1024));
}

/// In a group with a window, the places of blocks that it has passed are there, and hold 0.
#[test]
fn tables_of_a_window_keep_their_positions() {
    let case = Case { window: Some(paged_attention::Window::new(5)), ..cases().swap_remove(0) };
    let gather: Configure = Box::new(|builder| builder.backend(Backend::Gather));
    let cache = case.cache(&gather, KvDtype::F32, 4, 40);
    let mut table = cache.table();
    let append = |table: &mut BlockTable, n: usize| {
        let mut step = cache.step();
        step.push(table, &vec![0; n]).unwrap();
        let metadata = step.metadata(0).unwrap();
        let tables = metadata.block_tables().unwrap().to_vec2::<u32>().unwrap().swap_remove(0);
        let slots = metadata.slot_mapping().unwrap().to_vec1::<i64>().unwrap();
        assert_eq!((metadata.max_context_len(), metadata.max_query_len()), (tables_len(&metadata), n));
        step.leave_unwritten([0]).unwrap();
        step.commit().unwrap();
        (tables, slots)
    };
    append(&mut table, 18);
    let (tables, slots) = append(&mut table, 1);
    assert_eq!(tables.len(), 5);
    let held: Vec<u32> = table.blocks_of_group(0).iter().map(|block| block.index() as u32).collect();
    assert_eq!(tables[..3], [0, 0, 0]);
    assert_eq!(tables[3..], held[held.len() - 2..]);
    assert_eq!(slots, [i64::from(tables[4]) * 4 + 2]);
}

/// Layers of several groups: latents, layers with a window and values of another dimension, and a model layer that
/// reads the first of them.
#[test]
fn groups_have_metadata_and_values_of_their_own() {
    for (name, configure, dtype) in stores() {
        let of = |case: &str| cases().into_iter().find(|of| of.name == case).unwrap();
        let latent = of("latent");
        let windowed = Case { window: Some(paged_attention::Window::new(20)), ..of("smaller values") };
        let groups = [
            LayerGroup::new([1], 1, 80).values_in_keys(64),
            LayerGroup::new([0], 2, 32).value_dim(16).window(paged_attention::Window::new(20)),
        ];
        let cache =
            configure(KvCache::builder_of(groups).blocks(40).block_size(4).dtype(dtype).poison(true)).build().unwrap();
        let numbers = [windowed.numbers(60, 1), latent.numbers(60, 2)];
        let mut table = cache.table();
        for rows in [0..50, 50..51, 51..60] {
            let mut step = cache.step();
            step.push(&mut table, &numbers[0].ids(&rows)).unwrap();
            for (layer, case) in [&windowed, &latent].into_iter().enumerate() {
                let (q, k, v) = case.tensors(&numbers[layer], &rows);
                let y = step.attend(layer, &q, &k, v.as_ref(), &case.attention()).unwrap();
                let expected = case.dense(&numbers[layer], dtype, rows.clone(), rows.end).out;
                assert!(difference(&numbers_of(&y), &expected) < bound(dtype), "{name}, layer {layer}");
                let again = step.attend_cached(layer, &q, &case.attention()).unwrap();
                assert_eq!(numbers_of(&again), numbers_of(&y), "{name}, layer {layer}");
            }
            let tables = |layer| step.metadata(layer).unwrap().block_tables().unwrap().to_vec2::<u32>().unwrap();
            let [windowed, full] = [tables(0), tables(1)];
            let freed = rows.start.saturating_sub(19) / 4;
            assert_eq!((windowed[0].len(), full[0].len()), (rows.end.div_ceil(4), rows.end.div_ceil(4)));
            assert!(windowed[0][..freed].iter().all(|block| *block == 0), "{windowed:?}");
            assert!(step.metadata(2).is_err());
            step.commit().unwrap();
        }
    }
}

fn tables_len(metadata: &paged_attention::StepMetadata<'_>) -> usize {
    metadata.cu_context_lens().unwrap().to_vec1::<u32>().unwrap()[1] as usize
}

/// Over the blocks of a cache, and over blocks that no pool manages: to the last bit what a step computes.
#[test]
fn paged_attention_over_foreign_tables_equals_a_step() {
    for (name, configure, dtype) in stores() {
        let foreign = |case: &Case| case.window.is_none() && case.chunks.is_none() && case.images.is_empty();
        for case in cases().into_iter().filter(foreign) {
            for block_size in [1, 7, 16] {
                let cache = case.cache(&configure, dtype, block_size, 400);
                let (ours, attention) = (cache.kv_layer(0).unwrap(), case.attention());
                // Blocks of another cache, which its pool knows nothing about, at other places.
                let other = case.cache(&configure, dtype, block_size, 500);
                let theirs = other.kv_layer(0).unwrap();
                let shift = (theirs.blocks() - ours.blocks()) as i64;
                steps(&case, &cache, |step, q, k, v, y| {
                    let metadata = step.metadata(0).unwrap();
                    let (tables, slots) = (metadata.block_tables().unwrap(), metadata.slot_mapping().unwrap());
                    let contexts = metadata.context_lens().unwrap();
                    let queries = metadata.query_lens().unwrap();
                    let (out, lse) = step.attend_cached_with_lse(0, q, &attention).unwrap();
                    let expected = Results { out: numbers_of(&out), lse: numbers_of(&lse) };
                    assert_eq!(numbers_of(y), expected.out);
                    let got = paged_attention(q, &ours, &tables, &contexts, &queries, &attention).unwrap();
                    assert_eq!(numbers_of(&got), expected.out, "{}: {name}, blocks of {block_size}", case.name);

                    let add = |tensor: &Tensor, n: i64| (tensor.to_dtype(DType::I64).unwrap() + n as f64).unwrap();
                    reshape_and_cache(k, v, &theirs, &add(&slots, shift * block_size as i64)).unwrap();
                    let tables = add(&tables, shift);
                    let (out, lse) =
                        paged_attention_with_lse(q, &theirs, &tables, &contexts, &queries, &attention).unwrap();
                    let got = Results { out: numbers_of(&out), lse: numbers_of(&lse) };
                    assert_eq!(got, expected, "{}: {name}, blocks of {block_size}", case.name);
                });
            }
        }
    }
}

/// Negative slots are padding, as in vLLM; a sequence without queries is not computed.
#[test]
fn padding_is_left_out() {
    let device = &Device::Cpu;
    let rows = |n: usize, seed| crate::common::tensor(&Random::new(seed).numbers(n * 2 * 8), 2, 8, DType::F32);
    let kv = || KvLayer::zeros(KvShape::new(1, 2, 8), 4, 4, KvDtype::F32, device).unwrap().swap_remove(0);
    let attention = paged_attention::Attention::scaled_by(8);
    let (padded, plain) = (kv(), kv());
    let (k, q) = (rows(6, 1), rows(3, 2));
    reshape_and_cache(&k, &k, &padded, &Tensor::new(&[-1i64, 8, 9, -1, 10, 0], device).unwrap()).unwrap();
    let some = k.index_select(&Tensor::new(&[1u32, 2, 4, 5], device).unwrap(), 0).unwrap();
    reshape_and_cache(&some, &some, &plain, &Tensor::new(&[8u32, 9, 10, 0], device).unwrap()).unwrap();
    let numbers = |layer: &KvLayer| numbers_of(layer.tensor());
    assert_eq!(numbers(&padded), numbers(&plain));
    reshape_and_cache(&k, &k, &padded, &Tensor::new(&[-1i64; 6], device).unwrap()).unwrap();
    assert_eq!(numbers(&padded), numbers(&plain));

    let call = |tables: &[[i64; 2]], contexts: &[u32], queries: &[u32]| {
        let tables = Tensor::from_slice(tables.as_flattened(), (tables.len(), 2), device).unwrap();
        let [contexts, queries] = [contexts, queries].map(|lens| Tensor::new(lens, device).unwrap());
        numbers_of(&paged_attention(&q, &padded, &tables, &contexts, &queries, &attention).unwrap())
    };
    let alone = call(&[[2, -1], [0, -1]], &[3, 1], &[2, 1]);
    assert_eq!(call(&[[2, -1], [-1, -1], [3, 1], [0, -1]], &[3, 0, 7, 1], &[2, 0, 0, 1]), alone);
}
