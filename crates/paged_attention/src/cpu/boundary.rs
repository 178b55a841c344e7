//! From candle's tensors to slices and back.
//!
//! candle keeps one lock per storage, and its read guards are not recursive: each guard is taken once, and no tensor
//! operation happens while one is held.

use block_pool::KvLayout;
use candle_core::{CpuStorage, DType, InplaceOp3, Layout, Result, Storage, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

use super::Kernel;
use super::algorithm::{Scratch, Task};
use super::element::Element;
use crate::Attention;
use crate::plan::{Plan, Span};

/// Rows that a task has at most, unless one token's group has more: as many as keep its scratch in the nearest cache.
const TASK_ROWS: usize = 32;

/// Multiply-adds below which waking other threads takes longer than the work.
const WORTH_A_THREAD: usize = 1 << 18;

/// What one call computes.
pub(crate) struct Call<'a> {
    pub(crate) layout: &'a KvLayout,
    pub(crate) plan: &'a Plan,
    /// Query heads.
    pub(crate) heads: usize,
    pub(crate) attention: &'a Attention,
}

/// Writes k and v `(tokens, kv_heads, head_dim)` into the slots of the plan, in place, in one pass.
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
    fn to<S: Element>(&self, layer: &mut CpuStorage, layout: &Layout, k: &[S], v: &[S]) -> Result<()> {
        let start = layout.start_offset();
        match layer {
            CpuStorage::F32(layer) => self.slots(&mut layer[start..], k, v),
            CpuStorage::F16(layer) => self.slots(&mut layer[start..], k, v),
            CpuStorage::BF16(layer) => self.slots(&mut layer[start..], k, v),
            _ => return unsupported(),
        }
        Ok(())
    }

    fn slots<S: Element, T: Element>(&self, layer: &mut [T], k: &[S], v: &[S]) {
        let Self { layout, plan } = *self;
        let KvLayout { block_size, kv_heads, head_dim, .. } = *layout;
        let width = kv_heads * head_dim;
        let block_elements = layout.block_elements();
        for ((&slot, k), v) in plan.slots.iter().zip(k.chunks_exact(width)).zip(v.chunks_exact(width)) {
            let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
            let block = &mut layer[block * block_elements..][..block_elements];
            for head in 0..kv_heads {
                let (k, v) = (&k[head * head_dim..][..head_dim], &v[head * head_dim..][..head_dim]);
                let keys = block[layout.key(offset, head, 0)..].iter_mut().step_by(layout.key_stride());
                keys.zip(k).for_each(|(to, from)| *to = T::narrow(from.widen()));
                let values = block[layout.value(offset, head, 0)..].iter_mut();
                values.zip(v).for_each(|(to, from)| *to = T::narrow(from.widen()));
            }
        }
    }
}

/// Attends with q `(tokens, heads, head_dim)` to all tokens of each sequence; the result has q's shape and type.
pub(crate) fn attend(layer: &Tensor, q: &Tensor, call: &Call<'_>, kernel: Kernel) -> Result<Tensor> {
    let wide = q.to_dtype(DType::F32)?.contiguous()?;
    let mut out = vec![0f32; wide.elem_count()];
    {
        let (q_guard, q_layout) = wide.storage_and_layout();
        let queries = &slice::<f32>(&q_guard)?[q_layout.start_offset()..];
        let (guard, layout) = layer.storage_and_layout();
        let start = layout.start_offset();
        match layer.dtype() {
            DType::F32 => run(&slice::<f32>(&guard)?[start..], queries, &mut out, call, kernel),
            DType::F16 => run(&slice::<f16>(&guard)?[start..], queries, &mut out, call, kernel),
            DType::BF16 => run(&slice::<bf16>(&guard)?[start..], queries, &mut out, call, kernel),
            _ => return unsupported(),
        }
    }
    Tensor::from_vec(out, q.shape(), q.device())?.to_dtype(q.dtype())
}

fn slice<T: WithDType>(storage: &Storage) -> Result<&[T]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice::<T>(),
        _ => candle_core::bail!("fused attention reads CPU tensors only"),
    }
}

fn unsupported<T>() -> Result<T> {
    candle_core::bail!("attention reads and stores f32, f16 and bf16 only")
}

/// One task's part of q and of the result, and where it belongs.
struct Job<'a> {
    span: &'a Span,
    /// The first of its tokens, counted in the span.
    first: usize,
    head: usize,
    queries: Vec<&'a [f32]>,
    out: Vec<&'a mut [f32]>,
}

fn run<T: Element>(storage: &[T], q: &[f32], out: &mut [f32], call: &Call<'_>, kernel: Kernel) {
    let KvLayout { kv_heads, head_dim, .. } = *call.layout;
    let jobs = split(q, out, call);
    let work: usize = jobs.iter().map(|job| job.queries.len() * job.span.len()).sum::<usize>() * call.heads / kv_heads;
    let one = |scratch: &mut Scratch, mut job: Job<'_>| {
        let task = Task {
            storage,
            layout: call.layout,
            blocks: &call.plan.blocks[job.span.blocks.clone()],
            head: job.head,
            queries: &job.queries,
            span: job.span,
            first: job.first,
            causal: call.attention.causal,
            scale: call.attention.scale,
        };
        kernel.attend(&task, &mut job.out, scratch);
    };
    if work * head_dim < WORTH_A_THREAD {
        let mut scratch = Scratch::default();
        jobs.into_iter().for_each(|job| one(&mut scratch, job));
    } else {
        jobs.into_par_iter().for_each_init(Scratch::default, one);
    }
}

/// Cuts q and the result, both `(tokens, kv_heads, group * head_dim)`, into jobs.
fn split<'a>(q: &'a [f32], out: &'a mut [f32], call: &Call<'a>) -> Vec<Job<'a>> {
    let KvLayout { kv_heads, head_dim, .. } = *call.layout;
    let group = call.heads / kv_heads;
    let tokens_per_job = (TASK_ROWS / group).max(1);
    let width = group * head_dim;
    let mut runs = q.chunks_exact(width).zip(out.chunks_exact_mut(width));
    let mut jobs = Vec::new();
    for span in &call.plan.spans {
        for first in (0..span.rows.len()).step_by(tokens_per_job) {
            let tokens = tokens_per_job.min(span.rows.len() - first);
            let begin = jobs.len();
            let empty =
                |head| Job { span, first, head, queries: Vec::with_capacity(tokens), out: Vec::with_capacity(tokens) };
            jobs.extend((0..kv_heads).map(empty));
            for _ in 0..tokens {
                for (job, (queries, out)) in jobs[begin..].iter_mut().zip(&mut runs) {
                    job.queries.push(queries);
                    job.out.push(out);
                }
            }
        }
    }
    jobs
}
