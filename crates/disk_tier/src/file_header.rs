//! The first page of the file.

use crate::keys::Bits;
use crate::options::Geometry;
use crate::slot::slot_bytes;

/// The header takes a page, so that slots begin at pages.
pub(crate) const BYTES: usize = 4096;

/// Files of other programs do not begin like this.
const MAGIC: [u8; 8] = *b"PAGEDKV\n";

/// The version of the format: of this header, of slots, and of how names and keys are derived.
const VERSION: u32 = 1;

/// Keys and values are stored as they are in memory, so a file belongs to machines of one byte order. The numbers of
/// the format itself are little-endian everywhere.
const BYTE_ORDER: u32 = u32::from_ne_bytes(*b"1234");

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileHeader {
    pub(crate) slot_bytes: u64,
    pub(crate) block_size: u32,
    /// Random bytes: the keys of two stores differ.
    pub(crate) store: Bits,
}

/// What the first page of a file is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing: the file is empty.
    Empty,
    /// Something else.
    Foreign,
    /// A header of a tier, but of another version or byte order, or damaged.
    Unreadable,
    Header(FileHeader),
}

impl FileHeader {
    pub(crate) fn new(geometry: &Geometry, largest: usize, store: Bits) -> Self {
        Self { slot_bytes: slot_bytes(geometry.block_size, largest), block_size: geometry.block_size as u32, store }
    }

    /// Whether blocks have the same sizes.
    pub(crate) fn has_sizes_of(&self, other: &Self) -> bool {
        (self.slot_bytes, self.block_size) == (other.slot_bytes, other.block_size)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(BYTE_ORDER.to_le_bytes());
        bytes.extend(self.slot_bytes.to_le_bytes());
        bytes.extend(self.block_size.to_le_bytes());
        bytes.extend(self.store);
        bytes.resize(BYTES - 32, 0);
        bytes.extend(blake3::hash(&bytes).as_bytes());
        bytes
    }

    /// What the first page of a file is; it is shorter if the file is.
    pub(crate) fn decode(bytes: &[u8]) -> Found {
        if bytes.is_empty() {
            return Found::Empty;
        }
        if !bytes.starts_with(&MAGIC) {
            return if MAGIC.starts_with(bytes) { Found::Unreadable } else { Found::Foreign };
        }
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let sum = |bytes: &[u8]| *blake3::hash(&bytes[..BYTES - 32]).as_bytes();
        if bytes.len() < BYTES || sum(bytes) != bytes[BYTES - 32..BYTES] {
            return Found::Unreadable;
        }
        if (number(8), number(12)) != (VERSION, BYTE_ORDER) {
            return Found::Unreadable;
        }
        let mut store = [0; 32];
        store.copy_from_slice(&bytes[28..60]);
        let slot_bytes = u64::from(number(16)) | u64::from(number(20)) << 32;
        Found::Header(Self { slot_bytes, block_size: number(24), store })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let header = FileHeader::new(&Geometry { block_size: 16, bytes: vec![5000] }, 5000, [7; 32]);
        let bytes = header.encode();
        assert_eq!((bytes.len(), header.slot_bytes), (BYTES, 8192));
        assert_eq!(FileHeader::decode(&bytes), Found::Header(header));
        assert_eq!(FileHeader::decode(&[]), Found::Empty);
        assert_eq!(FileHeader::decode(b"PAGEDKV"), Found::Unreadable);
        assert_eq!(FileHeader::decode(b"PAGES"), Found::Foreign);
        for at in 0..BYTES {
            let mut other = bytes.clone();
            other[at] ^= 1;
            let expected = if at < MAGIC.len() { Found::Foreign } else { Found::Unreadable };
            assert_eq!(FileHeader::decode(&other), expected, "byte {at}");
        }
        // A later version, with a checksum that is right.
        let mut other = bytes;
        other[8] += 1;
        let sum = *blake3::hash(&other[..BYTES - 32]).as_bytes();
        other[BYTES - 32..].copy_from_slice(&sum);
        assert_eq!(FileHeader::decode(&other), Found::Unreadable);
    }
}
