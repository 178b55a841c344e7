//! Memory for one slot, reused from block to block.

/// Direct reads need memory that begins at a page.
pub(crate) const ALIGNMENT: usize = 4096;

/// Memory for reading and writing blocks. Each thread keeps one.
#[derive(Debug, Default)]
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// `bytes` bytes of any content, from a multiple of [`ALIGNMENT`] on.
    pub(crate) fn of(&mut self, bytes: usize) -> &mut [u8] {
        if self.0.len() < bytes + ALIGNMENT {
            self.0.resize(bytes + ALIGNMENT, 0);
        }
        let start = self.0.as_ptr().addr().wrapping_neg() % ALIGNMENT;
        &mut self.0[start..start + bytes]
    }
}
