//! One slot of the file: a header, the tokens, and the bytes of a block.
//!
//! | at | bytes | what |
//! |---:|---:|---|
//! | 0 | 8 | `KVBLOCK` and a line feed |
//! | 8 | 4 | 1 if tokens and bytes are encrypted, else 0 |
//! | 12 | 4 | the group of layers |
//! | 16 | 8 | the number of the slot, from 0 |
//! | 24 | 4 | tokens in the block |
//! | 28 | 4 | the block's bytes |
//! | 32 | 8 | when it was stored: seconds since 1970 |
//! | 40 | 8 | 0 |
//! | 48 | 32 | the namespace |
//! | 80 | 32 | the name of the place |
//! | 112 | 32 | the name of the place before |
//! | 144 | 24 | if encrypted, the nonce |
//! | 168 | 24 | 0 |
//! | 192 | 32 | the keyed BLAKE3 of all other bytes or, if encrypted, the 16 bytes of Poly1305, and 0 |
//! | 224 | 32 | 0 |
//! | 256 | 4 for each token | the tokens |
//! | | | 0 up to a multiple of 64, then the block's bytes, as they are in memory |
//!
//! All numbers are little-endian. If the slot is encrypted, everything before the tokens is authenticated with them.

use std::io;
use std::ops::Range;

use chacha20poly1305::aead::{AeadInOut, KeyInit};
use chacha20poly1305::{Key, Tag, XChaCha20Poly1305, XNonce};

use crate::StoreError;
use crate::identity::{Namespace, Place};
use crate::keys::{Bits, Keys};

/// The bytes before the tokens.
pub(crate) const HEADER: usize = 256;

const MAGIC: [u8; 8] = *b"KVBLOCK\n";
const NAME: Range<usize> = 80..112;
const PARENT: Range<usize> = 112..144;
const NONCE: Range<usize> = 144..168;
const SUM: Range<usize> = 192..224;

/// Slots are whole pages: so they can be read and written without the system's cache.
const PAGE: u64 = 4096;

/// Where the bytes of a block begin in its slot.
pub(crate) fn start_of_bytes(block_size: usize) -> usize {
    (HEADER + 4 * block_size).next_multiple_of(64)
}

/// The size of a slot for blocks of up to `largest` bytes.
pub(crate) fn slot_bytes(block_size: usize, largest: usize) -> u64 {
    (start_of_bytes(block_size) as u64 + largest as u64).next_multiple_of(PAGE)
}

/// Where a block is, or is to be: what identifies its slot.
#[derive(Clone, Copy)]
pub(crate) struct Address<'a> {
    pub(crate) namespace: &'a Namespace,
    pub(crate) place: &'a Place,
    pub(crate) group: u32,
    pub(crate) slot: u64,
}

/// What a slot's header says, before anything is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) name: Bits,
    pub(crate) parent: Bits,
    pub(crate) group: u32,
    pub(crate) stored: u64,
}

impl Said {
    /// Reads the header of a slot. `None` if it is none, or that of another slot.
    pub(crate) fn of(header: &[u8; HEADER], slot: u64) -> Option<Self> {
        let bits = |range: Range<usize>| {
            let mut bits = [0; 32];
            bits.copy_from_slice(&header[range]);
            bits
        };
        if header[..8] != MAGIC || number(header, 16) != slot {
            return None;
        }
        let group = (number(header, 8) >> 32) as u32;
        // No model has as many, and damaged headers could have a place of any number of groups.
        if group > 4096 {
            return None;
        }
        Some(Self { name: bits(NAME), parent: bits(PARENT), group, stored: number(header, 32) })
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

impl Address<'_> {
    /// The header, with zeros for the nonce and the checksum.
    fn header(&self, bytes: usize, stored: u64) -> [u8; HEADER] {
        let Self { namespace, place, group, slot } = *self;
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&u32::from(place.seal.is_some()).to_le_bytes());
        header[12..16].copy_from_slice(&group.to_le_bytes());
        header[16..24].copy_from_slice(&slot.to_le_bytes());
        header[24..28].copy_from_slice(&(place.tokens.len() as u32).to_le_bytes());
        header[28..32].copy_from_slice(&(bytes as u32).to_le_bytes());
        header[32..40].copy_from_slice(&stored.to_le_bytes());
        header[48..80].copy_from_slice(&namespace.0);
        header[NAME].copy_from_slice(&place.name);
        header[PARENT].copy_from_slice(&place.parent);
        header
    }

    /// How many bytes of its slot a block of this many bytes takes.
    pub(crate) fn used(&self, bytes: usize) -> usize {
        start_of_bytes(self.place.tokens.len()) + bytes
    }

    /// Writes the whole slot into `out`, which has [`used`](Self::used) bytes.
    pub(crate) fn encode(&self, keys: &Keys, stored: u64, bytes: &[u8], out: &mut [u8]) -> Result<(), StoreError> {
        let (header, content) = out.split_at_mut(HEADER);
        header.copy_from_slice(&self.header(bytes.len(), stored));
        let (tokens, rest) = content.split_at_mut(4 * self.place.tokens.len());
        tokens.chunks_exact_mut(4).zip(&*self.place.tokens).for_each(|(to, token)| {
            to.copy_from_slice(&token.to_le_bytes());
        });
        let (padding, to) = rest.split_at_mut(rest.len() - bytes.len());
        padding.fill(0);
        to.copy_from_slice(bytes);
        match &self.place.seal {
            None => {
                let sum = checksum(keys, header, content);
                header[SUM].copy_from_slice(sum.as_bytes());
            }
            Some(seal) => {
                getrandom::fill(&mut header[NONCE]).map_err(StoreError::Random)?;
                let (cipher, nonce) = cipher(seal, header);
                let tag = cipher.encrypt_inout_detached(&nonce, header, content.into());
                let tag = tag.map_err(|_| io::Error::other("a block of more than 256 GiB cannot be encrypted"))?;
                header[SUM][..16].copy_from_slice(&tag);
            }
        }
        Ok(())
    }

    /// Where the block's bytes are in `slot`, which has [`used`](Self::used) bytes, if all of it is what was written for
    /// this address. A block that was encrypted is decrypted there. Also returns when it was stored.
    pub(crate) fn verify(&self, keys: &Keys, bytes: usize, slot: &mut [u8]) -> Option<(Range<usize>, u64)> {
        let len = slot.len();
        let (header, content) = slot.split_at_mut_checked(HEADER)?;
        let stored = number(header, 32);
        let mut sum: Bits = [0; 32];
        sum.copy_from_slice(&header[SUM]);
        header[SUM].fill(0);
        let mut expected = self.header(bytes, stored);
        if self.place.seal.is_some() {
            expected[NONCE].copy_from_slice(&header[NONCE]);
        }
        if *header != expected {
            return None;
        }
        match &self.place.seal {
            // In constant time.
            None => (checksum(keys, header, content) == sum).then_some(())?,
            Some(seal) => {
                let (cipher, nonce) = cipher(seal, header);
                let mut tag = Tag::default();
                tag.copy_from_slice(&sum[..16]);
                // What is not a part of the tag is a part of the slot, too.
                (sum[16..] == [0; 16]).then_some(())?;
                cipher.decrypt_inout_detached(&nonce, header, content.into(), &tag).ok()?;
            }
        }
        let tokens = content.chunks_exact(4).map(|token| u32::from_le_bytes([token[0], token[1], token[2], token[3]]));
        let is_same = tokens.take(self.place.tokens.len()).eq(self.place.tokens.iter().copied());
        is_same.then_some((len - bytes..len, stored))
    }
}

fn checksum(keys: &Keys, header: &[u8], content: &[u8]) -> blake3::Hash {
    let mut hasher = keys.checksums();
    hasher.update(header).update(content);
    hasher.finalize()
}

fn cipher(seal: &Bits, header: &[u8]) -> (XChaCha20Poly1305, XNonce) {
    let mut nonce = XNonce::default();
    nonce.copy_from_slice(&header[NONCE]);
    (XChaCha20Poly1305::new(&Key::from(*seal)), nonce)
}
