//! What else, besides the tokens, decides whether two prefixes are the same.

use crate::{Salt, Window};

/// What must match, besides the tokens, for a cached prefix to be found: whatever changes the keys and values that the
/// same tokens leave, or must keep sequences apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct PrefixKey {
    /// The caller's bytes.
    pub salt: Salt,
    /// How far back the sequences look: through a window the same tokens leave other keys and values, and only the
    /// blocks that the next token sees have to be there.
    pub window: Option<Window>,
}

impl PrefixKey {
    /// The key of sequences without salt and window.
    pub fn new() -> Self {
        Self::default()
    }

    /// With these bytes.
    #[must_use]
    pub fn salt(self, salt: Salt) -> Self {
        Self { salt, ..self }
    }

    /// Of sequences that look back this far.
    #[must_use]
    pub fn window(self, window: Window) -> Self {
        Self { window: Some(window), ..self }
    }

    /// Whether there is neither a salt nor a window.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.salt.bytes().is_none() && self.window.is_none()
    }
}
