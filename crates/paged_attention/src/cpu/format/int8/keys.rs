//! The values of a tile whose values are in its keys.

use std::array::from_fn;

use block_pool::{BYTE_STRIP, PANEL, QUAD};

use super::{Int8, OFFSET, split_scales};
use crate::cpu::format::Format;
use crate::cpu::panels::{Panels, TILE_PANELS};
use crate::cpu::wide::{Run, Wide};

/// The first `value_dim` dimensions of the keys as the values of a tile, of `dims` dimensions, the rest of which are
/// arbitrary.
#[inline(always)]
pub(super) fn transposed<'a, V: Wide>(
    keys: &Panels<'_, u8>,
    value_dim: usize,
    dims: usize,
    buffer: &'a mut Vec<u8>,
) -> Panels<'a, u8> {
    let [_, size] = Int8::panel_sizes(0, dims);
    buffer.resize(TILE_PANELS * size, 0);
    for (keys, values) in keys.iter().zip(buffer.chunks_exact_mut(size)).filter(|(keys, _)| !keys.is_empty()) {
        V::outlined(Transpose { keys, value_dim, dims, values });
    }
    let buffer: &[u8] = buffer;
    from_fn(|panel| if keys[panel].is_empty() { &[][..] } else { &buffer[panel * size..][..size] })
}

struct Transpose<'a> {
    keys: &'a [u8],
    value_dim: usize,
    dims: usize,
    values: &'a mut [u8],
}

impl Run for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let (numbers, scales) = split_scales(self.keys);
        let (strips, value_scales) = self.values.split_at_mut(PANEL * self.dims);
        // A vector of keys has four dimensions of sixteen tokens; a strip of values has, in each of its vectors, four
        // tokens of sixteen dimensions. Both consist of runs of four by four numbers.
        for (quad, numbers) in numbers.iter().take(self.value_dim.div_ceil(QUAD)).enumerate() {
            let strip = &mut strips[quad * QUAD / BYTE_STRIP * BYTE_STRIP * PANEL..][..BYTE_STRIP * PANEL];
            let (runs, _) = numbers.as_chunks::<16>();
            for (tokens, run) in runs.iter().enumerate() {
                let to = &mut strip[tokens * QUAD * BYTE_STRIP + quad * QUAD % BYTE_STRIP * QUAD..][..16];
                to.copy_from_slice(&from_fn::<u8, 16, _>(|i| run[i % QUAD * QUAD + i / QUAD] ^ OFFSET as u8));
            }
        }
        value_scales.copy_from_slice(scales.as_flattened());
    }
}
