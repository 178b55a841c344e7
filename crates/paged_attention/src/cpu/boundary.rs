//! From candle's tensors to slices and back.
//!
//! candle keeps one lock per storage, and its read guards are not recursive: none is taken twice at a time, two are taken in
//! the order of their storages' addresses, and no tensor operation happens while one is held.

use std::cmp::Ordering;

use block_pool::{KvLayout, Order};
use candle_core::{CpuStorage, DType, InplaceOp3, Layout, Result, Storage, Tensor, WithDType};
use half::{bf16, f16};

use super::format::{Float, Format, Int8, Number};
use super::jobs::Job;
use super::{Call, crew};
use crate::plan::Plan;

/// Writes k and v `(tokens, kv_heads, head_dim)` into the slots of the plan, in place: one pass, converting, under one lock.
pub(crate) fn write(layer: &Tensor, k: &Tensor, v: &Tensor, layout: &KvLayout, plan: &Plan) -> Result<()> {
    layer.inplace_op3(&k.contiguous()?, &v.contiguous()?, &WriteSlots { layout, plan })
}

struct WriteSlots<'a> {
    layout: &'a KvLayout,
    plan: &'a Plan,
}

impl InplaceOp3 for WriteSlots<'_> {
    fn name(&self) -> &'static str {
        "write-slots"
    }

    fn cpu_fwd(
        &self,
        layer: &mut CpuStorage,
        layer_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let (k_start, v_start) = (k_layout.start_offset(), v_layout.start_offset());
        match (k, v) {
            (CpuStorage::F32(k), CpuStorage::F32(v)) => self.to(layer, layer_layout, &k[k_start..], &v[v_start..]),
            (CpuStorage::F16(k), CpuStorage::F16(v)) => self.to(layer, layer_layout, &k[k_start..], &v[v_start..]),
            (CpuStorage::BF16(k), CpuStorage::BF16(v)) => self.to(layer, layer_layout, &k[k_start..], &v[v_start..]),
            _ => unsupported(),
        }
    }
}

impl WriteSlots<'_> {
    fn to<S: Number>(&self, layer: &mut CpuStorage, layout: &Layout, k: &[S], v: &[S]) -> Result<()> {
        let start = layout.start_offset();
        match layer {
            CpuStorage::F32(layer) => self.slots::<Float<f32>, S>(&mut layer[start..], k, v),
            CpuStorage::F16(layer) => self.slots::<Float<f16>, S>(&mut layer[start..], k, v),
            CpuStorage::BF16(layer) => self.slots::<Float<bf16>, S>(&mut layer[start..], k, v),
            CpuStorage::U8(layer) if self.layout.order == Order::Int8 => {
                self.slots::<Int8, S>(&mut layer[start..], k, v);
            }
            _ => return unsupported(),
        }
        Ok(())
    }

    fn slots<F: Format, S: Number>(&self, layer: &mut [F::Number], k: &[S], v: &[S]) {
        let Self { layout, plan } = *self;
        let KvLayout { block_size, kv_heads, head_dim, .. } = *layout;
        let width = kv_heads * head_dim;
        let block_elements = layout.block_elements();
        let mut wide = [vec![0f32; width], vec![0f32; width]];
        for ((&slot, k), v) in plan.slots.iter().zip(k.chunks_exact(width)).zip(v.chunks_exact(width)) {
            let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
            let block = &mut layer[block * block_elements..][..block_elements];
            let [wide_k, wide_v] = &mut wide;
            S::widen(k, wide_k);
            S::widen(v, wide_v);
            for (head, (k, v)) in wide_k.chunks_exact(head_dim).zip(wide_v.chunks_exact(head_dim)).enumerate() {
                F::store(layout, block, offset, head, k, v);
            }
        }
    }
}

/// Attends with q `(tokens, heads, head_dim)` to all tokens of each sequence; the result has q's shape and type.
pub(crate) fn attend(layer: &Tensor, q: &Tensor, call: &Call<'_>) -> Result<Tensor> {
    let q = &q.contiguous()?;
    match q.dtype() {
        DType::F32 => Tensor::from_vec(attend_as::<f32>(layer, q, call)?.0, q.shape(), q.device()),
        DType::F16 => Tensor::from_vec(attend_as::<f16>(layer, q, call)?.0, q.shape(), q.device()),
        DType::BF16 => Tensor::from_vec(attend_as::<bf16>(layer, q, call)?.0, q.shape(), q.device()),
        _ => unsupported(),
    }
}

/// Attends with q to the tokens of a plan, which may be a part of those that there are; returns as much, and the logarithm,
/// to base two, of the weight that each row and head has seen.
pub(crate) fn attend_part(layer: &Tensor, q: &Tensor, call: &Call<'_>) -> Result<(Vec<f32>, Vec<f32>)> {
    let q = &q.contiguous()?;
    match q.dtype() {
        DType::F32 => attend_as(layer, q, call),
        DType::F16 => attend_as(layer, &widened::<f16>(q)?, call),
        DType::BF16 => attend_as(layer, &widened::<bf16>(q)?, call),
        _ => unsupported(),
    }
}

/// Attends with contiguous queries of type S, and returns as much.
fn attend_as<S: Number + WithDType>(layer: &Tensor, q: &Tensor, call: &Call<'_>) -> Result<(Vec<S>, Vec<f32>)> {
    let mut out = vec![S::default(); q.elem_count()];
    let mut log_weights = vec![f32::NEG_INFINITY; q.elem_count() / call.layout.head_dim];
    let job = Job::new(call, &mut out, &mut log_weights);
    // The order in which the locks are taken is that of their addresses: q may be a view of another layer, whose queries are
    // a view of this one.
    let [of_q, of_layer] = [q, layer].map(|tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0).addr());
    let order = of_q.cmp(&of_layer);
    crew::together(job.threads(), || if job.is_taken_up() { Ok(()) } else { run(&job, layer, q, order) })?;
    Ok((out, log_weights))
}

/// Takes part in a job, and locks what it reads for as long: q before the layer, behind it, or, if it is a view of it, with it.
fn run<S: Number + WithDType>(job: &Job<'_, S>, layer: &Tensor, q: &Tensor, order: Ordering) -> Result<()> {
    let before = order.is_lt().then(|| q.storage_and_layout().0);
    let (guard, place) = layer.storage_and_layout();
    let behind = order.is_gt().then(|| q.storage_and_layout().0);
    let own = before.as_deref().or(behind.as_deref()).unwrap_or(&guard);
    let q = &slice(own)?[q.layout().start_offset()..][..q.elem_count()];
    let start = place.start_offset();
    match layer.dtype() {
        DType::F32 => job.run::<Float<f32>>(&slice(&guard)?[start..], q),
        DType::F16 => job.run::<Float<f16>>(&slice(&guard)?[start..], q),
        DType::BF16 => job.run::<Float<bf16>>(&slice(&guard)?[start..], q),
        DType::U8 => job.run::<Int8>(&slice(&guard)?[start..], q),
        _ => return unsupported(),
    }
    Ok(())
}

/// A contiguous tensor as f32. Conversions here are by slices: candle's are number by number.
fn widened<S: Number + WithDType>(q: &Tensor) -> Result<Tensor> {
    let mut to = vec![0f32; q.elem_count()];
    {
        let (guard, place) = q.storage_and_layout();
        S::widen(&slice::<S>(&guard)?[place.start_offset()..][..to.len()], &mut to);
    }
    Tensor::from_vec(to, q.shape(), q.device())
}

/// Numbers as a tensor of q's shape and type.
pub(crate) fn like(out: Vec<f32>, q: &Tensor) -> Result<Tensor> {
    match q.dtype() {
        DType::F16 => Tensor::from_vec(narrowed::<f16>(&out), q.shape(), q.device()),
        DType::BF16 => Tensor::from_vec(narrowed::<bf16>(&out), q.shape(), q.device()),
        _ => Tensor::from_vec(out, q.shape(), q.device()),
    }
}

fn narrowed<S: Number>(from: &[f32]) -> Vec<S> {
    let mut to = vec![S::default(); from.len()];
    S::narrow(from, &mut to);
    to
}

/// Copies the first `len` tokens of these blocks together: k and v, each `(len, kv_heads, head_dim)`, in the type in which
/// they are stored; f32 for bytes.
pub(crate) fn read(layer: &Tensor, layout: &KvLayout, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
    let shape = (len, layout.kv_heads, layout.head_dim);
    let [k, v] = {
        let (guard, place) = layer.storage_and_layout();
        let start = place.start_offset();
        match layer.dtype() {
            DType::F32 => read_slots::<Float<f32>>(&slice(&guard)?[start..], layout, blocks, len),
            DType::F16 => read_slots::<Float<f16>>(&slice(&guard)?[start..], layout, blocks, len),
            DType::BF16 => read_slots::<Float<bf16>>(&slice(&guard)?[start..], layout, blocks, len),
            DType::U8 => read_slots::<Int8>(&slice(&guard)?[start..], layout, blocks, len),
            _ => return unsupported(),
        }
    };
    let dtype = if layer.dtype() == DType::U8 { DType::F32 } else { layer.dtype() };
    let tensor = |numbers| Tensor::from_vec(numbers, shape, layer.device())?.to_dtype(dtype);
    Ok((tensor(k)?, tensor(v)?))
}

fn read_slots<F: Format>(layer: &[F::Number], layout: &KvLayout, blocks: &[u32], len: usize) -> [Vec<f32>; 2] {
    let KvLayout { block_size, kv_heads, head_dim, .. } = *layout;
    let [mut k, mut v] = [(); 2].map(|()| vec![0f32; len * kv_heads * head_dim]);
    let rows = k.chunks_exact_mut(head_dim).zip(v.chunks_exact_mut(head_dim));
    for (row, (k, v)) in rows.enumerate() {
        let (token, head) = (row / kv_heads, row % kv_heads);
        let block = &layer[blocks[token / block_size] as usize * layout.block_elements()..];
        F::load(layout, &block[..layout.block_elements()], token % block_size, head, k, v);
    }
    [k, v]
}

fn slice<T: WithDType>(storage: &Storage) -> Result<&[T]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice::<T>(),
        _ => candle_core::bail!("fused attention reads CPU tensors only"),
    }
}

fn unsupported<T>() -> Result<T> {
    candle_core::bail!("attention reads and stores f32, f16, bf16 and int8 only")
}
