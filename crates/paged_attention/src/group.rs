//! A group of layers of a cache.

use block_table::{Span, Window};

use block_pool::{KvDtype, KvShape};

/// Layers that keep their keys and values in the same way: they have one shape and one type, and see the same tokens.
/// Sequences have a list of blocks in each group; see [`KvCache::builder_of`](crate::KvCache::builder_of).
///
/// ```
/// use paged_attention::{LayerGroup, Window};
///
/// // Gemma 3 1B: every sixth of 26 layers sees all tokens, the others see the last 512.
/// let is_full = |layer: &usize| layer % 6 == 5;
/// let full = LayerGroup::new((0..26).filter(is_full), 1, 256);
/// let windowed = LayerGroup::new((0..26).filter(|layer| !is_full(layer)), 1, 256).window(Window::new(512));
/// assert_eq!((full.shape().layers, windowed.shape().layers), (4, 22));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LayerGroup {
    layers: Vec<usize>,
    shape: KvShape,
    dtype: Option<KvDtype>,
    span: Span,
}

impl LayerGroup {
    /// A group of these layers of the model, counted from 0, with this number of key and value heads per layer and of
    /// dimensions per head, the same for keys and values. Its tokens see all tokens before them.
    pub fn new(layers: impl IntoIterator<Item = usize>, kv_heads: usize, head_dim: usize) -> Self {
        let layers: Vec<usize> = layers.into_iter().collect();
        let shape = KvShape::new(layers.len(), kv_heads, head_dim);
        Self { layers, shape, dtype: None, span: Span::all() }
    }

    /// The group of all layers of a model whose layers have one shape.
    pub(crate) fn of(shape: KvShape) -> Self {
        Self { layers: (0..shape.layers).collect(), shape, dtype: None, span: Span::all() }
    }

    /// Gives the values `n` dimensions.
    #[must_use]
    pub fn value_dim(self, n: usize) -> Self {
        Self { shape: self.shape.value_dim(n), ..self }
    }

    /// Makes the first `n` dimensions of a key also its value ([`KvShape::values_in_keys`]).
    #[must_use]
    pub fn values_in_keys(self, n: usize) -> Self {
        Self { shape: self.shape.values_in_keys(n), ..self }
    }

    /// Gives the layers a sliding window: a sequence frees the blocks that the window has passed.
    #[must_use]
    pub fn window(self, window: Window) -> Self {
        Self { span: Span::window(window), ..self }
    }

    /// Cuts a sequence into chunks of `n` tokens: a token sees only its own chunk (Llama 4). A sequence frees the
    /// blocks of earlier chunks.
    #[must_use]
    pub fn chunks(self, n: usize) -> Self {
        Self { span: Span::chunks(n), ..self }
    }

    /// Sets the type in which these layers store keys and values: that of the cache by default.
    #[must_use]
    pub fn dtype(self, dtype: KvDtype) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// The layers, in the order in which their tensors are kept.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// The number of layers of the group, and the heads and dimensions of their keys and values.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Which tokens a token sees in these layers.
    pub fn span(&self) -> Span {
        self.span
    }

    /// The type that was set for these layers.
    pub(crate) fn own_dtype(&self) -> Option<KvDtype> {
        self.dtype
    }
}
