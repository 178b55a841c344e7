//! The architectures of GGUF files that are computed, and in what they differ. What a file itself says (dimensions,
//! windows, biases, scaling of positions) is in [`Config`](crate::config::Config).

/// What a model's architecture decides, as `general.architecture` of its file names it.
#[derive(Debug, PartialEq)]
pub struct Architecture {
    /// Its name in model files.
    pub name: &'static str,
    /// Which dimensions are rotated together.
    pub pairs: Pairs,
    /// The matrices of q, k and v are one, and so are gate and up.
    pub fused: bool,
    /// q, k and v have biases. In other architectures they can have them.
    pub biases: bool,
    /// Each head of q and of k is normed before it is rotated.
    pub key_norms: bool,
    /// What attention and feed-forward return is normed before it is added.
    pub post_norms: bool,
    /// Each token's feed-forward is a few of many.
    pub experts: bool,
    /// Embeddings are multiplied by the square root of the width.
    pub scaled_embeddings: bool,
    /// The function inside the feed-forward.
    pub activation: Activation,
    /// Every n-th layer has no window; 0: all layers have the window, if the file has one.
    pub full_every: usize,
    /// The window if the file does not say.
    pub window: Option<usize>,
    /// The caps of scores and logits if the file does not say.
    pub caps: [Option<f32>; 2],
    /// The base of the rotary embedding if the file does not say.
    pub base: f32,
    /// The base of the rotary embedding in layers with a window, if it is another and the file does not say.
    pub local_base: Option<f32>,
    /// The number of layers of that size of the model whose scores are scaled by the root of `width / heads`; all
    /// others, by that of the dimension of a head. No key says so.
    pub scaled_by_width: Option<usize>,
}

/// Which dimensions of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pairs {
    /// 0 with 1, 2 with 3: the converter of such files has reordered the rows of q and k.
    Adjacent,
    /// Each of the first half with its place in the second half.
    Halves,
}

/// The function between the two matrices of the feed-forward.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The approximation with a hyperbolic tangent.
    Gelu,
}

const LLAMA: Architecture = Architecture {
    name: "llama",
    pairs: Pairs::Adjacent,
    fused: false,
    biases: false,
    key_norms: false,
    post_norms: false,
    experts: false,
    scaled_embeddings: false,
    activation: Activation::Silu,
    full_every: 0,
    window: None,
    caps: [None, None],
    base: 10_000.0,
    local_base: None,
    scaled_by_width: None,
};

const QWEN3: Architecture = Architecture { name: "qwen3", pairs: Pairs::Halves, key_norms: true, ..LLAMA };

const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    pairs: Pairs::Halves,
    post_norms: true,
    scaled_embeddings: true,
    activation: Activation::Gelu,
    full_every: 2,
    window: Some(4096),
    caps: [Some(50.0), Some(30.0)],
    scaled_by_width: Some(46), // 27B
    ..LLAMA
};

/// The architectures, in the order in which messages name them.
pub(crate) static ARCHITECTURES: [Architecture; 8] = [
    // Llama 1 to 3, and Mistral, whose files call themselves llama.
    LLAMA,
    Architecture { name: "mistral", ..LLAMA },
    Architecture { name: "qwen2", pairs: Pairs::Halves, biases: true, ..LLAMA },
    QWEN3,
    Architecture { name: "qwen3moe", experts: true, ..QWEN3 },
    GEMMA2,
    Architecture {
        name: "gemma3",
        key_norms: true,
        full_every: 6,
        window: None,
        caps: [None, None],
        base: 1_000_000.0,
        local_base: Some(10_000.0),
        scaled_by_width: Some(62), // 27B
        ..GEMMA2
    },
    // Phi-3, Phi-3.5, Phi-4.
    Architecture { name: "phi3", pairs: Pairs::Halves, fused: true, ..LLAMA },
];

impl Architecture {
    /// The architecture of this name.
    pub fn of(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name)
    }

    /// All names, for messages.
    pub fn names() -> String {
        ARCHITECTURES.each_ref().map(|architecture| architecture.name).join(", ")
    }
}
