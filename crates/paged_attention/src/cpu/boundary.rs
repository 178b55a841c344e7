//! Converts candle's tensors to slices and back.
//!
//! candle keeps one lock per storage, and its read locks are not recursive. So a thread never locks a storage that it
//! has already locked, it locks two storages in the order of their addresses, and it runs no tensor operation while it
//! holds a lock.

use std::cmp::Ordering;

use block_pool::{KvLayout, Order};
use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result, Storage, Tensor, WithDType};
use half::{bf16, f16};

use super::format::{Float, Format, Int8, Number};
use super::jobs::Job;
use super::{Call, crew};
use crate::plan::Plan;

/// Writes k `(tokens, kv_heads, head_dim)` and v `(tokens, kv_heads, value_dim)` to the plan's slot mapping, in place:
/// converts them to the stored type in one pass, under one lock. There is no v if the values are in the keys.
pub(crate) fn write(layer: &Tensor, k: &Tensor, v: Option<&Tensor>, layout: &KvLayout, plan: &Plan) -> Result<()> {
    let write = WriteSlots { layout, plan };
    match v {
        Some(v) => layer.inplace_op3(&k.contiguous()?, &v.contiguous()?, &write),
        None => layer.inplace_op2(&k.contiguous()?, &write),
    }
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
            (CpuStorage::F32(k), CpuStorage::F32(v)) => self.put(layer, layer_layout, &k[k_start..], &v[v_start..]),
            (CpuStorage::F16(k), CpuStorage::F16(v)) => self.put(layer, layer_layout, &k[k_start..], &v[v_start..]),
            (CpuStorage::BF16(k), CpuStorage::BF16(v)) => self.put(layer, layer_layout, &k[k_start..], &v[v_start..]),
            _ => unsupported(),
        }
    }
}

impl InplaceOp2 for WriteSlots<'_> {
    fn name(&self) -> &'static str {
        "write-slots"
    }

    fn cpu_fwd(&self, layer: &mut CpuStorage, layer_layout: &Layout, k: &CpuStorage, k_layout: &Layout) -> Result<()> {
        let start = k_layout.start_offset();
        match k {
            CpuStorage::F32(k) => self.put(layer, layer_layout, &k[start..], &[]),
            CpuStorage::F16(k) => self.put(layer, layer_layout, &k[start..], &[]),
            CpuStorage::BF16(k) => self.put(layer, layer_layout, &k[start..], &[]),
            _ => unsupported(),
        }
    }
}

impl WriteSlots<'_> {
    /// `v` is empty if the values are in the keys.
    fn put<S: Number>(&self, layer: &mut CpuStorage, layout: &Layout, k: &[S], v: &[S]) -> Result<()> {
        let start = layout.start_offset();
        match layer {
            CpuStorage::F32(layer) => self.write_slots::<Float<f32>, S>(&mut layer[start..], k, v),
            CpuStorage::F16(layer) => self.write_slots::<Float<f16>, S>(&mut layer[start..], k, v),
            CpuStorage::BF16(layer) => self.write_slots::<Float<bf16>, S>(&mut layer[start..], k, v),
            CpuStorage::U8(layer) if self.layout.order == Order::QuadPanels => {
                self.write_slots::<Int8, S>(&mut layer[start..], k, v);
            }
            _ => return unsupported(),
        }
        Ok(())
    }

    fn write_slots<F: Format, S: Number>(&self, layer: &mut [F::Number], k: &[S], v: &[S]) {
        let Self { layout, plan } = *self;
        let KvLayout { block_size, kv_heads, head_dim, value_dim, values_in_keys, .. } = *layout;
        // A value that is in its key is not written: no dimensions of one head after another.
        let own_value_dim = if values_in_keys { 0 } else { value_dim };
        let (k_width, v_width) = (kv_heads * head_dim, kv_heads * own_value_dim);
        let block_elements = layout.block_elements();
        let (mut wide_k, mut wide_v) = (vec![0f32; k_width], vec![0f32; v_width]);
        let (mut k, mut v) = (k, v);
        for &slot in &plan.slot_mapping {
            let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
            let block = &mut layer[block * block_elements..][..block_elements];
            let (k_row, v_row);
            (k_row, k) = k.split_at(k_width);
            (v_row, v) = v.split_at(v_width);
            S::widen(k_row, &mut wide_k);
            S::widen(v_row, &mut wide_v);
            let mut values = &wide_v[..];
            for (head, k) in wide_k.chunks_exact(head_dim).enumerate() {
                let v;
                (v, values) = values.split_at(own_value_dim);
                F::store(layout, block, offset, head, k, v);
            }
        }
    }
}

/// Computes attention of q `(tokens, heads, head_dim)` over all tokens of each sequence. The result has q's type:
/// `(tokens, heads, value_dim)`.
pub(crate) fn attend(layer: &Tensor, q: &Tensor, call: &Call<'_>) -> Result<Tensor> {
    attend_with_lse_of(layer, q, call).map(|(out, _)| out)
}

/// The same, and the natural logarithm of the sum of weights of each row and head, `(tokens, heads)` in f32.
pub(crate) fn attend_with_lse(layer: &Tensor, q: &Tensor, call: &Call<'_>) -> Result<(Tensor, Tensor)> {
    let (out, mut lse) = attend_with_lse_of(layer, q, call)?;
    lse.iter_mut().for_each(|lse| *lse *= std::f32::consts::LN_2);
    Ok((out, Tensor::from_vec(lse, (q.dim(0)?, call.heads), q.device())?))
}

fn attend_with_lse_of(layer: &Tensor, q: &Tensor, call: &Call<'_>) -> Result<(Tensor, Vec<f32>)> {
    let q = &q.contiguous()?;
    let shape = (q.dim(0)?, call.heads, call.layout.value_dim);
    match q.dtype() {
        DType::F32 => {
            let (out, lse) = attend_as::<f32>(layer, q, call)?;
            Ok((Tensor::from_vec(out, shape, q.device())?, lse))
        }
        DType::F16 => {
            let (out, lse) = attend_as::<f16>(layer, q, call)?;
            Ok((Tensor::from_vec(out, shape, q.device())?, lse))
        }
        DType::BF16 => {
            let (out, lse) = attend_as::<bf16>(layer, q, call)?;
            Ok((Tensor::from_vec(out, shape, q.device())?, lse))
        }
        _ => unsupported(),
    }
}

/// Computes attention of q over the tokens of a plan, which may be only some of the sequence's tokens. Returns the
/// output `(tokens, heads, value_dim)`, and the log-sum-exp of each row and head, to base two, by which outputs over
/// different tokens are merged.
pub(crate) fn attend_part(layer: &Tensor, q: &Tensor, call: &Call<'_>) -> Result<(Vec<f32>, Vec<f32>)> {
    let q = &q.contiguous()?;
    match q.dtype() {
        DType::F32 => attend_as(layer, q, call),
        DType::F16 => attend_as(layer, &widened::<f16>(q)?, call),
        DType::BF16 => attend_as(layer, &widened::<bf16>(q)?, call),
        _ => unsupported(),
    }
}

/// Computes attention of contiguous queries of type S. Returns the output and the log-sum-exps.
fn attend_as<S: Number + WithDType>(layer: &Tensor, q: &Tensor, call: &Call<'_>) -> Result<(Vec<S>, Vec<f32>)> {
    let rows = q.elem_count() / call.layout.head_dim;
    let mut out = vec![S::default(); rows * call.layout.value_dim];
    let mut lse = vec![f32::NEG_INFINITY; rows];
    let job = Job::new(call, &mut out, &mut lse);
    // Lock in the order of addresses: q may be a view of another layer, while another call has a view of this layer as
    // its queries and reads that layer.
    let [q_address, layer_address] =
        [q, layer].map(|tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0).addr());
    let order = q_address.cmp(&layer_address);
    crew::run_parallel(job.threads(), || if job.is_claimed() { Ok(()) } else { run(&job, layer, q, order) })?;
    Ok((out, lse))
}

/// Runs tasks of a job, and keeps q and the layer locked for that time. q is locked before the layer, after it, or, if
/// it is a view of the layer, by the same lock.
fn run<S: Number + WithDType>(job: &Job<'_, S>, layer: &Tensor, q: &Tensor, order: Ordering) -> Result<()> {
    let q_before_layer = order.is_lt().then(|| q.storage_and_layout().0);
    let (guard, tensor_layout) = layer.storage_and_layout();
    let q_after_layer = order.is_gt().then(|| q.storage_and_layout().0);
    let q_storage = q_before_layer.as_deref().or(q_after_layer.as_deref()).unwrap_or(&guard);
    let q = &slice(q_storage)?[q.layout().start_offset()..][..q.elem_count()];
    let start = tensor_layout.start_offset();
    match layer.dtype() {
        DType::F32 => job.run::<Float<f32>>(&slice(&guard)?[start..], q),
        DType::F16 => job.run::<Float<f16>>(&slice(&guard)?[start..], q),
        DType::BF16 => job.run::<Float<bf16>>(&slice(&guard)?[start..], q),
        DType::U8 => job.run::<Int8>(&slice(&guard)?[start..], q),
        _ => return unsupported(),
    }
    Ok(())
}

/// Converts a contiguous tensor to f32, as a whole slice: candle's own conversion goes number by number.
fn widened<S: Number + WithDType>(q: &Tensor) -> Result<Tensor> {
    let mut to = vec![0f32; q.elem_count()];
    {
        let (guard, tensor_layout) = q.storage_and_layout();
        S::widen(&slice::<S>(&guard)?[tensor_layout.start_offset()..][..to.len()], &mut to);
    }
    Tensor::from_vec(to, q.shape(), q.device())
}

/// Converts `out` to a tensor of the rows, heads and type of q.
pub(crate) fn like(out: Vec<f32>, q: &Tensor) -> Result<Tensor> {
    let (rows, heads, _) = q.dims3()?;
    let shape = (rows, heads, out.len() / (rows * heads));
    match q.dtype() {
        DType::F16 => Tensor::from_vec(narrowed::<f16>(&out), shape, q.device()),
        DType::BF16 => Tensor::from_vec(narrowed::<bf16>(&out), shape, q.device()),
        _ => Tensor::from_vec(out, shape, q.device()),
    }
}

fn narrowed<S: Number>(from: &[f32]) -> Vec<S> {
    let mut write_as = vec![S::default(); from.len()];
    S::narrow(from, &mut write_as);
    write_as
}

/// Gathers the first `len` tokens of these blocks: k `(len, kv_heads, head_dim)` and v `(len, kv_heads, value_dim)`, in
/// the type in which they are stored, or in f32 if they are stored as bytes.
pub(crate) fn read(layer: &Tensor, layout: &KvLayout, blocks: &[u32], len: usize) -> Result<(Tensor, Tensor)> {
    let (k, v) = {
        let (guard, tensor_layout) = layer.storage_and_layout();
        let start = tensor_layout.start_offset();
        match layer.dtype() {
            DType::F32 => read_slots::<Float<f32>>(&slice(&guard)?[start..], layout, blocks, len),
            DType::F16 => read_slots::<Float<f16>>(&slice(&guard)?[start..], layout, blocks, len),
            DType::BF16 => read_slots::<Float<bf16>>(&slice(&guard)?[start..], layout, blocks, len),
            DType::U8 => read_slots::<Int8>(&slice(&guard)?[start..], layout, blocks, len),
            _ => return unsupported(),
        }
    };
    let dtype = if layer.dtype() == DType::U8 { DType::F32 } else { layer.dtype() };
    let tensor =
        |numbers, dims| Tensor::from_vec(numbers, (len, layout.kv_heads, dims), layer.device())?.to_dtype(dtype);
    Ok((tensor(k, layout.head_dim)?, tensor(v, layout.value_dim)?))
}

fn read_slots<F: Format>(layer: &[F::Number], layout: &KvLayout, blocks: &[u32], len: usize) -> (Vec<f32>, Vec<f32>) {
    let KvLayout { block_size, kv_heads, head_dim, value_dim, .. } = *layout;
    let [mut k, mut v] = [head_dim, value_dim].map(|dims| vec![0f32; len * kv_heads * dims]);
    let rows = k.chunks_exact_mut(head_dim).zip(v.chunks_exact_mut(value_dim));
    for (row, (k, v)) in rows.enumerate() {
        let (token, head) = (row / kv_heads, row % kv_heads);
        let block = &layer[blocks[token / block_size] as usize * layout.block_elements()..];
        F::load(layout, &block[..layout.block_elements()], token % block_size, head, k, v);
    }
    (k, v)
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
