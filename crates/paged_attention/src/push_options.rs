//! Options of a sequence that joins a step.

use std::ops::Range;

use crate::PushError;

/// Options of [`Step::push_with`](crate::Step::push_with). By default tokens are causal, and the logits of the last one
/// are wanted.
///
/// ```
/// use paged_attention::{KvCache, KvShape, Logits, PushOptions};
///
/// let cache = KvCache::builder(KvShape::new(1, 1, 4)).blocks(8).build()?;
/// let (mut prompt, mut long_prompt, mut drafted) = (cache.table(), cache.table(), cache.table());
/// let mut step = cache.step();
/// // Four tokens of text, then an image of three, then text again. The image's tokens see each other.
/// step.push_with(&mut prompt, &[5, 8, 3, 1, 0, 0, 0, 9], &PushOptions::default().bidirectional(4..7))?;
/// // A part of a prompt: its logits are not needed.
/// step.push_with(&mut long_prompt, &[7; 32], &PushOptions::default().logits(Logits::None))?;
/// // A token and two drafted ones: all three are to be compared.
/// step.push_with(&mut drafted, &[4, 2, 6], &PushOptions::default().logits(Logits::All))?;
/// assert_eq!(step.logits_rows()?.to_vec1::<u32>()?, [7, 40, 41, 42]);
/// assert_eq!((step.logits_of(0), step.logits_of(1), step.logits_of(2)), (Some(0..1), Some(1..1), Some(1..4)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PushOptions {
    bidirectional: Vec<Range<usize>>,
    logits: Logits,
}

/// Of which new tokens of a sequence the logits are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Logits {
    /// Of none: the tokens are a part of a prompt, and more of it follows.
    None,
    /// Of the last one, the next token is sampled from.
    #[default]
    Last,
    /// Of all: drafted tokens are compared with them.
    All,
}

impl PushOptions {
    /// Lets the tokens at these indices of `tokens` see each other, later ones included, as the tokens of an image do
    /// in Gemma 3: in every layer they see all of the range, also what a window or the start of a chunk would hide, and
    /// before it what they see as causal tokens. It can be called several times, for several images.
    ///
    /// All of an image has to be in one step, because its first token sees its last. And the keys and values of its
    /// first token depend on its last: sequences must not share a part of a range unless they have the same range. So
    /// give the table a [salt](crate::BlockTable::salt_from) from the start of the range on that identifies all of it,
    /// such as the hash of the image, or make it [private](crate::TableOptions::private).
    #[must_use]
    pub fn bidirectional(mut self, tokens: Range<usize>) -> Self {
        self.bidirectional.push(tokens);
        self
    }

    /// Sets of which tokens the logits are wanted: of the last one by default. The step does not compute logits. It
    /// tells the model which rows its head has to compute ([`Step::logits_rows`](crate::Step::logits_rows)).
    #[must_use]
    pub fn logits(self, logits: Logits) -> Self {
        Self { logits, ..self }
    }

    /// The ranges of `tokens` tokens that see each other, in ascending order.
    pub(crate) fn checked_ranges(&self, tokens: usize) -> Result<Vec<Range<usize>>, PushError> {
        let mut ranges = self.bidirectional.clone();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut free_from = 0;
        for range in &ranges {
            if range.start < free_from || range.is_empty() || range.end > tokens {
                return Err(PushError::Bidirectional { range: range.clone(), tokens });
            }
            free_from = range.end;
        }
        Ok(ranges)
    }

    /// Of how many of the last of `tokens` tokens the logits are wanted.
    pub(crate) fn logits_of(&self, tokens: usize) -> usize {
        match self.logits {
            Logits::None => 0,
            Logits::Last => 1.min(tokens),
            Logits::All => tokens,
        }
    }
}
