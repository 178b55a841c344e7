//! Salts: of a prefix key, and from a position on.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Opaque bytes that must match, like the tokens, for a cached prefix to be found: for example the name of a tenant or
/// of a LoRA adapter, or the hash of an image. Sequences with different salts never share a cached block.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Salt(Option<Arc<[u8]>>);

impl Salt {
    /// No salt: the default.
    pub fn none() -> Self {
        Self(None)
    }

    /// A salt of these bytes. An empty slice is a salt, too, and differs from no salt.
    pub fn new(bytes: &[u8]) -> Self {
        Self(Some(bytes.into()))
    }

    /// The bytes, if there is a salt.
    pub fn bytes(&self) -> Option<&[u8]> {
        self.0.as_deref()
    }
}

impl fmt::Debug for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes() {
            Some(bytes) => write!(f, "Salt({})", bytes.escape_ascii()),
            None => f.write_str("Salt(none)"),
        }
    }
}

/// A salt that holds from a position of a sequence on: the block that contains the position, and all blocks after it, are
/// found only by sequences that have the same salts from the same positions on. Blocks before it are not affected.
///
/// This is for content that token ids do not tell apart, for example an image: the text before it is shared by all, and
/// what follows by those with the same image. (In vLLM they are the extra keys of a block.)
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SaltFrom {
    /// The position, in the sequence, of the first token whose keys and values depend on the salt.
    pub position: usize,
    /// The salt.
    pub salt: Salt,
}

impl SaltFrom {
    /// Those of `salts`, which are in the order of their positions, that begin at these positions.
    #[inline]
    pub fn at(salts: &[SaltFrom], positions: Range<usize>) -> &[SaltFrom] {
        if salts.is_empty() {
            return &[];
        }
        let before = |end: usize| salts.partition_point(|salt| salt.position < end);
        &salts[before(positions.start)..before(positions.end)]
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Salt {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.bytes().serialize(serializer)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Salt {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Option::<Vec<u8>>::deserialize(deserializer)?.map(Into::into)))
    }
}
