//! The naive model of a sequence.

use std::collections::HashSet;

use block_table::{GroupBlock, Salt, TableOptions, Window};

use crate::common::content;

/// What the model knows of a sequence: the content of each position, and what it depends on.
#[derive(Clone)]
pub(crate) struct Model {
    /// All tokens of the sequence, computed or not.
    pub(crate) stream: Vec<u32>,
    /// The content of each computed position: see [`in_group`].
    pub(crate) written: Vec<u64>,
    /// Its salt and window, and the number of resets before it was computed: what its content depends on in addition to
    /// the tokens.
    pub(crate) kind: usize,
    pub(crate) era: u64,
    /// How many of its first tokens were freed by `free_before`.
    pub(crate) freed: usize,
    /// If it has become private: those of its blocks that were cached at that moment and still are.
    pub(crate) private: Option<HashSet<GroupBlock>>,
}

impl Model {
    pub(crate) fn truncate(&mut self, len: usize) {
        self.stream.truncate(len);
        self.written.truncate(len);
        if len == 0 {
            self.freed = 0;
        }
    }
}

/// Three salts, with and without a window.
pub(crate) fn options(kind: usize) -> TableOptions {
    let salt = [Salt::none(), Salt::new(b""), Salt::new(b"b")][kind % 3].clone();
    let options = TableOptions::default().salt(salt);
    if kind < 3 { options } else { options.window(Window::new(kind * 3 - 5).with_sink_tokens(kind % 3)) }
}

/// What a model writes for the last of these tokens in a sequence of this kind.
pub(crate) fn written(kind: usize, era: u64, tokens: &[u32]) -> u64 {
    content(tokens) ^ (kind as u64) << 50 ^ era << 40
}

/// What it writes in a group: the layers of each group have keys and values of their own.
pub(crate) fn in_group(group: usize, written: u64) -> u64 {
    written ^ (group as u64) << 54
}

/// A prompt whose last few tokens depend on the branch.
pub(crate) fn stream(prompt: usize, branch: u32) -> Vec<u32> {
    (0..prompt as u32).map(|at| if at + 7 < prompt as u32 { at } else { at * 4 + branch }).collect()
}
