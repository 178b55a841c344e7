//! A set of layers of a cache.

use std::sync::atomic::{AtomicU64, Ordering};

/// Layers per word.
const WORD: usize = u64::BITS as usize;

/// A set of layers out of `0..layers`. Several threads can insert at the same time. Up to 64 layers need no allocation.
///
/// Relaxed operations suffice, because the set orders no other memory accesses: it is checked for missing layers only
/// when one thread has exclusive access to it, and the synchronisation that gave that access orders all earlier
/// operations.
#[derive(Debug)]
pub(crate) struct Layers {
    layers: usize,
    /// The first 64 layers.
    first: AtomicU64,
    /// The layers after the first 64, 64 in each word.
    rest: Box<[AtomicU64]>,
}

impl Layers {
    /// The empty set, of `layers` possible layers.
    pub(crate) fn none_of(layers: usize) -> Self {
        let words = layers.div_ceil(WORD).saturating_sub(1);
        Self { layers, first: AtomicU64::new(0), rest: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// How many layers are possible, in the set or not.
    pub(crate) fn layers(&self) -> usize {
        self.layers
    }

    /// Adds a layer. Returns `false`, and changes nothing, if the layer does not exist.
    pub(crate) fn insert(&self, layer: usize) -> bool {
        match self.word_and_bit(layer) {
            Some((word, bit)) => {
                word.fetch_or(bit, Ordering::Relaxed);
                true
            }
            None => false,
        }
    }

    /// Whether a layer is in the set.
    pub(crate) fn contains(&self, layer: usize) -> bool {
        self.word_and_bit(layer).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Removes a layer. Usually it is not in the set, and then nothing is written.
    pub(crate) fn remove(&self, layer: usize) {
        if let Some((word, bit)) = self.word_and_bit(layer)
            && word.load(Ordering::Relaxed) & bit != 0
        {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Adds all layers of another set of the same number of possible layers.
    pub(crate) fn insert_all(&self, other: &Layers) {
        for (word, other) in self.words().zip(other.words()) {
            word.fetch_or(other.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The first layer that is not in the set.
    pub(crate) fn first_missing(&self) -> Option<usize> {
        let missing = |(i, word): (usize, &AtomicU64)| i * WORD + word.load(Ordering::Relaxed).trailing_ones() as usize;
        let full = |(i, missing): &(usize, usize)| *missing == (i + 1) * WORD;
        let first = self.words().enumerate().map(|at| (at.0, missing(at))).find(|at| !full(at));
        first.map(|(_, missing)| missing).filter(|missing| *missing < self.layers)
    }

    fn words(&self) -> impl Iterator<Item = &AtomicU64> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// The word that has the layer, and the layer's bit in it; `None` if the layer does not exist.
    fn word_and_bit(&self, layer: usize) -> Option<(&AtomicU64, u64)> {
        let word = match layer / WORD {
            _ if layer >= self.layers => return None,
            0 => &self.first,
            word => self.rest.get(word - 1)?,
        };
        Some((word, 1 << (layer % WORD)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn behaves_like_a_set_for_any_number_of_layers() {
        for layers in [0, 1, 2, 63, 64, 65, 127, 128, 129, 1000] {
            let set = Layers::none_of(layers);
            assert_eq!(set.rest.len(), layers.saturating_sub(1) / 64, "{layers} layers");
            let mut model = BTreeSet::new();
            let mut state = 1u64;
            let check = |model: &BTreeSet<usize>| {
                assert_eq!(set.first_missing(), (0..layers).find(|layer| !model.contains(layer)), "{model:?}");
            };
            for _ in 0..layers * 8 {
                check(&model);
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let layer = (state >> 33) as usize % layers;
                if state >> 63 == 0 {
                    set.remove(layer);
                    model.remove(&layer);
                } else {
                    assert!(set.insert(layer));
                    model.insert(layer);
                }
            }
            for beyond in [layers, layers + 1, layers + 64, usize::MAX] {
                assert!(!set.insert(beyond));
                set.remove(beyond);
            }
            check(&model);
            assert!((0..=layers).all(|layer| set.contains(layer) == model.contains(&layer)));
            let all = Layers::none_of(layers);
            (0..layers).filter(|layer| !model.contains(layer)).for_each(|layer| assert!(all.insert(layer)));
            all.insert_all(&set);
            assert_eq!(all.first_missing(), None);
        }
    }
}
