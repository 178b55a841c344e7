//! Memory for one slot, reused from block to block.

/// Memory for reading and writing blocks. Each thread keeps one.
#[derive(Debug, Default)]
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// `bytes` bytes of any content.
    pub(crate) fn of(&mut self, bytes: usize) -> &mut [u8] {
        if self.0.len() < bytes {
            self.0.resize(bytes, 0);
        }
        &mut self.0[..bytes]
    }
}
