//! The prefix key: what must be equal, in addition to the tokens, for two prefixes to be the same.

use crate::{Salt, Window};

/// What must match in addition to the tokens for a cached prefix to be found: everything else that changes the keys and
/// values of the same tokens, or that must keep sequences apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct PrefixKey {
    /// Bytes chosen by the caller.
    pub salt: Salt,
    /// The window of the sequences. With a window the same tokens have other keys and values, and only the blocks that
    /// the next token sees have to be cached.
    pub window: Option<Window>,
}

impl PrefixKey {
    /// The key of sequences without salt and window.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the salt.
    #[must_use]
    pub fn salt(self, salt: Salt) -> Self {
        Self { salt, ..self }
    }

    /// Sets the window.
    #[must_use]
    pub fn window(self, window: Window) -> Self {
        Self { window: Some(window), ..self }
    }

    /// Whether the key has neither a salt nor a window.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.salt.bytes().is_none() && self.window.is_none()
    }
}
