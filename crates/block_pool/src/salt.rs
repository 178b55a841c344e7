//! What else, beside the tokens, decides whether two prefixes are the same.

use std::fmt;
use std::sync::Arc;

/// Opaque bytes that must match, like the tokens, for a prefix to be reused: the name of a tenant, a LoRA adapter, the
/// hash of an image. Sequences with different salts never share a block that one of them computed.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Salt(Option<Arc<[u8]>>);

impl Salt {
    /// No salt: what sequences have that were given none.
    pub fn none() -> Self {
        Self(None)
    }

    /// These bytes. An empty slice is a salt too, and differs from none.
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
