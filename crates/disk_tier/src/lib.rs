#![doc = include_str!("../README.md")]
//!
//! # What is promised
//!
//! What is loaded is what was stored under the same namespace, key, salts and tokens, or nothing. A process that was
//! killed at any instant, a full disk, a torn or changed byte, a file that was cut, or that belongs to another model,
//! version or byte order, is a miss: never other numbers, never a panic. Nothing is synchronised to the disk: after a
//! loss of power, blocks may be missing, and those that were torn are noticed.
//!
//! # Who may read what
//!
//! Blocks are named by a keyed hash (BLAKE3) of the namespace, the prefix key, and the chain of tokens and salts. The key
//! comes from the [secret](Options::secret), or without one from random bytes in the file. A plain block's checksum is
//! keyed in the same way, and covers header, tokens and bytes. A salt is never stored: blocks under a salt are encrypted
//! and authenticated (XChaCha20-Poly1305) with a key derived from the secret and all salts, and their tokens, too. Without
//! a secret, whoever has the file and guesses a salt can read its blocks: salts must be unguessable then.
//!
//! # Threads and processes
//!
//! All methods take `&self` and block while they read or write; no lock is held meanwhile. A file has one writer, which is
//! enforced by a lock, and any number of [readers](DiskTier::open_read_only). (On Windows, the lock of a writer keeps
//! readers out, too.) On Unix a new file can be read by its owner only.

mod below_pool;
mod buffer;
mod error;
mod file_header;
mod identity;
mod index;
mod io;
mod keys;
mod options;
mod slot;
mod tier;

pub use buffer::Buffer;
pub use error::{OpenError, StoreError};
pub use identity::{Namespace, Place, Prefix};
pub use options::{Geometry, Options};
pub use tier::{DiskTier, Stats, Stored};
