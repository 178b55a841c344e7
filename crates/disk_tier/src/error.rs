//! What can go wrong when a file is opened or written. When a block is read, everything is a miss.

use std::io;
use std::path::PathBuf;

/// Why a tier was not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process, or another tier of this one, writes to the file.
    #[error("{} is written to by another process or tier", .0.display())]
    HasWriter(PathBuf),
    /// The file exists, is not empty and is not one of a disk tier: it is left as it is.
    #[error("{} is not a file of a disk tier", .0.display())]
    NotATier(PathBuf),
    /// The secret has no bytes, as if it had not been set.
    #[error("the secret is empty")]
    EmptySecret,
    /// The limit has no room for the header and one slot.
    #[error("a limit of {limit} bytes has no room for a block: at least {needed} are needed")]
    LimitTooSmall {
        /// The limit.
        limit: u64,
        /// The least that would do.
        needed: u64,
    },
    /// The geometry has no tokens or no groups, or is too large.
    #[error("a tier of blocks of {block_size} tokens and {groups} groups of up to {bytes} bytes cannot be made")]
    Geometry {
        /// Tokens in a block.
        block_size: usize,
        /// How many groups there are.
        groups: usize,
        /// The bytes of the largest block.
        bytes: usize,
    },
    /// The operating system gave no random bytes.
    #[error("no random bytes: {0}")]
    Random(getrandom::Error),
    /// The file cannot be opened, read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        error: io::Error,
    },
}

/// Why a block was not stored. The tier can be used as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The tier was opened for reading.
    #[error("the tier was opened for reading only")]
    ReadOnly,
    /// The group does not exist, or its blocks have another size.
    #[error("a block of group {group} has {expected} bytes, got {got}")]
    Size {
        /// The group.
        group: usize,
        /// The size of its blocks; 0 if there is no such group.
        expected: usize,
        /// The bytes that were given.
        got: usize,
    },
    /// Every other slot is being written, or has a block that this one follows: a prefix is longer than the file. Or the
    /// disk is so full that there is none.
    #[error("no slot is free: the prefix is longer than the file, all are being written, or the disk is full")]
    NoSlot,
    /// The operating system gave no random bytes.
    #[error("no random bytes: {0}")]
    Random(getrandom::Error),
    /// The file cannot be written, for example because the disk is full.
    #[error("the block was not written: {0}")]
    Io(#[from] io::Error),
}
