//! The groups of layers of a history's pool, and what their tokens see.

use std::ops::Range;

use block_table::{BlockPool, PoolGroup, Span, Window};
use proptest::prelude::*;

use crate::common::Slots;
use crate::model::options;

/// What a token sees in a group. This account is the model's own, so that the one of the crates is checked against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct View {
    window: Option<usize>,
    sinks: usize,
    chunk: Option<usize>,
}

impl View {
    pub(crate) const ALL: View = View { window: None, sinks: 0, chunk: None };

    pub(crate) fn window(tokens: usize, sinks: usize) -> View {
        View { window: Some(tokens), sinks, chunk: None }
    }

    pub(crate) fn chunks(tokens: usize) -> View {
        View { chunk: Some(tokens), ..View::ALL }
    }

    /// What is left of it for a sequence that has a window itself. Tokens in chunks have no sink tokens.
    fn narrowed(self, window: Option<Window>) -> View {
        let Some(own) = window else { return self };
        let (tokens, sinks) = match self.window {
            Some(tokens) => (tokens.min(own.tokens()), self.sinks.min(own.sink_tokens())),
            None => (own.tokens(), own.sink_tokens()),
        };
        View { window: Some(tokens), sinks: if self.chunk.is_some() { 0 } else { sinks }, chunk: self.chunk }
    }

    fn span(self) -> Span {
        match (self.window, self.chunk) {
            (Some(tokens), _) => Window::new(tokens).with_sink_tokens(self.sinks).into(),
            (None, Some(tokens)) => Span::chunks(tokens),
            (None, None) => Span::all(),
        }
    }

    pub(crate) fn is_all(self) -> bool {
        self == View::ALL
    }

    /// How many tokens at the start every token sees.
    pub(crate) fn sinks(self) -> usize {
        self.sinks
    }

    /// The first position that a token sees, apart from sink tokens.
    pub(crate) fn start(self, token: usize) -> usize {
        let window = self.window.map_or(0, |tokens| (token + 1).saturating_sub(tokens));
        window.max(self.chunk.map_or(0, |tokens| token - token % tokens))
    }

    /// Whether a token sees one of these positions, all of which begin before it.
    pub(crate) fn sees(self, token: usize, mut positions: Range<usize>) -> bool {
        positions.any(|at| at < self.sinks || at >= self.start(token))
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Layers {
    pub(crate) units: usize,
    pub(crate) view: View,
}

/// The pool of a history.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) groups: Vec<Layers>,
    pub(crate) units: usize,
    pub(crate) block_size: usize,
}

impl Config {
    pub(crate) fn pool(&self) -> (BlockPool, Vec<Slots>) {
        let groups: Vec<_> = self.groups.iter().map(|of| PoolGroup::new(of.units).span(of.view.span())).collect();
        Slots::pool_of_groups(self.units, self.block_size, &groups)
    }

    /// How many units a block of every group takes.
    pub(crate) fn one_of_each(&self) -> usize {
        self.groups.iter().map(|of| of.units).sum()
    }

    /// What a sequence of this kind sees in each group.
    pub(crate) fn views(&self, kind: usize) -> Vec<View> {
        self.groups.iter().map(|of| of.view.narrowed(options(kind).window)).collect()
    }
}

/// A pool of these groups, from one that is always full to one that rarely is.
pub(crate) fn config(groups: impl Strategy<Value = Vec<Layers>>) -> impl Strategy<Value = Config> {
    (groups, 1..90usize, 0..8usize, 1..9usize).prop_map(|(groups, blocks, rest, block_size)| {
        let mut config = Config { groups, units: 0, block_size };
        let one_of_each = config.one_of_each();
        // A budget that is no multiple leaves units over that are not enough for a block of every group.
        config.units = blocks * one_of_each + rest % one_of_each;
        config
    })
}

/// One group, whose tokens see all tokens before them.
pub(crate) fn uniform() -> impl Strategy<Value = Vec<Layers>> {
    Just(vec![Layers { units: 1, view: View::ALL }])
}

/// A layer that sees all tokens for each five that have a window.
pub(crate) fn five_to_one() -> impl Strategy<Value = Vec<Layers>> {
    window(2..12).prop_flat_map(|view| in_any_order(vec![(1, View::ALL), (5, view)]))
}

/// A group of each kind, of different sizes.
pub(crate) fn all_kinds() -> impl Strategy<Value = Vec<Layers>> {
    let units = Just(vec![1, 2, 3]).prop_shuffle();
    (units, window(2..12), 1..12usize).prop_flat_map(|(units, view, chunk)| {
        let views = [View::ALL, view, View::chunks(chunk)];
        in_any_order(units.into_iter().zip(views).collect())
    })
}

/// One group with a window, whose blocks take more than a unit.
pub(crate) fn one_window() -> impl Strategy<Value = Vec<Layers>> {
    (window(2..12), 1..4usize).prop_map(|(view, units)| vec![Layers { units, view }])
}

/// Two different windows, and no group whose tokens see all tokens before them.
pub(crate) fn two_windows() -> impl Strategy<Value = Vec<Layers>> {
    (window(2..8), window(8..14), 1..4usize, 1..4usize)
        .prop_flat_map(|(short, long, a, b)| in_any_order(vec![(a, short), (b, long)]))
}

/// Groups of each of these kinds whose windows are longer than a block: with a shorter one, the block before is freed
/// too early, and no cached block can follow it.
pub(crate) fn long_windows(kind: usize, block_size: usize, chunk: usize) -> Vec<Layers> {
    let window = |more: usize, sinks: usize| View::window(block_size + 1 + more, sinks);
    let groups = match kind {
        0 => vec![(1, View::ALL)],
        1 => vec![(1, View::ALL), (5, window(0, 0))],
        2 => vec![(3, window(1, 2)), (1, View::chunks(chunk)), (2, View::ALL)],
        _ => vec![(2, window(0, 3)), (1, window(5, 0))],
    };
    groups.into_iter().map(|(units, view)| Layers { units, view }).collect()
}

/// A window of a few tokens, in half of the cases with sink tokens. A window of one token is left out: the token after
/// a whole number of blocks would see none of them, and the model could not tell whether there is a path up to there.
fn window(tokens: Range<usize>) -> impl Strategy<Value = View> {
    (tokens, prop_oneof![Just(0), 1..6usize]).prop_map(|(tokens, sinks)| View::window(tokens, sinks))
}

/// The first group is treated apart in some places, so each comes first in some histories.
fn in_any_order(groups: Vec<(usize, View)>) -> impl Strategy<Value = Vec<Layers>> {
    let groups: Vec<_> = groups.into_iter().map(|(units, view)| Layers { units, view }).collect();
    Just(groups).prop_shuffle()
}
