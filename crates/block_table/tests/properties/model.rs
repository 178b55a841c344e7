//! The naive model of a sequence.

use std::collections::HashSet;

use block_table::{GroupBlock, Salt, SaltFrom, TableOptions, Window};

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
    /// Its salts from a position on, in the order of their positions.
    pub(crate) salts: Vec<SaltFrom>,
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

/// Lists of salts from a position on, many of which begin alike.
pub(crate) fn salts(number: usize) -> Vec<SaltFrom> {
    const LISTS: [&[(usize, &[u8])]; 12] = [
        &[],
        &[(3, b"a")],
        &[(3, b"b")],
        &[(4, b"a")],
        &[(3, b"a"), (9, b"a")],
        &[(3, b"a"), (9, b"")],
        &[(9, b"a")],
        &[(0, b"a")],
        &[(3, b"a"), (3, b"b")],
        &[(3, b"b"), (3, b"a")],
        &[(12, b"a"), (13, b"a"), (14, b"b")],
        &[(30, b"a")],
    ];
    let salt = |&(position, bytes): &(usize, &[u8])| SaltFrom { position, salt: Salt::new(bytes) };
    LISTS[number % LISTS.len()].iter().map(salt).collect()
}

/// Those of the salts that begin before this position.
pub(crate) fn before(salts: &[SaltFrom], position: usize) -> &[SaltFrom] {
    &salts[..salts.iter().take_while(|salt| salt.position < position).count()]
}

/// What a model writes for the last of these tokens in a sequence of this kind with these salts.
pub(crate) fn written(kind: usize, era: u64, salts: &[SaltFrom], tokens: &[u32]) -> u64 {
    salted(salts, tokens) ^ (kind as u64) << 50 ^ era << 40
}

/// What a model writes for the last of these tokens: it depends on all of them, and on the salts up to there.
pub(crate) fn salted(salts: &[SaltFrom], tokens: &[u32]) -> u64 {
    before(salts, tokens.len()).iter().fold(content(tokens), |hash, salt| {
        let bytes = salt.salt.bytes().unwrap().iter().map(|&byte| u32::from(byte));
        let all: Vec<u32> = [hash as u32, (hash >> 32) as u32, salt.position as u32].into_iter().chain(bytes).collect();
        content(&all)
    })
}

/// What it writes in a group: the layers of each group have keys and values of their own.
pub(crate) fn in_group(group: usize, written: u64) -> u64 {
    written ^ (group as u64) << 54
}

/// A prompt whose last few tokens depend on the branch.
pub(crate) fn stream(prompt: usize, branch: u32) -> Vec<u32> {
    (0..prompt as u32).map(|at| if at + 7 < prompt as u32 { at } else { at * 4 + branch }).collect()
}
