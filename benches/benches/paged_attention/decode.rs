//! One new token for each sequence, compared with the memory's floor and candle's own attention.

use std::cell::Cell;
use std::hint::black_box;

use anyhow::{Result, ensure};
use benches::{Contender, Race, Record, Rounds};
use candle_core::{CpuStorage, D, Storage, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops::softmax_last_dim;
use half::f16;
use paged_attention::{Attention, KvDtype};

use crate::case::Case;
use crate::{SECONDS, floor};

/// Rotates over the layers. Contenders that read the same layers share one `Turn`, so that none finds in the
/// processor's cache what another has just read.
struct Turn(Cell<usize>);

impl Turn {
    fn next(&self, layers: usize) -> usize {
        self.0.set((self.0.get() + 1) % layers);
        self.0.get()
    }
}

/// Calls `read` with a layer's numbers, of one, two or four bytes each, as words of four bytes.
pub(crate) fn with_words<R>(layer: &Tensor, read: impl FnOnce(&[u32]) -> R) -> Result<R> {
    let (guard, layout) = layer.storage_and_layout();
    let own = layout.start_offset()..layout.start_offset() + layer.elem_count();
    Ok(match &*guard {
        Storage::Cpu(CpuStorage::F32(numbers)) => read(bytemuck::cast_slice(&numbers[own])),
        Storage::Cpu(CpuStorage::F16(numbers)) => read(bytemuck::cast_slice(&numbers[own])),
        Storage::Cpu(CpuStorage::BF16(numbers)) => read(bytemuck::cast_slice(&numbers[own])),
        Storage::Cpu(CpuStorage::U8(numbers)) => read(bytemuck::cast_slice(&numbers[own])),
        _ => anyhow::bail!("the floor needs f32, f16, bf16 or u8 on a CPU"),
    })
}

/// Measures one new token for each sequence. Runs on the threads of the current pool.
pub(crate) fn decode(case: &Case, record: &mut Record) -> Result<()> {
    let (cache, mut tables) = case.filled()?;
    let layers = case.layers();
    let order: Vec<u32> = tables.iter().flat_map(|table| table.blocks()).map(|id| id.index() as u32).collect();
    let block = cache.bytes_per_block() / layers / 4;
    let floor_bytes = order.len() * block * 4;
    ensure!(floor_bytes >= case.bytes(), "the floor reads {floor_bytes} bytes, attention reads {}", case.bytes());

    let q = case.random(&[case.batch, case.heads, case.head_dim])?;
    let k = case.random(&[case.batch, case.kv_heads, case.head_dim])?;
    let attention = Attention::new(case.scale());
    let mut step = cache.step();
    for table in &mut tables {
        step.push(table, &[0])?;
    }
    let [paged, peers] = [(); 2].map(|()| Turn(Cell::new(0)));
    let floor = |read: fn(&[u32], usize, &[u32]) -> u32| {
        let layer = cache.tensor(paged.next(layers)).expect("the layer exists");
        black_box(with_words(layer, |words| read(words, block, &order)).expect("it is on a CPU"));
    };
    let attend = |_: &()| {
        let layer = paged.next(layers);
        black_box(step.attend(layer, &q, &k, &k, &attention).expect("the shapes fit"));
    };
    // Layouts that differ only in blocks have the same peers.
    let with_peers = case.block_size == 16 && !case.shuffled;
    let contiguous = if with_peers { case.contiguous()? } else { vec![] };
    let group = case.heads / case.kv_heads;
    let grouped_q = (case.random(&[case.batch, case.kv_heads, group, case.head_dim])? * f64::from(case.scale()))?;
    let flash_q = case.random(&[case.batch, 1, case.heads, case.head_dim])?;
    let mut contenders: Vec<Contender<'_>> = vec![
        Contender::timed("paged", attend),
        Contender::timed("plain", |_| floor(floor::plain)),
        Contender::timed("four streams", |_| floor(floor::four_streams)),
    ];
    if with_peers {
        contenders.push(Contender::timed("candle grouped matmuls", |_| {
            let [k, v] = &contiguous[peers.next(layers)];
            let attend = || -> candle_core::Result<Tensor> {
                softmax_last_dim(&grouped_q.matmul(&k.transpose(D::Minus1, D::Minus2)?)?)?.matmul(v)
            };
            black_box(attend().expect("the shapes fit"));
        }));
        // candle's flash attention has neither bf16 nor 8 bits.
        if matches!(case.dtype, KvDtype::F32 | KvDtype::F16) {
            contenders.push(Contender::timed("candle-nn flash attention", |_| {
                let [k, v] = &contiguous[peers.next(layers)];
                let attend = || -> candle_core::Result<Tensor> {
                    let (k, v) = (k.transpose(1, 2)?, v.transpose(1, 2)?);
                    let scale = case.scale();
                    match case.dtype {
                        KvDtype::F16 => flash_attn::<f16>(&flash_q, &k, &v, scale, AttnMask::None, None, None),
                        _ => flash_attn::<f32>(&flash_q, &k, &v, scale, AttnMask::None, None, None),
                    }
                };
                black_box(attend().expect("the shapes fit"));
            }));
        }
    }
    let name = case.name();
    let floors = Race::run(Rounds::for_seconds(SECONDS), &mut contenders[..3])?;
    let mut peers = vec![];
    if with_peers {
        contenders.drain(1..3);
        let race = Race::run(Rounds::for_seconds(SECONDS), &mut contenders)?;
        peers = race.names().iter().enumerate().skip(1).map(|(at, name)| (name.clone(), race.ratio(at, 0))).collect();
    }
    record.compared(&name, "time", floors.time(0), "ns", Some(floors.ratio(1, 0)), peers);
    record.value(&name, "of four streams", floors.ratio(2, 0), "x");
    record.value(&name, "bandwidth", case.bytes() as f64 / floors.time(0), "GB/s");
    Ok(())
}
