//! The salt of a prefix key.

use std::fmt;
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
